"""8-bit products, TF32, Kahan's compensation: what is kept, at which peak, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import ClusterSpec, InputError, ModelSpec, TrainingSpec, estimate
from planner.cost import checkpoint_bytes
from planner.defaults import Job, resolve
from planner.given import check_supported
from planner.layers import Builder
from planner.offload import wire_of
from planner.precision import REFUSED
from planner.stacks import STACKS
from planner.stages import Prices, price
from planner.utilization import utilization
from planner.weights import block_weights
from strategies.base import Layer, Role
from strategies.layout import Layout
from strategies.zero1 import Zero1
from tests.helpers import block_of

DATA: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "optimizers.json").read_text())
SEQ = 4096


def job_of(precision: str | None, gpus: str = "8xH100", model: str = "llama-3.1-8b", **given: Any) -> Job:
    fields = {"precision": precision, "seq_length": SEQ, "global_batch_size": 8, **given}
    return resolve(ModelSpec.from_catalog(model), ClusterSpec.parse(gpus), TrainingSpec(**fields))


def priced(job: Job, **layout: Any) -> Prices:
    return price(job, Layout(**{"data_parallel": 8, "sharding": "zero1", **layout}), ["none", "full"])


def amount(layer: Layer, role: Role) -> float:
    return sum(float(term.amount) for term in layer.by_role[role])


def linear(model: ModelSpec) -> int:
    """Elements of a Llama block's matrices."""
    heads = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    return model.hidden_size * (heads + 3 * model.intermediate_size)


@pytest.mark.parametrize(
    ("gpus", "precision", "copies"),
    [
        ("8xH100", "fp8-delayed", 2),  # as it is, and transposed
        ("8xH100", "fp8-tensorwise", 2),
        ("8xH100", "fp8-blockwise", 2),
        ("8xB200", "fp8-delayed", 1),  # Blackwell's products take either orientation
        ("8xB200", "fp8-tensorwise", 1),
        ("8xB200", "mxfp8", 2 * (1 + 1 / 32)),  # scales of a byte for 32 elements, along both directions
    ],
)
def test_weights_have_copies_in_8_bits_beside_them(gpus: str, precision: str, copies: float) -> None:
    job = job_of(precision, gpus)
    assert float(priced(job).plain.states[Role.BUFFER]) == linear(job.model) * copies
    assert (job.recipe.weight, job.recipe.gradient, job.recipe.master, job.recipe.moment) == (2, 4, 4, 4)


@pytest.mark.parametrize(
    ("gpus", "precision", "rowwise", "columnwise", "gathered"),
    [
        ("8xH100", "fp8-delayed", 1, 1, 1),
        ("8xH100", "fp8-tensorwise", 1, 1, 1),
        ("8xH100", "fp8-blockwise", 1, 1, 1),
        ("8xB200", "fp8-delayed", 1, 0, 1),
        ("8xB200", "mxfp8", 1 + 1 / 32, 1 + 1 / 32, 2),  # gathered in bf16 through the gradients' buffer
    ],
)
def test_weights_in_8_bits_alone_have_none_in_half_precision_beside_them(
    gpus: str, precision: str, rowwise: float, columnwise: float, gathered: float
) -> None:
    """--fp8-param-gather: norms, embedding and head stay in bf16; gradients and states are as before."""
    jobs = [job_of(precision, gpus, options={"fp8_param_gather": way}) for way in ("off", "on")]
    beside, alone = (block_of(job) for job in jobs)
    model = jobs[0].model
    own, norms = linear(model), 2 * model.hidden_size
    assert amount(alone, Role.PARAMETER) == rowwise * own + 2 * norms
    assert amount(alone, Role.BUFFER) == columnwise * own
    for role in (Role.GRADIENT, Role.OPTIMIZER, Role.ACTIVATION):
        assert amount(alone, role) == amount(beside, role)
    wire = wire_of(jobs[1], Layout(data_parallel=8, sharding="zero1"))
    sent = Zero1(8, gather_bytes=wire.gather_bytes).collectives(alone, lambda term: float(term.amount))
    assert {one.kind: float(one.size) for one in sent}["all_gather"] == gathered * own + 2 * norms


@pytest.mark.parametrize("precision", ["fp8-tensorwise", "mxfp8"])
def test_a_plan_with_weights_in_8_bits_alone_has_two_bytes_less_of_each(precision: str) -> None:
    """Llama 3.1 8B, no pipeline: embedding, head and norms are as they were."""
    gpus = "8xB200" if precision == "mxfp8" else "8xH100"
    peaks = []
    for way in ("off", "on"):
        job = job_of(precision, gpus, options={"fp8_param_gather": way})
        plan = estimate(job.model, job.cluster, job.training, Layout(data_parallel=8, sharding="zero1"))
        parts = plan.stages[0].components
        peaks.append(parts["parameters"] + parts["workspace"])
    assert peaks[0] - peaks[1] == pytest.approx(2 * 32 * linear(job.model), rel=1e-6)


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3", "mixtral-8x7b", "gpt-3-175b", "qwen2-57b-a14b"]
)
def test_the_weights_that_are_quantized_are_those_that_have_copies(name: str) -> None:
    """The list of weights says so of itself, the stack's table of copies by rows of its own."""
    job = job_of("fp8-tensorwise", "2048xH100", name, global_batch_size=2048, seq_length=1024)
    for kind in set(job.model.blocks):
        block = Builder(job.model, job.training, job.stack, job.recipe).block(kind)
        quantized = {weight.name for weight in block_weights(job.model, kind) if weight.quantized}
        elements = sum(float(t.elements) for t in block.by_role[Role.PARAMETER] if t.name in quantized)
        assert amount(block, Role.BUFFER) == 2 * elements > 0


@pytest.mark.parametrize(
    ("precision", "given", "message"),
    [
        ("bf16", {}, "has no quantized weights"),
        ("nvfp4", {}, "has no quantized weights"),
        ("fp8-delayed", {"adapters": {"rank": 8}}, "all weights are trained"),
    ],
)
def test_weights_in_8_bits_alone_are_refused_where_they_are_not_planned(
    precision: str, given: dict[str, Any], message: str
) -> None:
    gpus = "8xB200" if precision == "nvfp4" else "8xH100"
    with pytest.raises(InputError, match=message):
        job_of(precision, gpus, options={"fp8_param_gather": "on"}, **given)


def test_weights_in_8_bits_alone_take_the_distributed_optimizer() -> None:
    job = job_of("fp8-delayed", options={"fp8_param_gather": "on"})
    said = "does not run ddp: use zero1, or leave out option fp8_param_gather=on"
    with pytest.raises(InputError, match=said):
        check_supported(job, Layout(data_parallel=8, sharding="ddp"))
    layout = Layout(data_parallel=8, sharding="zero1", offload="optimizer")
    with pytest.raises(InputError, match="optimizer"):
        estimate(job.model, job.cluster, job.training, layout)


def test_a_checkpoint_has_weights_in_half_precision_all_the_same() -> None:
    layout = Layout(data_parallel=8, sharding="zero1")
    jobs = [job_of("fp8-delayed", options={"fp8_param_gather": way}) for way in ("off", "on")]
    assert len({checkpoint_bytes(job, layout) for job in jobs}) == 1


@pytest.mark.parametrize(
    ("precision", "gpus", "attention", "scales"),
    [("fp8-delayed", "8xH100", 1, 0), ("fp8-tensorwise", "8xH100", 0, 0), ("mxfp8", "8xB200", 0, 1 / 32)],
)
def test_inputs_of_products_are_kept_in_a_byte(
    precision: str, gpus: str, attention: int, scales: float
) -> None:
    """Two of width h and one of f in a byte for two; under delayed scaling attention's output twice."""
    half, eight = job_of("bf16", gpus), job_of(precision, gpus)
    model = half.model
    h, f = model.hidden_size, model.intermediate_size
    saved = [float(priced(job).plain.saved) for job in (half, eight)]
    heads = model.num_attention_heads * model.head_dim
    assert saved[0] - saved[1] == SEQ * ((2 * h + f) * (1 - scales) - attention * heads)


def test_full_recompute_keeps_the_same_in_8_bits() -> None:
    """The input of a block, in half precision."""
    for precision in ("bf16", "fp8-delayed"):
        job = job_of(precision)
        assert float(priced(job).blocks[1].saved) == 2 * SEQ * job.model.hidden_size


def test_torchao_keeps_what_bf16_keeps() -> None:
    """Its products save their operands as they were, and cast them again."""
    sizes = {
        precision: float(priced(job_of(precision, framework="torchtitan"), sharding="fsdp").plain.saved)
        for precision in ("bf16", "fp8-tensorwise", "fp8-rowwise")
    }
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("row", DATA["float8"]["rows"], ids=lambda row: str(row["name"]))
def test_float8_takes_as_much_of_bf16s_memory_as_in_published_runs(row: dict[str, Any]) -> None:
    def highest(precision: str) -> float:
        options = {"compile": "on", "loss": "compiled"}
        job = job_of(precision, framework="torchtitan", seq_length=8192, options=options)
        stage = priced(job, sharding="fsdp").spread().stages[0]
        return max(32 * rows[0] + fixed + working[0] for rows, fixed, working in stage.moments.values())

    for name in set(row) - {"name", "bf16"}:
        assert highest(name) / highest("bf16") == pytest.approx(row[name] / row["bf16"], rel=0.01)


def test_the_blocks_products_run_at_the_8_bit_peak_and_the_rest_at_bf16s() -> None:
    half, eight = (priced(job_of(precision)).compute for precision in ("bf16", "fp8-delayed"))
    gpu = half.job.cluster.gpu
    assert eight.peak == gpu.peak_flops["fp8"] == pytest.approx(2 * half.peak, rel=1e-4)
    assert eight.products / half.products == pytest.approx(2 * 0.709 / 0.803, rel=1e-4)
    assert eight.head_products == half.head_products == half.products
    assert eight.rest == half.rest == gpu.peak_flops["bf16"]


def test_mfu_is_of_the_peak_that_the_products_run_at() -> None:
    found = {}
    for precision in ("bf16", "fp8-delayed"):
        prices = priced(job_of(precision))
        found[precision] = utilization(prices, [[32, 0]], 1e5).mfu
    assert found["bf16"] == pytest.approx(2 * found["fp8-delayed"], rel=1e-4)


def test_casts_take_time_but_less_than_products_win() -> None:
    for framework, sharding in (("megatron", "zero1"), ("torchtitan", "fsdp")):
        half, eight = (
            priced(job_of(precision, framework=framework), sharding=sharding).plain
            for precision in ("bf16", "fp8-tensorwise")
        )
        assert 0.5 < float(eight.seconds / half.seconds) < 1, framework


def test_fp32_runs_on_fp32_units_and_tf32_on_tensor_cores() -> None:
    for name, stack in STACKS.items():
        assert {p: stack.recipes[p].unit for p in ("fp32", "tf32")} == {"fp32": "fp32", "tf32": "tf32"}, name
    plain, tensor = (priced(job_of(precision)) for precision in ("fp32", "tf32"))
    peaks = plain.job.cluster.gpu.peak_flops
    assert (plain.compute.peak, tensor.compute.peak) == (peaks["fp32"], peaks["tf32"])
    assert plain.plain.states == tensor.plain.states
    assert float(plain.plain.saved) == float(tensor.plain.saved)


def test_kahans_compensation_is_two_bytes_a_parameter() -> None:
    """2 + 2 + 4 bytes of pure bf16, and what rounding lost."""
    for framework, sharding in (("hf", "ddp"), ("fsdp", "fsdp")):
        sizes = {}
        for precision in ("pure-bf16", "bf16-kahan"):
            prices = priced(
                job_of(precision, "1xA100", framework=framework), data_parallel=1, sharding=sharding
            )
            block = prices.plain.states
            parameters = float(block[Role.PARAMETER]) / 2
            sizes[precision] = sum(float(size) for size in block.values()) / parameters
        assert sizes == {"pure-bf16": 8, "bf16-kahan": 10}


@pytest.mark.parametrize("name", REFUSED)
def test_precisions_that_are_not_known_well_enough_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"precision={name} is not planned: "):
        job_of(name)


@pytest.mark.parametrize(
    ("precision", "given", "message"),
    [
        ("fp8-delay", {}, "is not known: did you mean fp8-delayed"),
        ("pure-bf16", {}, "has no recipe in megatron: use bf16 or fp16"),
        ("fp8-delayed", {"gpus": "8xA100"}, "A100-SXM-80GB has no FP8 units: use bf16"),
        ("tf32", {"gpus": "8xV100"}, "has no TF32 units"),
        ("fp8-delayed", {"gpus": "8xMI300X"}, "planned on NVIDIA's GPUs, not on MI300X"),
        ("mxfp8", {}, "mxfp8 is Blackwell's.*use fp8-tensorwise"),
        ("fp8-blockwise", {"gpus": "8xB200"}, "fp8-blockwise is planned on Hopper"),
        ("fp8-delayed", {"options": {"norm": "recomputed"}}, "norm=recomputed is not planned .*norm=kept"),
        ("fp8-tensorwise", {"attention": "eager"}, "attention=eager is not planned .*attention=flash"),
    ],
)
def test_precisions_that_cannot_be_are_refused_with_a_fix(
    precision: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        job_of(precision, **given)


def test_megatrons_8_bit_products_are_planned_without_its_fsdp() -> None:
    assert list(job_of("fp8-delayed").stack.shardings) == ["ddp", "zero1"]
