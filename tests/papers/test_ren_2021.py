"""Ren et al. 2021, ZeRO-Offload, arXiv:2101.06840: the largest models that train; DeepSpeed's estimators.

The machine is a DGX-2: 16 V100 of 32 GB, 1.5 TB of host memory. Models of table 3: hidden size, layers, and
micro-batch; sequences of 1,024 tokens; every layer checkpointed. CPU-Adam brings weights back tile by tile
(section 5.1), which is option offload_copy=tiled here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import ClusterSpec, Plan, TrainingSpec, estimate
from planner.catalog import load_model
from planner.deepspeed_table import FACTOR, zero2, zero3
from planner.errors import InputError
from strategies.layout import Layout
from tests.helpers import gpt

ESTIMATES = json.loads(
    (Path(__file__).parent.parent / "data" / "deepspeed_estimates.json").read_text(encoding="utf-8")
)["estimates"]


def planned(
    layers: int,
    hidden: int,
    gpus: int,
    tensor: int,
    sharding: str,
    micro: int,
    offload: str = "",
    kernels: str = "megatron",
    accum: int = 1,
    **options: str,
) -> Plan:
    model = gpt(layers, hidden, hidden // 128, seq=1024)
    update = {"host_memory_bytes": 1500 * 10**9, "host_bytes_per_s": 256e9}
    cluster = ClusterSpec.parse(f"1x{gpus}xV100-32G").model_copy(update=update)
    data = gpus // tensor
    training = TrainingSpec(
        framework="deepspeed",
        seq_length=1024,
        global_batch_size=micro * data * accum,
        precision="fp16",
        attention="eager",
        options={"kernels": kernels, "offload_copy": "tiled"} | options,
    )
    layout = Layout(
        data_parallel=data,
        data_shards=data,
        tensor_parallel=tensor,
        micro_batch_size=micro,
        grad_accum=accum,
        sharding=sharding,
        offload=offload,
    )
    return estimate(model, cluster, training, layout, recompute="full")


LARGEST: dict[str, tuple[dict[str, Any], int, int]] = {
    # what trains: how, layers of the largest that was published, layers of a clearly larger one
    "13 B on one GPU, 10 times as many as without": (
        {"hidden": 4096, "gpus": 1, "tensor": 1, "sharding": "zero2", "micro": 4,
         "offload": "optimizer"}, 65, 75,
    ),
    "70 B on 16 GPUs with model parallelism": (
        {"hidden": 9216, "gpus": 16, "tensor": 8, "sharding": "zero2", "micro": 8,
         "offload": "optimizer"}, 69, 85,
    ),
    "9 B with ZeRO-2 on 16 GPUs": (
        {"hidden": 4096, "gpus": 16, "tensor": 1, "sharding": "zero2", "micro": 4}, 45, 60,
    ),
    "15 B with model parallelism on 16 GPUs": (
        {"hidden": 8192, "gpus": 16, "tensor": 16, "sharding": "ddp", "micro": 4}, 19, 30,
    ),
    # DeepSpeed's blog, "DeepSpeed ZeRO-3 Offload", 8 March 2021: over 40 B on one V100 with 1.5 TB of host.
    "40 B on one GPU with parameters on the host too": (
        {"hidden": 8192, "gpus": 1, "tensor": 1, "sharding": "zero3", "micro": 1, "kernels": "hf",
         "offload": "optimizer,parameters"}, 50, 95,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_published_model_trains_and_a_clearly_larger_one_does_not(name: str) -> None:
    how, largest, larger = LARGEST[name]
    assert planned(largest, **how).verdict != "does not fit"
    assert planned(larger, **how).verdict == "does not fit"


def test_the_host_ends_what_parameters_on_it_may_grow_to() -> None:
    """95 layers of 8,192: the GPU is a third full."""
    plan = planned(95, 8192, 1, 1, "zero3", 1, "optimizer,parameters", kernels="hf")
    own = plan.stages[0].elsewhere["host"]
    assert plan.peak_bytes < plan.capacity_bytes / 2
    assert own.bytes > own.capacity_bytes


def test_the_tutorials_ten_billion_model_trains_on_one_gpu() -> None:
    """DeepSpeed's tutorial "ZeRO-Offload": 50 layers of 4,096, micro-batches of 10 on one V100."""
    plan = planned(50, 4096, 1, 1, "zero2", 10, "optimizer")
    assert plan.verdict != "does not fit"


def test_copying_all_weights_back_at_once_halves_what_one_gpu_trains() -> None:
    """DeepSpeed's source of 2025 brings a partition back in fp32 and casts it then: 4 bytes a parameter."""
    plan = planned(65, 4096, 1, 1, "zero2", 4, "optimizer", offload_copy="whole")
    assert plan.verdict == "does not fit"
    assert plan.stages[0].moment == "optimizer step"
    assert planned(25, 4096, 1, 1, "zero2", 4, "optimizer", offload_copy="whole").verdict != "does not fit"


# --- DeepSpeed's estimators ---------------------------------------------------------------------------


@pytest.mark.parametrize("row", ESTIMATES, ids=lambda row: f"{row['fn'][9:14]}-{row['model']}-{row['nodes']}")
def test_deepspeeds_estimators_to_the_byte(row: dict[str, Any]) -> None:
    where = row["gpus_per_node"], row["nodes"], row["cpu_offload"]
    if "zero2" in row["fn"]:
        found = zero2(row["total_params"], *where)
    else:
        found = zero3(row["total_params"], row["largest_layer_params"], *where)
    assert (found.host, found.gpu) == (row["cpu_mem"], row["gpu_mem"])


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
@pytest.mark.parametrize("name", ["gpt2-small", "llama-2-7b", "llama-3-8b"])
def test_states_on_the_host_are_the_estimators_without_their_allowance(name: str, sharding: str) -> None:
    """On one GPU: 16 bytes a parameter, and 18 with parameters. The engine's own gradients are 2 more."""
    model = load_model(name)
    cluster = ClusterSpec.parse("1xA100")
    training = TrainingSpec(framework="deepspeed", seq_length=512, global_batch_size=1)
    offload = "optimizer" if sharding == "zero2" else "optimizer,parameters"
    plan = estimate(model, cluster, training, Layout(sharding=sharding, offload=offload))
    components = plan.stages[0].elsewhere["host"].components
    states = sum(size for part, size in components.items() if part != "communication_buffers")
    if sharding == "zero2":
        expected = zero2(model.num_parameters, 1, offload=True).host / FACTOR
        assert plan.stages[0].components["parameters"] == 2 * model.num_parameters
    else:
        expected = zero3(model.num_parameters, 0, 1, offload=True).host / FACTOR + 2 * model.num_parameters
    assert states == pytest.approx(expected, rel=1e-6)


def test_optimizer_states_of_zero1_are_not_offloaded() -> None:
    with pytest.raises(InputError, match="zero2"):
        planned(10, 1024, 1, 1, "zero1", 1, "optimizer")
