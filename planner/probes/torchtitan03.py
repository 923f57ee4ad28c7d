"""Judges recipes with torchtitan 0.3.0 itself: its ConfigManager, ParallelDims, pipeline split, and what the
trainer checks before it starts. A case is ``{"recipe": text, "world": processes}``."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import without_triton  # noqa: F401
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torchtitan.components.quantization import float8, mx
from torchtitan.config.manager import ConfigManager
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part, _get_pipeline_metadata
from torchtitan.models.common import Linear

logging.disable(logging.WARNING)
for module in (float8, mx):
    module.has_cuda_capability = lambda *_: True  # the GPUs that it is written for
DEGREES = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")


def parameters(model: Any) -> int:
    with torch.device("meta"):
        return sum(one.numel() for one in model.build().parameters())


def judge(case: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    name = f"recipe_{number}"
    (folder / f"{name}.py").write_text(case["recipe"])
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            config = ConfigManager().parse_args(["--module", name, "--config", "planned"])
        except SystemExit as error:
            raise ValueError(told.getvalue()[-500:]) from error
    config.__post_init__()
    parallelism, training = config.parallelism, config.training
    dims = ParallelDims.from_config(parallelism, case["world"])
    replicas = dims.dp_replicate * dims.dp_shard
    once = training.local_batch_size * replicas
    batch = training.global_batch_size if training.global_batch_size > 0 else once
    assert batch % once == 0, f"batch {batch} of {once}"
    unit = (dims.tp if parallelism.enable_sequence_parallel else 1) * (2 * dims.cp if dims.cp > 1 else 1)
    assert training.seq_len % unit == 0, f"sequence {training.seq_len}"
    assert dims.dp_shard * dims.cp * dims.tp % dims.ep == 0, "experts"
    model = config.model_spec.model
    model.update_from_config(config=config)
    stages, micro = [], training.local_batch_size
    if dims.pp > 1:
        micro = parallelism.pipeline_parallel_microbatch_size
        several = issubclass(
            get_schedule_class(parallelism.pipeline_parallel_schedule), PipelineScheduleMulti
        )
        count, depth, *ends = _get_pipeline_metadata(dims, parallelism, model)
        parts = parallelism.module_fqns_per_model_part
        parts = parts or _generate_llm_fqn_per_model_part(count, depth, *ends)
        assert len(parts) % dims.pp == 0, f"{len(parts)} stages on {dims.pp} ranks"
        held = len(parts) // dims.pp
        assert held >= 2 if several else held == 1, f"{held} stages on a rank"
        stages = [[one for one in part if one.startswith("layers.")] for part in parts]
        wanted = ["tok_embeddings", *(f"layers.{n}" for n in range(depth)), "norm", "lm_head"]
        assert [one for part in parts for one in part] == wanted, "modules"
    group = config.optimizer.param_groups[0]
    return {
        "dims": {one: getattr(dims, one) for one in DEGREES},
        "batch": batch,
        "micro": micro,
        "accumulated": batch // (replicas * micro),
        "flushes": batch // once,
        "seq": training.seq_len,
        "dtype": training.dtype,
        "param": training.mixed_precision_param,
        "offload": training.enable_cpu_offload,
        "steps": training.steps,
        "graphs": not training.disable_cuda_graphs,
        "reshard": parallelism.fsdp_reshard_after_forward,
        "sequence_parallel": parallelism.enable_sequence_parallel,
        "schedule": parallelism.pipeline_parallel_schedule if dims.pp > 1 else None,
        "stages": [len(own) for own in stages],
        "checkpoint": type(config.activation_checkpoint).__qualname__,
        "compiled": config.compile.components if config.compile.enable else [],
        "async_tp": config.compile.enable_async_tensor_parallel,
        "loss": type(config.loss).__qualname__,
        "linears": sorted({type(one).__qualname__ for _, one, _, _ in model.traverse(Linear.Config)}),
        "optimizer": [group.optimizer_name, config.optimizer.implementation],
        "texts": [config.hf_assets_path, config.dataloader.dataset, config.dump_folder],
        "shape": [len(model.layers), model.dim],
        "parameters": parameters(model) if case.get("count") else 0,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for number, case in enumerate(json.load(sys.stdin)):
            try:
                answer = {"ok": True, **judge(case, Path(folder), number)}
            except Exception as error:
                answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
            print(json.dumps(answer), flush=True)


main()
