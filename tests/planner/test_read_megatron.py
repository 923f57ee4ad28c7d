"""Launch scripts of Megatron-LM: what is read, what is found wrong, and that nothing in them is run."""

from __future__ import annotations

import shlex
from pathlib import Path
from random import Random
from typing import Any

import pytest

from planner import api, catalog, reading
from planner.errors import InputError
from planner.export import NotExpressible, Subject, export
from planner.export import read_megatron as reader
from planner.export.imported import Imported
from planner.export.megatron_arguments import table
from planner.export.megatron_flags import FLAGS
from planner.export.read_megatron_model import layer_marks
from planner.export.shell_words import read_script
from planner.options import LAYOUT, TRAINING
from planner.plan import Plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout

SHAPE = "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --max-position-embeddings 2048"
FLAGS_OF_ONE = (
    f"{SHAPE} --seq-length 2048 --micro-batch-size 1 --global-batch-size 64 --bf16 --vocab-size 32000"
)
DEFAULTS = {name: (row[1:] or (None,))[0] for group in (LAYOUT, TRAINING) for name, row in group.items()}


def words_of(script: str, given: dict[str, str] | None = None, **files: str) -> tuple[str, ...]:
    """The words of a script's last command."""
    return read_script("run.sh", script, given, files).commands[-1].words


def read(flags: str, before: str = "", launch: str = "torchrun --nnodes 2 --nproc-per-node 8") -> Imported:
    return reader.read({"run.sh": f"{before}\n{launch} pretrain_gpt.py {flags}\n"})


def findings(flags: str, before: str = "", launch: str = "torchrun --nnodes 2 --nproc-per-node 8") -> Any:
    """Findings as ``severity setting`` with what is said and the fix."""
    found = read(flags, before, launch).findings
    return {f"{one.severity} {one.setting}": f"{one.text} -> {one.fix}" for one in found}


def planned(imported: Imported, gpus: str) -> Plan:
    """What is planned of a configuration on some GPUs."""
    assert imported.model is not None
    cluster = ClusterSpec.parse(gpus)
    given = DEFAULTS | dict(imported.options)
    training = reading.read_training(given)
    training, layout = reading.read_layout(imported.model, cluster, training, given)
    return api.estimate(
        imported.model,
        cluster,
        training,
        layout,
        recompute=reading.read_way(given["recompute"], given["offload"]),
        layers=reading.numbers("--layers-per-stage", given["layers_per_stage"]),
    )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("TP=8\nrun --a $TP ${TP}x '$TP' \"$TP\"", "run --a 8 8x $TP 8"),
        ('export TP=8; : "${PP:=4}"; run $TP $PP ${CP:-2} ${TP:-1}', "run 8 4 2 8"),
        ("N=4; G=8; run $((N*G)) $(( $N * ($G - 2) / 3 )) $((G%3)) $((2**3)) $((N>3?1:0))", "run 32 8 2 8 1"),
        ("A=( --a 1 # one\n  --b 2 )\nA+=(--c)\nrun ${A[@]} ${#A[@]}", "run --a 1 --b 2 --c 5"),
        ('A=("x y" z)\nrun "${A[@]}"', "run x y|z"),
        ('A=("--fp8-format hybrid")\nrun ${A[@]}', "run --fp8-format hybrid"),
        ('A=" --a 1 \\\n  --b 2 "\nrun $A \\\n  --c', "run --a 1 --b 2 --c"),
        ("A=1; if [ $A = 1 ]; then B=2; else B=3; fi; run $B", "run 2"),
        ("M=70b; case $M in 8b) L=32;; 70b|72b) L=80;; *) L=0;; esac; run $L", "run 80"),
        ('[[ "$X" == "on" ]] && A=1 || A=2; run $A', "run 2"),
        ('for i in 1 2 3; do A="$A $i"; done; run $A', "run 1 2 3"),
        ("i=0; while [ $i -lt 3 ]; do i=$((i+1)); done; run $i", "run 3"),
        ("f() { local K=$1; run --k $K $2; }\nf 3 4", "run --k 3 4"),
        ("set -- 8 1; run $1 $2 $#", "run 8 1 2"),
        ("declare -A L=([a]=1 [b]=2); run ${L[b]}", "run 2"),
        ("V=a/b/c.txt; run ${V##*/} ${V%.txt} ${V%/*}", "run c.txt a/b/c a/b"),
        ("N=`expr 2 + 3`; E=$(echo $N); run $E", "run 5"),
        ('C="run --a 1"; eval $C --b', "run --a 1 --b"),
        ('T=8; srun -N 4 bash -c "run --t $T"', "run --t 8"),
        ("T=8; sbatch <<EOF\n#SBATCH -N 4\nrun --t $T\nEOF", "run --t 8"),
    ],
)
def test_words_are_those_that_bash_makes(script: str, words: str) -> None:
    wanted = tuple(words.replace("|", " ").split()) if '"x y"' not in script else ("run", "x y", "z")
    assert words_of(script) == wanted


def test_files_that_a_script_names_are_read_if_they_are_given() -> None:
    assert words_of(
        "source conf/env.sh; run $(cat more.args)", **{"env.sh": "A=1", "more.args": "--a 1"}
    ) == (*("run", "--a", "1"),)
    assert "give that file too" in read_script("run.sh", "source conf/env.sh\nrun --a").notes[0]
    flags = {"train.sh": "torchrun --nproc_per_node 8 x.py $(cat f.args)", "f.args": FLAGS_OF_ONE}
    assert reader.read(flags).options["global_batch_size"] == 64


def test_values_that_are_not_known_are_named() -> None:
    script = (
        f"torchrun --nproc_per_node 8 pretrain_gpt.py {FLAGS_OF_ONE} --tensor-model-parallel-size $TP $MORE"
    )
    with pytest.raises(InputError, match=r"--tensor-model-parallel-size is \$TP: give --set TP=\.\.\."):
        reader.read({"run.sh": script})
    known = reader.read({"run.sh": script}, {"TP": "2"})
    assert known.options["tensor_parallel"] == 2
    assert any(one.setting == "$MORE" for one in known.findings)
    assert reader.read({"run.sh": script}, {"TP": "2", "MORE": ""}).options["tensor_parallel"] == 2
    first = "torchrun pretrain_gpt.py " + FLAGS_OF_ONE + " --tensor-model-parallel-size $1"
    assert reader.read({"run.sh": first}, {"1": "4"}).options["tensor_parallel"] == 4
    added = reader.read({"run.sh": first.replace("$1", "1")}, {"seq-length": "512"})
    assert added.options["seq_length"] == 512


def test_of_a_test_that_is_not_known_what_both_ways_have_in_common_counts() -> None:
    script = "A=(--a 1)\nif [ -f x ]; then A+=(--b); B=1; else B=2; fi\nrun ${A[@]} --c $B"
    found = read_script("run.sh", script)
    assert found.commands[-1].words[:3] == ("run", "--a", "1")
    assert "[ -f x ]" in found.notes[0]
    assert "--b" in found.notes[0]


@pytest.mark.parametrize(
    ("launch", "before", "world", "each"),
    [
        ("torchrun --nnodes 2 --nproc-per-node 8", "", 16, 8),
        ("torchrun --nnodes=2 --nproc_per_node=4", "", 8, 4),
        ("python -m torch.distributed.run --nproc_per_node 8", "", 8, 8),
        ("torchrun --nproc_per_node $GPUS --nnodes $NODES", "GPUS=8; NODES=4", 32, 8),
        ("torchrun --nproc_per_node 8 --nnodes $NODES", "", None, None),
        ("srun torchrun --nproc_per_node 8 --nnodes $SLURM_NNODES", "#SBATCH --nodes=4", 32, 8),
        ("srun python -u", "#SBATCH -N 4\n#SBATCH --ntasks-per-node=8", 32, 8),
        ("srun --ntasks=16 --ntasks-per-node 4 python", "", 16, 4),
        ("mpirun -np 16 python", "", 16, None),
        ("python", "", None, None),
    ],
)
def test_processes_are_those_that_the_launcher_starts(
    launch: str, before: str, world: int | None, each: int | None
) -> None:
    found = read(FLAGS_OF_ONE, before, launch)
    assert (found.world_size, found.per_node) == (world, each)


def test_defaults_are_megatrons_own() -> None:
    model = read(SHAPE + " --seq-length 2048 --micro-batch-size 1").model
    assert model is not None
    assert (model.intermediate_size, model.num_key_value_heads, model.head_dim) == (4096, 16, 64)
    assert model.tie_word_embeddings
    assert (model.norm, model.position_embedding, model.mlp_bias) == ("layernorm", "learned", True)
    assert model.dropout == 0.1
    options = read(SHAPE + " --seq-length 2048 --micro-batch-size 2 --tensor-model-parallel-size 2").options
    assert (options["sharding"], options["precision"], options["sequence_parallel"]) == ("ddp", "fp32", False)
    assert options["global_batch_size"] == 16
    swiglu = read(f"{FLAGS_OF_ONE} --swiglu --group-query-attention").model
    assert swiglu is not None
    assert (swiglu.intermediate_size, swiglu.num_key_value_heads) == (2688, 1)


# Settings of recipes that ship with Megatron-LM (its examples and release tests at d98e8a64), and the GPUs
# that they run on: nothing else of them.
RECIPES = {
    "gpt3-175b": (
        "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 1536 --fp16 "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --merge-file m",
        "torchrun --nproc_per_node 8 --nnodes 128",
        "1024xH100",
        175e9,
    ),
    "llama3-8b-fp8": (
        "--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 "
        "--num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128 "
        "--seq-length 8192 "
        "--max-position-embeddings 8192 --position-embedding-type rope --attention-dropout 0.0 "
        "--hidden-dropout 0.0 --swiglu --normalization RMSNorm --attention-backend fused "
        "--untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1 "
        "--global-batch-size 128 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion "
        "--fp8-format hybrid --fp8-param-gather --tensor-model-parallel-size 1 --context-parallel-size 2 "
        "--sequence-parallel "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --vocab-size 128256",
        "torchrun --nproc_per_node 8 --nnodes 1",
        "8xH100",
        8.03e9,
    ),
    "mixtral-8x7b": (
        "--use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 4096 "
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
        "--attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope "
        "--swiglu --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 "
        "--num-experts 8 --moe-router-topk 2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall "
        "--overlap-param-gather --overlap-grad-reduce --tokenizer-type Llama2Tokenizer --micro-batch-size 1 "
        "--global-batch-size 1024 --bf16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 "
        "--expert-model-parallel-size 4 --use-distributed-optimizer --sequence-parallel",
        "torchrun --nproc_per_node 8 --nnodes 8",
        "64xH100",
        46.7e9,
    ),
    "gpt3-15b": (
        "--num-layers 32 --hidden-size 6144 --num-attention-heads 48 --group-query-attention "
        "--num-query-groups 8 --squared-relu --disable-bias-linear --untie-embeddings-and-output-weights "
        "--position-embedding-type rope --rotary-percent 0.5 --apply-layernorm-1p --seq-length 4096 "
        "--max-position-embeddings 4096 --attention-dropout 0.0 --hidden-dropout 0.0 --micro-batch-size 4 "
        "--global-batch-size 1152 --bf16 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 "
        "--sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--vocab-size 256000",
        "torchrun --nproc_per_node 8 --nnodes 8",
        "64xH100",
        15.6e9,
    ),
    "deepseek-v3": (
        "--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 "
        "--kv-channels 128 --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope "
        "--make-vocab-size-divisible-by 3232 --normalization RMSNorm --swiglu --disable-bias-linear "
        "--untie-embeddings-and-output-weights --multi-latent-attention --qk-layernorm --q-lora-rank 1536 "
        "--kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --num-experts 256 "
        "--moe-layer-freq [0]*3+[1]*58 --moe-ffn-hidden-size 2048 --moe-router-topk 8 --moe-grouped-gemm "
        "--moe-shared-expert-intermediate-size 2048 --moe-token-dispatcher-type flex --mtp-num-layers 1 "
        "--attention-dropout 0.0 --hidden-dropout 0.0 --micro-batch-size 1 --global-batch-size 2048 --bf16 "
        "--expert-model-parallel-size 64 --expert-tensor-parallel-size 1 --tensor-model-parallel-size 1 "
        "--pipeline-model-parallel-size 8 --pipeline-model-parallel-layout "
        "Et*3|(tt|)*29,m|L --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--recompute-granularity selective --recompute-modules mlp moe mla_up_proj layernorm "
        "--vocab-size 129280",
        "torchrun --nproc_per_node 8 --nnodes 128",
        "1024xH100",
        671e9,
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_run_are_read_and_fit(name: str) -> None:
    flags, launch, gpus, parameters = RECIPES[name]
    found = reader.read(
        {"run.sh": f"export CUDA_DEVICE_MAX_CONNECTIONS=1\n{launch} pretrain_gpt.py {_quoted(flags)}"}
    )
    assert not [one for one in found.findings if one.severity == "error"], found.findings
    assert found.model is not None
    assert found.model.num_parameters == pytest.approx(parameters, rel=0.02)
    assert found.world_size == int(gpus.partition("x")[0])
    if name == "deepseek-v3":
        assert (found.options["chunks"], found.options["layers_per_stage"]) == (4, "9,8,8,8,8,8,6,6")
        with pytest.raises(InputError, match="61 layers do not fill 4 equal chunks"):
            planned(found, gpus)
        return
    assert planned(found, gpus).fits


def test_a_recipe_with_less_context_parallelism_than_was_measured_is_at_risk() -> None:
    """Megatron-LM publishes 13,812 tokens/s of Llama 3 8B with a context degree of 2; its script has 1."""
    flags, launch, gpus, _ = RECIPES["llama3-8b-fp8"]
    alone = flags.replace("--context-parallel-size 2", "--context-parallel-size 1")
    found = reader.read({"run.sh": f"{launch} pretrain_gpt.py {_quoted(alone)}"})
    assert planned(found, gpus).verdict == "at risk"


def _quoted(flags: str) -> str:
    return shlex.join(flags.split())


@pytest.mark.parametrize(
    ("flags", "setting", "text"),
    [
        ("--tensor-model-parallel-size 32", "error world size", "16 processes are no multiple of 32"),
        ("--tensor-model-parallel-size 3", "error --tensor-model-parallel-size", "16 attention heads"),
        ("--tensor-model-parallel-size 2", "waste --sequence-parallel", "is off with"),
        ("--sequence-parallel", "warning --sequence-parallel", "no effect"),
        ("--pipeline-model-parallel-size 16", "error --pipeline-model-parallel-size", "24 layers"),
        (
            "--num-virtual-stages-per-pipeline-rank 2",
            "error --num-virtual-stages-per-pipeline-rank",
            "2 or more",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 4",
            "error --num-layers-per-virtual-pipeline-stage",
            "4 layers do not divide the 6",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3 "
            "--global-batch-size 24",
            "error --global-batch-size",
            "6 micro-batches are no multiple of 4",
        ),
        ("--global-batch-size 60", "error --global-batch-size", "no multiple of 16"),
        ("--pipeline-model-parallel-size 8 --global-batch-size 4", "waste --global-batch-size", "idle 78%"),
        ("--num-query-groups 4", "warning --num-query-groups", "count with --group-query-attention only"),
        (
            "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 8",
            "waste --tensor-model-parallel-size",
            "each is kept 4 times",
        ),
        ("--expert-model-parallel-size 2", "error --expert-model-parallel-size", "without experts"),
        ("--num-experts 6 --expert-model-parallel-size 4", "error --num-experts", "no multiple"),
        ("--num-experts 8 --tensor-model-parallel-size 2", "error --sequence-parallel", "experts"),
        ("--fp16", "error --fp16, --bf16", "exclude each other"),
        ("--seq-length 4096", "error --seq-length", "more than --max-position-embeddings 2048"),
        ("--context-parallel-size 2 --seq-length 2042", "error --seq-length", "no multiple of 4"),
        (
            "--tensor-model-parallel-size 4 --sequence-parallel --seq-length 2046",
            "error --seq-length",
            "no multiple of --tensor-model-parallel-size",
        ),
        ("--recompute-granularity full", "error --recompute-granularity", "--recompute-method"),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 99",
            "warning --recompute-num-layers",
            "99 is more than the 24 layers",
        ),
        ("--recompute-method uniform", "warning --recompute-method", "nothing is recomputed"),
        ("--recompute-activations", "waste --recompute-modules", "keeps no scores"),
        ("", "waste --use-distributed-optimizer", "GiB a GPU more"),
        ("--overlap-param-gather", "error --overlap-param-gather", "--use-distributed-optimizer"),
        (
            "--use-torch-fsdp2 --pipeline-model-parallel-size 2",
            "error --use-torch-fsdp2",
            "",
        ),
        ("--use-megatron-fsdp", "error --use-megatron-fsdp", "fsdp_dtensor"),
        ("--optimizer-cpu-offload", "error --optimizer-cpu-offload", "--use-precision-aware-optimizer"),
        ("--fp8-format hybrid --transformer-impl local", "warning --fp8-format", "Transformer Engine"),
        ("--sequence-paralel", "error --sequence-paralel", "write --sequence-parallel"),
        ("--num_layers 24", "error --num_layers", "write --num-layers"),
        ("--tensor-model-parallel 2", "error --tensor-model-parallel", "no abbreviations"),
        ("--num-layers 24 --num-layers 32", "warning --num-layers", "24, then 32"),
        ("--seq-length long", "error --seq-length", "not a whole number"),
        ("--bf16 true", "error --bf16", "takes no value"),
        ("--recompute-granularity some", "error --recompute-granularity", "none of its values"),
        ("--checkpoint-activations", "warning --checkpoint-activations", "older Megatron-LM"),
        ("--no-query-key-layer-scalin", "warning --no-query-key-layer-scalin", "unless the script adds it"),
        ("'--fp8-format hybrid'", "error --fp8-format hybrid", "is one word"),
        ("--no-such-thing-at-all 3", "warning --no-such-thing-at-all", "unless the script adds it"),
        ("--swiglu", "warning --hidden-dropout", "0.1 is its default"),
        ("--make-vocab-size-divisible-by 5000", "waste --make-vocab-size-divisible-by", "35,000"),
    ],
)
def test_misconfigurations_are_found(flags: str, setting: str, text: str) -> None:
    found = findings(f"{FLAGS_OF_ONE} {flags}")
    assert setting in found, found
    assert text in found[setting]


def test_a_sound_configuration_has_no_findings() -> None:
    sound = (
        f"{FLAGS_OF_ONE} --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer "
        "--overlap-grad-reduce --overlap-param-gather --no-create-attention-mask-in-dataloader"
    )
    assert not findings(sound, "export CUDA_DEVICE_MAX_CONNECTIONS=1")


def test_queues_to_the_gpu_are_one_with_tensor_parallelism_and_several_with_fsdp() -> None:
    cut = f"{FLAGS_OF_ONE} --tensor-model-parallel-size 2"
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert f"warning {name}" in findings(cut)
    assert "is 8" in findings(cut, f"export {name}=8")[f"warning {name}"]
    assert f"warning {name}" not in findings(cut, f"export {name}=1")
    assert f"warning {name}" not in findings(cut, launch=f"{name}=1 torchrun --nproc_per_node 8")
    sharded = f"{FLAGS_OF_ONE} --use-megatron-fsdp --ckpt-format fsdp_dtensor"
    assert f"error {name}" in findings(sharded, f"export {name}=1")
    assert f"error {name}" not in findings(sharded, f"export {name}=1\nunset {name}")
    flags_alone = reader.read({"plan.args": cut})
    assert not [one for one in flags_alone.findings if one.setting == name]


def test_attention_without_its_kernels_is_planned_with_its_scores() -> None:
    off = read(FLAGS_OF_ONE, "export NVTE_FLASH_ATTN=0 NVTE_FUSED_ATTN=0")
    assert "attention=eager" in off.options["option"]
    assert any("unfused" in one.text for one in off.findings)
    assert "attention=flash" in read(FLAGS_OF_ONE, "export NVTE_FLASH_ATTN=0").options["option"]


def test_what_deepspeed_says_is_not_guessed() -> None:
    found = findings(f"{FLAGS_OF_ONE} --deepspeed --zero-stage=2 --deepspeed_config ds.json")
    assert "--sharding" in found["warning --deepspeed"]


def test_spellings_are_the_parsers() -> None:
    assert read(f"{FLAGS_OF_ONE} --tensor-model-parallel-size=4").options["tensor_parallel"] == 4
    assert read(f"{FLAGS_OF_ONE} --tensor-model-parallel-size 2").options["tensor_parallel"] == 2
    assert read(f"{FLAGS_OF_ONE} --checkpoint-activations").options["recompute"] == "full"
    assert set(flag.name for flag in FLAGS) <= set(table())


def test_layers_on_stages() -> None:
    cut = f"{FLAGS_OF_ONE} --pipeline-model-parallel-size 4"
    assert "layers_per_stage" not in read(cut).options
    first = read(f"{cut} --decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 5").options
    assert first["layers_per_stage"] == "3,8,8,5"
    counted = read(
        f"{cut} --num-layers 26 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split"
    ).options
    assert counted["layers_per_stage"] == "6,7,7,6"
    letters = read(f"{cut} --pipeline-model-parallel-layout 'Et*3|(tttttttt|)*2t*5L'").options
    assert letters["layers_per_stage"] == "3,8,8,5"
    chunks = read(f"{cut} --num-layers-per-virtual-pipeline-stage 2").options
    assert (chunks["chunks"], chunks["schedule"]) == (3, "interleaved")


def test_lists_of_layers_are_not_evaluated() -> None:
    assert layer_marks("--f", "([1]*2+[0])*2", 6, None) == [1, 1, 0, 1, 1, 0]
    assert layer_marks("--f", "2", 4, lambda n, i: i % n == 0) == [1, 0, 1, 0]
    for text in ("__import__('os')[0]", "[1]*10**9", "([1]*9999)*9999", "(" * 3000 + "[1]", "[1", "0"):
        with pytest.raises(InputError, match=r"is no list|is of"):
            layer_marks("--f", text, 4, lambda n, i: i % n == 0)


@pytest.mark.parametrize(
    "script",
    [
        "A=$(touch PWNED)\nB=`touch PWNED`\ntorchrun pretrain_gpt.py {flags} --save $A$B",
        'eval "touch PWNED; torchrun pretrain_gpt.py {flags}"',
        'bash -c "touch PWNED; torchrun pretrain_gpt.py {flags}"',
        "torchrun pretrain_gpt.py {flags} --save <(touch PWNED)",
        "A=$((a[$(touch PWNED)]))\ntorchrun pretrain_gpt.py {flags} --save $A",
        "cat <<EOF | bash\ntouch PWNED\nEOF\ntorchrun pretrain_gpt.py {flags}",
        "trap 'touch PWNED' EXIT\ntorchrun pretrain_gpt.py {flags}",
    ],
)
def test_nothing_is_run(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = reader.read({"run.sh": script.replace("{flags}", FLAGS_OF_ONE)})
    assert found.model is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("a\0b", "a character"),
        (bytes(range(1, 256)).decode("latin-1"), "a character"),
        ("A=1\n" * 2_500_000, "read up to"),
        ("A=aaaaaaaaaa\n" + "A=$A$A\n" * 60, "makes too much"),
        ("A=(a a a a)\n" + 'A=("${A[@]}" "${A[@]}")\n' * 60, "makes too much"),
        ("while true; do while true; do A=1; done; done", "makes too much"),
        ("f() { f; f; }\nf", "nested too deeply"),
        ("A=(" * 20_000, "no shell script"),
        ("$(" * 3000, "no command"),
        ("A='x\ntorchrun pretrain_gpt.py --num-layers 2", "is no bash"),
        ("echo hello", "no command with Megatron-LM's flags"),
        ("", "no command"),
    ],
)
def test_what_is_no_script_or_too_much_is_refused(script: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reader.read({"run.sh": script})


def test_an_open_quote_is_named() -> None:
    assert "warning line 2" in findings(f'{FLAGS_OF_ONE} --save "abc')
    with pytest.raises(InputError, match="not closed"):
        reader.read({"plan.args": f'{FLAGS_OF_ONE} --save "abc'})


def test_only_its_own_files_are_recognised() -> None:
    assert reader.recognises({"a.sh": FLAGS_OF_ONE})
    assert reader.recognises({"plan.args": f"# x\n{FLAGS_OF_ONE}"})
    assert not reader.recognises({"a.sh": "torchrun train.py --hidden-size-of 3"})
    assert not reader.recognises({"ds.json": FLAGS_OF_ONE})


MODELS = ("llama-3.1-8b", "llama-3-70b", "gpt2-medium", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite")
MODELS += ("qwen2.5-7b", "gpt-oss-20b", "nemotron-4-15b", "qwen3-next-80b-a3b", "mamba2-2.7b", "gpt-3-175b")


def _random_plan(random: Random) -> Subject | None:
    """A plan of a catalog's model, or None where no such is planned."""
    known = [name for name in MODELS if name in catalog.names("models")]
    model = ModelSpec.from_catalog(random.choice(known))
    gpus, tensor, stages = random.choice((16, 32, 64)), random.choice((1, 2, 4)), random.choice((1, 1, 2, 4))
    context = random.choice((1, 1, 2))
    data, micro = max(1, gpus // (tensor * stages * context)), random.choice((1, 2))
    chunks = random.choice((1, 2)) if stages > 1 else 1
    options = {"overlap": random.choice(("on", "off")), "norm": random.choice(("kept", "kept", "recomputed"))}
    options |= {"attention": "eager"} if random.random() < 0.1 else {}
    options |= {"moe": "recomputed"} if model.experts and random.random() < 0.3 else {}
    sharding = random.choice(("ddp", "zero1", "zero1", "zero2", "fsdp"))
    accumulated = stages * random.choice((1, 2))
    training = TrainingSpec(
        seq_length=min(random.choice((1024, 2048, 4096)), model.max_position_embeddings),
        global_batch_size=data * micro * accumulated,
        precision=random.choice(("bf16", "bf16", "fp16", "fp32", "fp8-delayed")),
        optimizer=random.choice(("adamw", "adamw", "adamw", "sgd", "momentum")),
        gradient_dtype=random.choice((None, None, "bf16", "fp16")),
        optimizer_dtype=random.choice((None, None, None, "bf16")),
        options=options,
    )
    layout = Layout(
        data_parallel=data,
        tensor_parallel=tensor,
        pipeline_parallel=stages,
        context_parallel=context,
        context_comm=random.choice(("ring", "all-gather", "ulysses")) if context > 1 else "ring",
        chunks=chunks,
        schedule="interleaved" if chunks > 1 else "1f1b",
        micro_batch_size=micro,
        grad_accum=accumulated,
        data_shards=data,
        sharding=sharding,
        sequence_parallel=tensor > 1 and random.random() < 0.8,
        expert_parallel=random.choice((1, 2, 4)) if model.experts else 1,
        expert_tensor_parallel=random.choice((1, tensor)) if model.experts else 1,
        offload=random.choice(("", "", "optimizer")),
    )
    layers = None
    if stages > 1 and chunks == 1 and random.random() < 0.4:
        count = model.num_hidden_layers
        layers = [count // stages - 1, *[count // stages] * (stages - 1)]
        layers[-1] += count - sum(layers)
    cluster = ClusterSpec.parse(f"{gpus}xh100")
    recompute = random.choice(("none", "none", "full", "selective", "full:1"))
    try:
        return Subject(
            model, cluster, api.estimate(model, cluster, training, layout, recompute=recompute, layers=layers)
        )
    except InputError:
        return None


def test_what_is_written_is_read_back_as_the_same_plan() -> None:
    random, written, tried = Random(17), 0, 0
    while written < 40 and tried < 1000:
        tried += 1
        subject = _random_plan(random)
        if subject is None:
            continue
        try:
            made = export(subject, "megatron")
        except NotExpressible:
            continue
        written += 1
        found = reader.read(dict(made.files))
        assert not [one for one in found.findings if one.severity == "error"], found.findings
        assert found.model is not None
        assert found.model.num_parameters == subject.model.num_parameters
        assert (found.world_size, found.per_node) == (subject.plan.num_gpus, 8)
        again = planned(found, f"{subject.plan.num_gpus}xh100")
        assert again.layout == subject.plan.layout
        assert again.peak_bytes == subject.plan.peak_bytes
        assert [stage.layers for stage in again.stages] == [stage.layers for stage in subject.plan.stages]
        assert again.training.seq_length == subject.job.seq_length
    assert written == 40, f"{written} of {tried}"
