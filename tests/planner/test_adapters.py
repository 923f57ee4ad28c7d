"""Adapters and frozen weights: against traces of peft's modules, the papers' numbers and measured steps."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import ClusterSpec, ModelSpec, TrainingSpec, estimate, search
from planner.adapters import Adapters, Frozen, read
from planner.cli import app
from planner.defaults import Job
from planner.errors import InputError
from planner.families import model_from_config
from planner.layers import Builder
from planner.replay import StageReplay
from planner.runs import load_runs
from planner.stages import Prices, price
from planner.steps import STEPS as IN_LAYERS
from planner.validate import predict, predict_step
from strategies.base import Layer, Role, held
from strategies.layout import Layout, Wire, strategies_of
from tests.helpers import job_of, llama, saved

TESTS = Path(__file__).parents[1]
TRACED = json.loads((TESTS / "data" / "traced_adapters.json").read_text())
MODELS, BLOCKS, STEPS = TRACED["models"], TRACED["blocks"], TRACED["steps"]
RUNS = {run.id: run for run in load_runs(TESTS / "measured" / "runs.json").runs}


def whole(row: dict[str, Any]) -> Job:
    model = llama(
        row["layers"],
        row["h"],
        row["a"],
        row["kv"],
        head_dim=row["d"],
        intermediate_size=row["f"],
        vocab_size=row["v"],
        tie_word_embeddings=row["v"] > 100_000,
    )
    return job_of(
        model,
        "1xA100",
        framework="hf",
        precision="pure-bf16",
        seq_length=row["s"],
        global_batch_size=row["b"],
        adapters=Adapters(rank=row["rank"], targets=tuple(row["targets"])),
    )


def highest(prices: Prices) -> float:
    rows = prices.spread().under_one([int(prices.rows)])
    return max(size for _, size in StageReplay(prices, 0, rows).run().snapshots)


def bills(job: Job, batch: int = 1) -> tuple[Layer, Layer, Layer, Layer]:
    """Embedding, first block, any other block, head."""
    builder = Builder(job.model, job.training, job.stack, job.recipe, batch)
    return builder.embedding(), builder.block(builder.kinds[0]), builder.block(), builder.head()


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row["id"])
def test_bytes_that_a_model_with_adapters_keeps(row: dict[str, Any]) -> None:
    """Within 0.3 %: cos and sin of the rotary embedding and inputs are not in the tables."""
    embedding, first, block, head = bills(whole(row), row["b"])
    kept = [saved(layer, policy=row["recompute"]) for layer in (first, block)]
    ours = saved(embedding) + kept[0] + (row["layers"] - 1) * kept[1] + saved(head)
    assert ours == pytest.approx(row["saved"], rel=0.003)


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row["id"])
def test_states_of_a_model_with_adapters(row: dict[str, Any]) -> None:
    """All parameters; gradients of the adapters alone, and their moments (a count of steps beside each)."""
    job = whole(row)
    prices = price(job, Layout(micro_batch_size=row["b"]), (row["recompute"],))
    states = {role: float(size) * row["layers"] for role, size in prices.blocks[0].states.items()}
    assert job.model.num_parameters + job.trained_parameters == row["parameters"]
    assert states[Role.GRADIENT] == row["gradients"]
    assert states[Role.OPTIMIZER] == pytest.approx(row["optimizer"], rel=0.005)
    for end in (prices.embedding, prices.head):
        assert end.states[Role.GRADIENT] == end.states[Role.OPTIMIZER] == 0


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row["id"])
def test_peak_of_a_model_with_adapters(row: dict[str, Any]) -> None:
    """Of whole models and of cuts of one and two layers, with the lowest block a kind of its own."""
    prices = price(whole(row), Layout(micro_batch_size=row["b"]), (row["recompute"],))
    assert highest(prices) == pytest.approx(row["peak"], rel=0.005)


def traced(row: dict[str, Any]) -> Job:
    return job_of(
        model_from_config(row["config"], "traced/config.json"),
        "1xA100",
        framework="hf",
        precision=row["precision"],
        attention=row["attention"],
        seq_length=row["s"],
        global_batch_size=1,
        adapters=Adapters(
            rank=row["rank"],
            targets=tuple(row["targets"]),
            dropout=row["dropout"],
            dtype=row["dtype"],
            dora=row.get("dora", False),
        ),
    )


@pytest.mark.parametrize("row", BLOCKS, ids=lambda row: row["id"])
def test_a_block_with_adapters(row: dict[str, Any]) -> None:
    """What it keeps, exactly but for 512-byte rounding; its states; a peak that is never much too low.

    The peak is of three blocks with a small vocabulary: above by what the lowest block has of the steps below
    its adapters, which is counted while it is at work, most where nothing but the last product is adapted.
    """
    prices = price(traced(row), Layout(), (row["recompute"],))
    if row["block"] is not None:
        assert float(prices.blocks[-1].saved) == pytest.approx(row["block"], rel=3e-4)
    sizes = [one.states for one in (prices.embedding, prices.head, *[prices.blocks[-1]] * 3)]
    assert sum(size[Role.PARAMETER] for size in sizes) == pytest.approx(row["parameters"], rel=1e-3)
    assert sum(size[Role.GRADIENT] for size in sizes) == pytest.approx(row["gradients"], rel=1e-3)
    high = 1.13 if row["targets"] == ["down"] else 1.07
    assert 0.994 < highest(prices) / row["peak"] < high


def test_sums_per_layer_of_llama_2_7b() -> None:
    """45.5 sbh in full, 41.6 with adapters of rank 16 everywhere, 34.2 with rank 8 beside q and v."""
    sizes = {}
    for name, adapters in (
        ("full", None),
        ("all", Adapters(rank=16)),
        ("q, v", Adapters(rank=8, targets=("q", "v"))),
    ):
        job = job_of(
            ModelSpec.from_catalog("llama-2-7b"),
            "1xA100",
            framework="hf",
            precision="pure-bf16",
            seq_length=2048,
            adapters=adapters,
        )
        sizes[name] = saved(bills(job)[2]) / 2048 / 4096
    assert sizes == pytest.approx({"full": 45.53, "all": 41.59, "q, v": 34.17}, abs=0.01)


def test_quantised_weights_are_of_the_papers_size() -> None:
    """Dettmers et al. 2023, section 3: 0.5 bits of constants a parameter, 0.127 if quantised twice."""
    for double, bits in ((False, 4.5), (True, 4.127)):
        adapters = Adapters(rank=16, quantize="nf4", double=double)
        job = job_of(ModelSpec.from_catalog("llama-2-7b"), "1xA100", framework="hf", adapters=adapters)
        embedding, _, block, head = bills(job)
        bytes_of = {term.name: term.unit for term in block.by_role[Role.PARAMETER]}
        assert bytes_of["gate weight"] * 8 == pytest.approx(bits, abs=1e-3)
        assert bytes_of["norm weights"] == 2
        assert [t.unit for layer in (embedding, head) for t in layer.by_role[Role.PARAMETER]] == [2, 2, 2]


def test_quantised_products_make_one_weight_at_a_time() -> None:
    """In the compute precision: as large as the largest product of a step."""
    plain, packed = (
        price(
            job_of(
                llama(),
                "1xA100",
                framework="hf",
                precision="pure-bf16",
                seq_length=64,
                adapters=Adapters(rank=4, quantize=quantize),
            ),
            Layout(),
        )
        for quantize in (None, "nf4")
    )
    for step in map(IN_LAYERS["block"].index, ("down", "up")):
        more = packed.blocks[0].walk[step].passing - plain.blocks[0].walk[step].passing
        assert float(more) == 2 * 256 * 768


def test_frozen_products_make_no_gradient_of_their_weight() -> None:
    job = job_of(llama(), "1xA100", framework="hf", precision="pure-bf16", adapters=Adapters(rank=4))
    units = {term.name: term.unit for term in bills(job)[2].by_role[Role.FLOPS]}
    assert {units[name] for name in ("query weight", "gate weight", "down weight")} == {4.0}
    assert {unit for name, unit in units.items() if name.startswith("adapter")} == {6.0}
    prices = price(job, Layout())
    block, plain = prices.layers[1], strategies_of(prices.layout, prices.wire)[:-1]
    product = next(t for t in block.by_role[Role.FLOPS] if t.name == "down weight")
    forward, inputs, weights = prices.compute.seconds(block, product, plain)
    assert weights == 0
    assert forward > 0 < inputs


def test_model_flops_are_two_thirds_of_full_training_as_rank_goes_to_nothing() -> None:
    """NVIDIA's recipes multiply the MFU of LoRA by 2/3 (dgxc-benchmarking, ft_llama3)."""
    model = ModelSpec.from_catalog("llama-2-70b")
    full = job_of(model, "8xH100", framework="fsdp", seq_length=1).flops_per_token
    thin = job_of(model, "8xH100", framework="fsdp", seq_length=1, adapters=Adapters(rank=1)).flops_per_token
    assert thin / full == pytest.approx(2 / 3, rel=2e-3)
    assert full == model.flops_per_token(1)


def test_megatron_bridge_cuts_both_matrices_of_an_adapter() -> None:
    """peft/utils.py, ParallelLinearAdapter: A by its rank or its input, B by its output."""
    job = job_of(llama(kv=8), "8xH100", adapters=Adapters(rank=16))
    builder = Builder(job.model, job.training, job.stack, job.recipe, 1, 2)
    *strategies, _ = strategies_of(Layout(tensor_parallel=2), Wire())
    adapters = [t for t in builder.block().by_role[Role.OPTIMIZER]]
    assert [t.name for t in adapters if "A" in t.name] == [
        "adapter A of q-k-v",
        "adapter A of o",
        "adapter A of gate-up",
        "adapter A of down",
    ]
    assert all(held(term, strategies) * 2 == term.amount for term in adapters)


def test_adapters_of_megatron_bridge_keep_gathered_inputs() -> None:
    """Sequence parallelism cuts the residual stream, not what adapters of q, k, v and of gate, up read."""
    job = job_of(llama(kv=8), "8xH100", seq_length=128, adapters=Adapters(rank=16))
    layout = Layout(tensor_parallel=4, sequence_parallel=True)
    builder = Builder(job.model, job.training, job.stack, job.recipe, 1, 4)
    *strategies, _ = strategies_of(layout, Wire())
    kept = {t.name: held(t, strategies) for t in builder.block().by_role[Role.ACTIVATION]}
    assert kept["input of q-k-v's adapter"] == kept["input of gate-up's adapter"] == 2 * 128 * 256
    assert kept["input of down's adapter"] == 2 * 128 * 768 / 4
    assert "attention input (norm output)" not in kept


def test_rank_must_divide_over_a_tensor_parallel_group() -> None:
    with pytest.raises(InputError, match="does not divide rank=6: use 1, 2, 3 or 6"):
        estimate(
            llama(kv=8),
            ClusterSpec.parse("4xH100"),
            TrainingSpec(seq_length=128, global_batch_size=1, adapters=Adapters(rank=6)),
            Layout(tensor_parallel=4),
        )


@pytest.mark.parametrize("framework", ["fsdp", "deepspeed"])
def test_only_adapters_are_reduced_and_everything_is_gathered(framework: str) -> None:
    """ZeRO-3 and FSDP: whole weights twice a micro-batch, gradients of adapters alone."""
    job = job_of(llama(), "8xA100", framework=framework, adapters=Adapters(rank=4))
    sharding = {"fsdp": "fsdp", "deepspeed": "zero3"}[framework]
    prices = price(job, Layout(data_parallel=8, sharding=sharding))
    data = strategies_of(prices.layout, prices.wire)[0]
    sent = list(data.collectives(prices.layers[1], lambda term: term.amount))
    sizes = {kind: max(c.size for c in sent if c.kind == kind) for kind in ("all_gather", "reduce_scatter")}
    block = prices.layers[1]
    frozen = sum(t.elements for t in block.by_role[Role.PARAMETER] if "adapter" not in t.name)
    adapters = sum(t.elements for t in block.trained)
    assert sizes["all_gather"] == 2 * (frozen + adapters)
    assert sizes["reduce_scatter"] == adapters * prices.wire.reduce_bytes


def test_quantised_weights_are_gathered_as_they_are_stored() -> None:
    """fsdp_qlora and torchtune's NF4Tensor shard and send the packed weights."""
    job = job_of(
        llama(), "8xA100", framework="fsdp", precision="pure-bf16", adapters=Adapters(rank=4, quantize="nf4")
    )
    prices = price(job, Layout(data_parallel=8, sharding="fsdp"))
    data = strategies_of(prices.layout, prices.wire)[0]
    sent = next(c for c in data.collectives(prices.layers[1], lambda t: t.amount) if c.kind == "all_gather")
    assert sent.size == sum(t.amount for t in prices.layers[1].by_role[Role.PARAMETER])


def test_frozen_embeddings_keep_neither_gradients_nor_what_is_below_the_blocks() -> None:
    model = llama(tie_word_embeddings=True)
    jobs = [
        job_of(model, "1xA100", framework="hf", precision="pure-bf16", frozen=Frozen(embeddings=frozen))
        for frozen in (False, True)
    ]
    trained, frozen = (price(job, Layout()) for job in jobs)
    assert trained.embedding.states[Role.GRADIENT] > 0
    assert frozen.embedding.states[Role.GRADIENT] == 0
    assert frozen.blocks[0].states == trained.blocks[0].states
    assert jobs[0].trained_parameters - jobs[1].trained_parameters == model.vocab_size * model.hidden_size
    assert jobs[0].flops_per_token - jobs[1].flops_per_token == 2 * model.vocab_size * model.hidden_size
    assert frozen.head.saved < trained.head.saved  # a tied head makes no gradient of its weight


REFUSED = {
    "frozen blocks in megatron": ({"frozen": Frozen(embeddings=True, blocks=2)}, "use --framework hf"),
    "frozen embeddings in megatron": ({"frozen": Frozen(embeddings=True)}, "use --framework hf"),
    "torchtitan": ({"framework": "torchtitan", "adapters": Adapters(rank=8)}, "adapts every Linear"),
    "dora in megatron": ({"adapters": Adapters(rank=8, dora=True)}, "plan LoRA of the same rank"),
    "dora in 4 bits": (
        {"framework": "hf", "adapters": Adapters(rank=8, dora=True, quantize="nf4")},
        "without --quantize",
    ),
    "4 bits in megatron": ({"adapters": Adapters(rank=8, quantize="nf4")}, "use --framework fsdp"),
    "half of a fused product": ({"adapters": Adapters(rank=8, targets=("q", "v"))}, "target all of them"),
    "compiled": (
        {"framework": "hf", "options": {"compile": "on"}, "adapters": Adapters(rank=8)},
        "use compile=off",
    ),
    "Megatron-DeepSpeed": (
        {"framework": "deepspeed", "options": {"kernels": "megatron"}, "adapters": Adapters(rank=8)},
        "use kernels=hf",
    ),
    "a type beside autocast": (
        {"framework": "hf", "precision": "bf16", "adapters": Adapters(rank=8, dtype="bf16")},
        "precision=pure-bf16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_modelled_is_refused_with_the_nearest_fix(name: str) -> None:
    training, fix = REFUSED[name]
    with pytest.raises(InputError, match=fix):
        job_of(llama(), "1xA100", **{"seq_length": 64, **training})


def test_adapters_are_read_from_text() -> None:
    assert read("16", None) == {"rank": "16"}
    given = Adapters(**read("rank=8,targets=attention+down,dropout=0.05,double", "NF4") or {})
    assert given == Adapters(rank=8, targets=("attention", "down"), dropout=0.05, quantize="nf4", double=True)
    for text, quantize in (("rank=8,alpha=3", None), ("8,8", None), (None, "nf4")):
        with pytest.raises(InputError):
            read(text, quantize)
    with pytest.raises(ValueError, match="no product of a block"):
        Adapters(rank=8, targets=("wq",))


def test_a_70b_model_is_tuned_on_eight_gpus_in_4_bits() -> None:
    """The plan says how many parameters are trained; frozen in 16 bits they would be a third of each GPU."""
    model, cluster = ModelSpec.from_catalog("llama-2-70b"), ClusterSpec.parse("8x80G")
    training = TrainingSpec(framework="fsdp", adapters=Adapters(rank=16, quantize="nf4"))
    plan = search(model, cluster, training, top=1)[0]
    assert plan.fits
    assert plan.num_trained_parameters == 207_093_760
    assert any("207,093,760 of" in note for note in plan.assumptions)
    assert plan.stages[0].components["parameters"] < 6 * 2**30


def test_measured_runs_with_adapters() -> None:
    """Every run of the corpus whose settings are known, in the counter that it read."""
    errors = []
    for run in RUNS.values():
        if run.adapters is None or run.needs or run.measured is None:
            continue
        found = predict(run)
        assert not isinstance(found, str)
        stage = found.stages[0]
        size = stage.tensors if run.measured.kind == "allocated" else stage.reserved
        errors.append(abs(size / 2**30 / run.measured.gib - 1))
    assert len(errors) == 42
    assert median(errors) < 0.06
    assert max(errors) < 0.22


def test_runs_with_adapters_that_failed_are_not_called_fitting() -> None:
    """Among them Qwen-72B without ZeRO-3, and Falcon-40B in 4 bits on 40 GB."""
    failed = [run for run in RUNS.values() if run.adapters and run.kind == "oom" and not run.needs]
    assert len(failed) == 4
    for run in failed:
        found = predict(run)
        assert not isinstance(found, str)
        assert found.verdict == "does not fit"


def test_step_times_of_measured_runs_with_adapters() -> None:
    """Within a tenth where the GPU is the limit; up to 40 % too long where the host is: short sequences."""
    for row in STEPS:
        run = RUNS[row["run"]]
        found = predict_step(run)
        assert not isinstance(found, str)
        assert run.seq is not None
        error = found / row["step_s"] - 1
        assert -0.01 < error < (0.10 if run.seq >= 2048 else 0.40)


def test_more_rank_costs_more() -> None:
    peaks = []
    for rank in (8, 64, 512):
        job = job_of(llama(), "1xA100", framework="hf", seq_length=64, adapters=Adapters(rank=rank))
        peaks.append(highest(price(job, Layout())))
    assert all(low < high for low, high in pairwise(peaks))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--freeze blocks", "use --freeze embeddings"),
        ("--lora 0", "--lora rank '0'"),
        ("--lora 8 --quantize int8", "--quantize 'int8': Input should be 'nf4'"),
        ("--quantize nf4", "add --lora"),
    ],
)
def test_the_command_line_names_the_option_that_is_wrong(options: str, says: str) -> None:
    result = CliRunner().invoke(
        app, ["estimate", "--model", "llama-2-7b", "--gpus", "1x80G", "--framework", "hf", *options.split()]
    )
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
