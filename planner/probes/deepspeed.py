"""DeepSpeedConfig's own reading of configurations, for any number of processes, without a GPU.

A case is ``{"config", "world", "parts"}``: parts are the processes that share a replica of the data.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from itertools import pairwise
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.pop(0)  # this folder, whose files have the names of the tools
with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed.runtime.config as ds
    from deepspeed.runtime.utils import partition_balanced

ds.dist.get_rank = lambda *args, **more: 0


class Groups:
    """What the engine asks of whoever makes its groups."""

    def __init__(self, data: int) -> None:
        self.data = data

    def get_data_parallel_world_size(self) -> int:
        return self.data


def read(case: dict[str, Any]) -> dict[str, Any]:
    found = ds.DeepSpeedConfig(case["config"], mpu=Groups(case["world"] // case["parts"]))
    zero = found.zero_config
    bf16 = getattr(found, "bfloat16_config", None)
    fp16 = getattr(found, "float16_config", None)
    experts = getattr(found, "expert_parallel_config", None)
    return {
        "batch": [
            found.train_batch_size,
            found.train_micro_batch_size_per_gpu,
            found.gradient_accumulation_steps,
        ],
        "stage": int(zero.stage),
        "bf16": bool(bf16.enabled if bf16 else found.bfloat16_enabled),
        "fp16": bool(fp16.enabled if fp16 else found.fp16_enabled),
        "gradients": str(found.grad_accum_dtype),
        "overlap": bool(zero.overlap_comm),
        "sizes": [
            int(zero.reduce_bucket_size),
            int(zero.max_live_parameters),
            int(zero.prefetch_bucket_size),
            int(zero.sub_group_size),
        ],
        "optimizer": [found.optimizer_name, found.optimizer_params],
        "offload": [_place(zero.offload_optimizer), _place(zero.offload_param)],
        "pipeline": found.pipeline["stages"],
        "checkpoints": found.activation_checkpointing_config.number_checkpoints,
        "cpu_checkpoints": found.activation_checkpointing_config.cpu_checkpointing,
        "experts": experts.autoep_size if experts and experts.enabled else 1,
        "split": _split(case.get("layers"), case.get("stages", 1)),
    }


def _place(section: Any) -> list[Any] | None:
    if section is None:
        return None
    path = None if section.nvme_path is None else str(section.nvme_path)
    return [getattr(section.device, "value", section.device), bool(section.pin_memory), path]


def _split(layers: int | None, stages: int) -> list[int] | None:
    """Layers on each stage as PipelineModule's partition_method type: balances them."""
    if layers is None:
        return None
    weights = [0] + [1] * layers + [0, 0]
    parts = partition_balanced(weights, stages)
    return [sum(weights[a:b]) for a, b in pairwise(parts)]


def main() -> None:
    for case in json.load(sys.stdin):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answer = {"ok": True, **read(case)}
        except Exception as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), flush=True)


main()
