"""Judges TOML with torchtitan 0.2.2 itself: its ConfigManager, ParallelDims, pipeline split, and what the
trainer checks before it starts. A case is ``{"toml": text, "world": processes}``."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import without_triton  # noqa: F401
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torchtitan.config import ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part
from torchtitan.protocols.train_spec import get_train_spec

logging.disable(logging.WARNING)
DEGREES = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}


def judge(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "plan.toml"
    path.write_text(case["toml"])
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            config = ConfigManager().parse_args(["--job.config_file", str(path)])
        except SystemExit as error:
            raise ValueError(told.getvalue()[-500:]) from error
    parallelism, training = config.parallelism, config.training
    dims = ParallelDims(
        **{own: getattr(parallelism, name) for own, name in DEGREES.items()}, world_size=case["world"]
    )
    replicas = dims.dp_replicate * dims.dp_shard
    once = training.local_batch_size * replicas
    batch = training.global_batch_size if training.global_batch_size > 0 else once
    assert batch % once == 0, f"batch {batch} of {once}"
    assert training.seq_len % dims.seq_len_divisor == 0, f"sequence {training.seq_len}"
    spec = get_train_spec(config.model.name)
    model = copy.deepcopy(spec.model_args[config.model.flavor])
    model.update_from_config(config)
    stages, micro = [], training.local_batch_size
    if dims.pp_enabled:
        assert spec.pipelining_fn is not None, f"{config.model.name} has no pipeline"
        micro = parallelism.pipeline_parallel_microbatch_size
        assert training.local_batch_size % micro == 0, "micro-batches"
        several = issubclass(
            get_schedule_class(parallelism.pipeline_parallel_schedule), PipelineScheduleMulti
        )
        parts = parallelism.module_fqns_per_model_part
        ends = (
            parallelism.pipeline_parallel_first_stage_less_layers,
            parallelism.pipeline_parallel_last_stage_less_layers,
        )
        if parts is None:
            each = parallelism.pipeline_parallel_layers_per_stage
            count = -(-(model.n_layers + sum(ends)) // each) if each else dims.pp * (2 if several else 1)
            parts = generate_llm_fqn_per_model_part(count, model.n_layers, *ends)
        assert len(parts) % dims.pp == 0, f"{len(parts)} stages on {dims.pp} ranks"
        held = len(parts) // dims.pp
        assert held >= 2 if several else held == 1, f"{held} stages on a rank"
        stages = [[name for name in part if name.startswith("layers.")] for part in parts]
        wanted = ["tok_embeddings", *(f"layers.{n}" for n in range(model.n_layers)), "norm", "output"]
        assert [name for part in parts for name in part] == wanted, "modules"
    return {
        "dims": {name: getattr(dims, name) for name in DEGREES},
        "batch": batch,
        "micro": micro,
        "accumulated": batch // (replicas * micro),
        "flushes": batch // once,
        "seq": training.seq_len,
        "dtype": training.dtype,
        "param": training.mixed_precision_param,
        "offload": training.enable_cpu_offload,
        "steps": training.steps,
        "reshard": parallelism.fsdp_reshard_after_forward,
        "schedule": parallelism.pipeline_parallel_schedule if dims.pp_enabled else None,
        "rotate": parallelism.context_parallel_rotate_method,
        "stages": [len(own) for own in stages],
        "checkpoint": [config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option],
        "compiled": config.compile.components if config.compile.enable else [],
        "async_tp": parallelism.enable_async_tensor_parallel,
        "converters": config.model.converters,
        "recipe": config.quantize.linear.float8.recipe_name,
        "optimizer": [config.optimizer.name, config.optimizer.implementation],
        "texts": [config.model.hf_assets_path, config.training.dataset, config.job.dump_folder],
        "shape": [model.n_layers, model.dim, model.n_heads],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for case in json.load(sys.stdin):
            try:
                answer = {"ok": True, **judge(case, Path(folder))}
            except Exception as error:
                answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
            print(json.dumps(answer), flush=True)


main()
