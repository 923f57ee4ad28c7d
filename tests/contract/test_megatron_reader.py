"""What the reader of Megatron-LM's flags calls an error, against Megatron-LM's own parser."""

from __future__ import annotations

import shlex
from random import Random
from typing import Any

import pytest

from planner.errors import InputError
from planner.export import read_megatron
from tests.contract import judged

pytestmark = pytest.mark.contract

BASE = shlex.split(
    "--num-layers 32 --hidden-size 1024 --num-attention-heads 16 --kv-channels 64 --ffn-hidden-size 2816 "
    "--seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 128 --bf16 "
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --tensor-model-parallel-size 4 --sequence-parallel "
    "--pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --vocab-size 32000 "
    "--tokenizer-type NullTokenizer --mock-data --train-iters 10 --lr 1e-4 --hidden-dropout 0.0 "
    "--attention-dropout 0.0"
)
CHANGES = [
    *(f"--tensor-model-parallel-size {n}" for n in (1, 2, 3, 8, 16)),
    *(f"--pipeline-model-parallel-size {n}" for n in (1, 3, 4, 5)),
    *(f"--context-parallel-size {n}" for n in (2, 3, 4)),
    *(f"--seq-length {n}" for n in (2049, 4096, 2052, 1000)),
    *(f"--num-layers {n}" for n in (30, 31, 33)),
    *(f"--num-attention-heads {n}" for n in (12, 15, 18)),
    *(f"--global-batch-size {n}" for n in (100, 127, 8, 96)),
    *(f"--micro-batch-size {n}" for n in (2, 3)),
    *(f"--num-layers-per-virtual-pipeline-stage {n}" for n in (2, 3, 4, 16)),
    *(f"--num-virtual-stages-per-pipeline-rank {n}" for n in (2, 4)),
    *(f"--decoder-first-pipeline-num-layers {n}" for n in (10, 15)),
    "--decoder-last-pipeline-num-layers 17",
    "--pipeline-model-parallel-layout Et*16|t*16L",
    "--pipeline-model-parallel-layout Et*10|t*10|t*12L",
    *(f"--group-query-attention --num-query-groups {n}" for n in (2, 3, 8)),
    "--num-query-groups 8",
    "--recompute-granularity full",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--recompute-granularity selective --recompute-method block",
    "--recompute-activations --recompute-num-layers 2",
    "--fp16",
    "--fp8-format hybrid --fp4-format e2m1",
    "--fp8-param-gather",
    *(f"--num-experts 8 --expert-model-parallel-size {n}" for n in (2, 3, 8, 16)),
    "--expert-model-parallel-size 2",
    "--num-experts 6 --moe-router-topk 3",
    "--num-experts 8 --use-tp-pp-dp-mapping --context-parallel-size 2",
    "--overlap-param-gather",
    "--use-megatron-fsdp --ckpt-format fsdp_dtensor",
    "--use-megatron-fsdp",
    "--ckpt-format fsdp_dtensor",
    "--use-torch-fsdp2",
    "--optimizer-cpu-offload",
    "--distribute-saved-activations",
    "--multi-latent-attention --group-query-attention",
    "--sequence-paralel",
    "--num_layers 32",
    "--tensor-model-parallel 4",
    "--train-samples 100",
    "--step-batch-size-schedule 0:16",
    "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te",
    "--save x",
    "--checkpoint-activations",
    "--batch-size 4",
    "--cpu-offloading-num-layers 2",
    "--no-position-embedding",
    "--optimizer adamw",
    "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    "--lr fast",
    "--bf16 true",
    "stray",
]


def _cases(count: int) -> list[dict[str, Any]]:
    """One change at a time, then two or three at random; sometimes without the variable they need."""
    random = Random(3)
    picked = [[change] for change in CHANGES]
    picked += [random.sample(CHANGES, random.choice((2, 3))) for _ in range(count - len(picked))]
    return [
        {
            "words": [*BASE, *(word for change in changes for word in shlex.split(change))],
            "env": {} if random.random() < 0.1 else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            "world": 64,
            "arch": 9,
        }
        for changes in picked
    ]


def _refused(case: dict[str, Any]) -> list[str]:
    env = "".join(f"export {name}={value}\n" for name, value in case["env"].items())
    script = f"{env}torchrun --nnodes 8 --nproc-per-node 8 pretrain_gpt.py {shlex.join(case['words'])}"
    try:
        found = read_megatron.read({"train.sh": script}).findings
    except InputError as error:
        return [str(error)]
    return [
        f"{one.setting} {one.text}"
        for one in found
        # Before Blackwell the variable is asked for; of old flags newer parsers know nothing.
        if one.severity == "error"
        or one.setting == "CUDA_DEVICE_MAX_CONNECTIONS"
        or "older Megatron-LM" in one.text
    ]


def test_what_the_parser_refuses_is_an_error_and_nothing_else() -> None:
    cases = _cases(160)
    verdicts = judged("frameworks", "megatron.py", cases)
    assert len(verdicts) == len(cases)
    refused = sum(not verdict["ok"] for verdict in verdicts)
    assert 60 <= refused <= 150, "of both kinds there are many"
    apart = [
        (" ".join(case["words"][len(BASE) :]), verdict.get("error"), found)
        for case, verdict in zip(cases, verdicts, strict=True)
        if bool(found := _refused(case)) is verdict["ok"]
    ]
    assert not apart
