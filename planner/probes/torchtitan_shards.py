"""Counts the parameters that torchtitan 0.2.2's own code leaves on single ranks: the model is built without
storage and goes through its pipeline and parallelize functions, on a process group that only pretends.
A case is ``{"toml": text, "world": processes, "ranks": [...]}``."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import without_triton  # noqa: F401
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan import train  # noqa: F401 - it loads all that has a device type
from torchtitan.config import ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

logging.disable(logging.WARNING)


def local(case: dict[str, Any], rank: int) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        Path(file.name).write_text(case["toml"])
        config = ConfigManager().parse_args(["--job.config_file", file.name])
    config.compile.enable = False
    own, world = config.parallelism, case["world"]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    spec = get_train_spec(config.model.name)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("torchtitan") and hasattr(module, "device_type"):
            module.device_type = "cpu"
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        dims = ParallelDims(
            dp_replicate=own.data_parallel_replicate_degree,
            dp_shard=own.data_parallel_shard_degree,
            cp=own.context_parallel_degree,
            tp=own.tensor_parallel_degree,
            pp=own.pipeline_parallel_degree,
            ep=own.expert_parallel_degree,
            etp=own.expert_tensor_parallel_degree,
            world_size=world,
        )
        dims.build_mesh()
        arguments = spec.model_args[config.model.flavor]
        arguments.update_from_config(config)
        with torch.device("meta"):
            model = spec.model_cls(arguments)
        if dims.pp_enabled:
            loss = spec.build_loss_fn(config)
            device = torch.device("cpu")
            built = spec.pipelining_fn(model, dims, config, device, arguments, spec.parallelize_fn, loss)
            parts = built[1]
        else:
            parts = [spec.parallelize_fn(model, dims, config)]
        return sum(
            (one.to_local() if hasattr(one, "to_local") else one).numel()
            for part in parts
            for one in part.parameters()
        )
    finally:
        dist.destroy_process_group()


def main() -> None:
    for case in json.load(sys.stdin):
        try:
            answer: dict[str, Any] = {"ok": True, "local": [local(case, rank) for rank in case["ranks"]]}
        except Exception as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps(answer), flush=True)


main()
