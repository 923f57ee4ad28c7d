"""Frozen blocks: against traces of transformers' models, and what must hold for all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import ClusterSpec, ModelSpec, TrainingSpec, estimate, search
from planner.adapters import Adapters, Frozen
from planner.best_first import exhaustive, find
from planner.defaults import Job, resolve
from planner.errors import InputError
from planner.families import model_from_config
from planner.frozen import above, blocks_of, read
from planner.layers import Builder
from planner.layouts import Choices, enumerate_layouts
from planner.ledger import messages, tensor_entries, view
from planner.model import Block
from planner.program import cost_of, solve
from planner.replay import StageReplay
from planner.stacks import STACKS
from planner.stacks.base import UNTIL_FULL, Row
from planner.stages import Prices, price
from planner.steps import STEPS
from strategies.base import Layer, Role
from strategies.layout import Layout, collectives_of, strategies_of
from tests.helpers import gpt, job_of, llama, saved
from tests.planner.cases import cases, splits
from tests.planner.test_program import compositions

ROWS = json.loads((Path(__file__).parents[1] / "data" / "traced_frozen.json").read_text())["rows"]


def traced(row: dict[str, Any]) -> Job:
    return job_of(
        model_from_config(row["config"], "traced/config.json"),
        f"{row['gpus']}xA100",
        framework=row["stack"],
        precision=row["precision"],
        attention="sdpa",
        seq_length=row["s"],
        global_batch_size=row["b"] * row["gpus"],
        frozen=Frozen(embeddings=True, blocks=row["frozen"]),
    )


def priced(row: dict[str, Any]) -> Prices:
    layout = Layout(micro_batch_size=row["b"])
    if row["gpus"] > 1:
        shards = {"data_parallel": row["gpus"], "data_shards": row["gpus"], "sharding": "fsdp"}
        layout = replace(layout, reshard_after_forward=row["reshard"], **shards)
    return price(traced(row), layout, (row["recompute"],))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_bytes_that_a_model_keeps_above_frozen_blocks(row: dict[str, Any]) -> None:
    """All but the cos and sin of the rotary embedding and the inputs, 139 KB: within 0.25 %."""
    job = traced(row)
    layers = Builder(job.model, job.training, job.stack, job.recipe, row["b"]).layers()
    ours = sum(saved(layer, policy=row["recompute"]) * layer.count for layer in layers)
    assert 0 <= row["saved"] - ours < 300_000
    assert ours == pytest.approx(row["saved"], rel=0.0025)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_states_and_peak_of_a_model_with_frozen_blocks(row: dict[str, Any]) -> None:
    """Peaks within 0.12 %, on one GPU and in FSDP2; states but for counters and rounding."""
    prices = priced(row)
    layers = [prices.embedding, *prices.blocks, prices.head]
    counts = [1, *(layer.count for layer in prices.layers[1:-1]), 1]
    for role, name in (
        (Role.PARAMETER, "weights"),
        (Role.GRADIENT, "gradients"),
        (Role.OPTIMIZER, "optimizer"),
    ):
        ours = sum(n * float(one.states[role]) for one, n in zip(layers, counts, strict=True))
        assert ours == pytest.approx(row[name], rel=2e-3)
    rows = prices.spread().under_one([int(prices.rows)])
    highest = max(size for _, size in StageReplay(prices, 0, rows).run().snapshots)
    assert highest == pytest.approx(row["peak"], rel=1.2e-3)


# --- What holds for all of them -------------------------------------------------------------------


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Job, Layout]:
    """A job with frozen blocks, frozen embeddings or adapters, and a layout of it without a pipeline."""
    case = draw(cases(("fsdp", "deepspeed", "hf")))
    stack = STACKS[case.training.framework]
    options = {
        name: value
        for name, value in case.training.options.items()
        if name in stack.sizes
        or (value in stack.options.get(name, ()) and name not in ("compile", "kernels"))
    }
    model, what = case.model, draw(st.sampled_from(["blocks", "embeddings", "adapters"]))
    if what == "adapters":
        model = model.model_copy(update={"mixers": (), "sliding_window": None})
        chosen: dict[str, Any] = {"adapters": Adapters(rank=draw(st.integers(1, 16)))}
    else:
        most = model.num_hidden_layers - 1 if what == "blocks" else 0
        chosen = {"frozen": Frozen(embeddings=True, blocks=draw(st.integers(min(1, most), most)))}
    training = case.training.model_copy(update={"options": options, **chosen})
    layout = replace(case.layout, pipeline_parallel=1, chunks=1, schedule="1f1b")
    return resolve(model, case.cluster, training), layout


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_the_closed_form_covers_every_snapshot_and_the_ledger_adds_up(data: st.DataObject) -> None:
    job, layout = data.draw(jobs())
    prices = price(job, layout)
    candidate = prices.spread()
    rows = data.draw(splits(candidate))
    for index, own in enumerate(rows):
        timeline = StageReplay(prices, index, rows).run()
        closed, _ = candidate.peak(index, own)
        assert closed >= timeline.pools * (1 - 1e-9)
        stage = view(prices, rows, index)
        for snapshot, size in timeline.peaks().values():
            assert timeline.pools >= size * (1 - 1e-9)
            assert sum(one.held for one in tensor_entries(prices, stage, snapshot)) == pytest.approx(size)


@given(jobs())
@settings(deadline=None, max_examples=40)
def test_freezing_never_costs_anything(given: tuple[Job, Layout]) -> None:
    """Neither bytes nor seconds: one more block frozen, of whatever job without adapters."""
    job, layout = given
    frozen = job.training.frozen
    if job.training.adapters or frozen.blocks + 1 >= job.model.num_hidden_layers:
        return
    more = job.training.model_copy(update={"frozen": frozen.model_copy(update={"blocks": frozen.blocks + 1})})
    peaks, seconds = [], []
    for one in (job, resolve(job.model, job.cluster, more)):
        candidate = price(one, layout, ("none",)).spread()
        rows = candidate.under_one([candidate.rows])
        peaks.append(candidate.peak(0, rows[0])[0])
        seconds.append(candidate.cost(rows))
    assert peaks[1] <= peaks[0] * (1 + 1e-12)
    assert seconds[1] <= seconds[0] * (1 + 1e-12)


SMALL: list[dict[str, Any]] = [
    {"frozen": Frozen(embeddings=True, blocks=2)},
    {"adapters": Adapters(rank=8)},
]


@pytest.mark.parametrize("objective", ["time", "headroom"])
@pytest.mark.parametrize("chosen", SMALL, ids=["blocks", "adapters"])
def test_the_search_equals_brute_force(chosen: dict[str, Any], objective: str) -> None:
    """Over all layouts of four GPUs, micro-batches and policies, at budgets that bind."""
    model = llama(5, 1024, 8, 8, vocab_size=32000)
    solved = 0
    for budget in (2.0, 2.6, 3.2, 4.0, 20.0):
        job = job_of(
            model,
            "4xA100",
            framework="fsdp",
            seq_length=4096,
            global_batch_size=8,
            attention="sdpa",
            **chosen,
        )
        cluster = job.cluster.model_copy(update={"budget_bytes": int(budget * 2**30)})
        job = replace(job, cluster=cluster)
        choices = Choices(micro_batch_size=(1, 2))
        candidates = []
        for family in enumerate_layouts(job, choices).families:
            prices = price(job, family)
            candidates += [prices.take(i).spread() for i in range(len(family.data_parallel))]
        expected = min(min_cost(one, objective) for one in candidates)
        found = find(job, choices, objective, top=1).answers
        if expected == float("inf"):
            assert not found
            continue
        solved += 1
        joint = solve(candidates, objective)
        assert joint is not None
        assert joint.cost == pytest.approx(expected, rel=1e-5)
        assert found[0].cost == pytest.approx(expected, rel=1e-5)
        assert exhaustive(job, choices, objective, 1)[0].cost == pytest.approx(expected, rel=1e-5)
    assert solved >= 2


def min_cost(candidate: Any, objective: str) -> float:
    """Brute force over the policies of one stage's rows, kind by kind."""
    several, best = len(candidate.policies), float("inf")
    for parts in product(*(compositions(n, several) for n in candidate.order.counts)):
        rows = [tuple(n for part in parts for n in part)]
        if candidate.peak(0, rows[0])[0] <= candidate.capacity:
            best = min(best, cost_of(candidate, rows, objective))
    return best


# --- One block --------------------------------------------------------------------------------------


def kinds(**chosen: Any) -> list[Layer]:
    """Frozen, lowest and other block of a job."""
    job = job_of(llama(), "1xA100", framework="hf", seq_length=64, **chosen)
    return Builder(job.model, job.training, job.stack, job.recipe).layers()[1:-1]


def test_a_frozen_block_is_its_weights_and_a_forward() -> None:
    frozen, lowest, other = kinds(frozen=Frozen(embeddings=True, blocks=1))
    assert [one.count for one in (frozen, lowest, other)] == [1, 1, 2]
    assert [one.backward for one in (frozen, lowest, other)] == [False, True, True]
    assert frozen.by_role[Role.PARAMETER] == other.by_role[Role.PARAMETER]  # as they are stored
    for role in (Role.GRADIENT, Role.OPTIMIZER, Role.ACTIVATION, Role.TRANSIENT):
        assert not frozen.by_role[role]
    products = [[t for t in one.by_role[Role.FLOPS] if "seq_k" not in t.dims] for one in (frozen, other)]
    assert sum(t.amount for t in products[0]) * 3 == sum(t.amount for t in products[1])


def test_a_frozen_block_takes_the_forwards_seconds() -> None:
    job = job_of(
        llama(8, 2048, 16, 16),
        "1xA100",
        framework="hf",
        seq_length=2048,
        frozen=Frozen(embeddings=True, blocks=3),
    )
    frozen, _, other = price(job, Layout()).blocks
    assert float(frozen.inputs) == float(frozen.weights) == 0
    assert float(frozen.forward) == pytest.approx(float(other.forward), rel=1e-12)
    assert float(frozen.seconds) < float(other.seconds) * 0.4


def test_the_lowest_block_keeps_less_of_its_first_norm() -> None:
    """An RMSNorm's fp32 input and statistics: 4 bytes an element of the residual stream, and 4 a token."""
    _, lowest, other = kinds(frozen=Frozen(embeddings=True, blocks=1), precision="pure-bf16")
    assert saved(other) - saved(lowest) == 64 * (4 * 256 + 4)
    assert saved(lowest, policy="full") == saved(other, policy="full")


def test_layer_norms_keep_their_input_for_their_own_weight() -> None:
    """native_layer_norm saves it as a whole: without adapters the lowest block is like any other."""
    training = TrainingSpec(framework="hf", frozen=Frozen(embeddings=True, blocks=2))
    assert blocks_of(gpt(4, 256, 4), training) == (*[Block(trained="none")] * 2, *[Block()] * 2)
    tuned = TrainingSpec(framework="hf", adapters=Adapters(rank=4))
    assert blocks_of(gpt(4, 256, 4), tuned)[0] == Block(trained="lowest")


def test_what_the_lowest_block_leaves_out_is_there_while_it_is_at_work() -> None:
    row = Row("norm inputs", "batch seq residual", 2, kept_by=UNTIL_FULL, steps="norm1 norm2")
    kept, again = above([row], "qkv")
    assert (kept.count, kept.steps, kept.kept_by) == (1, "norm2", UNTIL_FULL)
    assert (again.role, again.count, again.steps) == (
        Role.TRANSIENT,
        len(STEPS["block"]),
        " ".join(STEPS["block"]),
    )


@pytest.mark.parametrize(("framework", "sharding"), [("fsdp", "fsdp"), ("deepspeed", "zero3")])
def test_a_frozen_block_is_gathered_once_and_sends_no_gradients(framework: str, sharding: str) -> None:
    job = job_of(
        llama(), "8xA100", framework=framework, seq_length=64, frozen=Frozen(embeddings=True, blocks=2)
    )
    prices = price(job, Layout(data_parallel=8, data_shards=8, sharding=sharding))
    *strategies, _ = strategies_of(prices.layout, prices.wire)
    frozen, _, other = prices.layers[1:-1]
    sent = [
        [
            (c.kind, c.way)
            for c in collectives_of(one, strategies)
            if c.axis in ("data", "data_shard") and c.size
        ]
        for one in (frozen, other)
    ]
    assert sent[0] == [("all_gather", "forward")]
    assert sorted(sent[1]) == [
        ("all_gather", "backward"),
        ("all_gather", "forward"),
        ("reduce_scatter", "backward"),
    ]
    rows = prices.spread().under_one([4])
    listed = [m for m in messages(prices, view(prices, rows, 0)) if m.layer == "frozen block"]
    assert [(m.kind, m.count) for m in listed if m.size] == [("all_gather", 2)]


def test_model_flops_of_frozen_blocks_are_a_third() -> None:
    """6 N + 12 L s a d of the blocks that are trained, 2 N + 4 L s a d of the others, the head whole."""
    model = llama(4, vocab_size=1024)
    whole, frozen = (
        job_of(model, "1xA100", framework="hf", seq_length=64, frozen=one)
        for one in (Frozen(), Frozen(embeddings=True, blocks=3))
    )
    blocks = whole.flops_per_token - 6 * 1024 * 256
    assert frozen.flops_per_token == pytest.approx(6 * 1024 * 256 + blocks * (1 / 4 + 3 / 4 / 3))
    assert frozen.attention_flops_per_token == pytest.approx(whole.attention_flops_per_token / 2)
    per_block = (model.num_parameters - 2 * 1024 * 256 - 256) // 4
    assert frozen.trained_parameters == per_block + 1024 * 256 + 256


def test_a_plan_says_what_is_frozen_and_fits_where_full_training_does_not() -> None:
    model, cluster = ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse("8x40G")
    whole, frozen = (
        search(model, cluster, TrainingSpec(framework="fsdp", seq_length=4096, frozen=one), top=1)
        for one in (Frozen(embeddings=True), Frozen(embeddings=True, blocks=24))
    )
    assert frozen[0].num_trained_parameters < whole[0].num_trained_parameters / 2
    assert frozen[0].step_time_s < whole[0].step_time_s
    assert any("the first 24 of 32 blocks are frozen" in note for note in frozen[0].assumptions)


REFUSED = {
    "below trained embeddings": ({"frozen": Frozen(blocks=2)}, "--freeze blocks=2"),
    "all of them": ({"frozen": Frozen(embeddings=True, blocks=4)}, "use 3 or less"),
    "beside adapters": (
        {"frozen": Frozen(embeddings=True, blocks=2), "adapters": Adapters(rank=8)},
        "leave --freeze out",
    ),
    "torchtitan": (
        {"frozen": Frozen(embeddings=True, blocks=2), "framework": "torchtitan"},
        "use --framework",
    ),
    "compiled": ({"frozen": Frozen(embeddings=True, blocks=2), "options": {"compile": "on"}}, "compile=off"),
    "Megatron-DeepSpeed": (
        {
            "frozen": Frozen(embeddings=True, blocks=2),
            "framework": "deepspeed",
            "options": {"kernels": "megatron"},
        },
        "kernels=hf",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_modelled_is_refused_with_the_nearest_fix(name: str) -> None:
    training, fix = REFUSED[name]
    with pytest.raises(InputError, match=fix):
        job_of(llama(), "1xA100", **{"framework": "hf", "seq_length": 64, **training})


def test_recompute_above_frozen_blocks_is_refused_by_name() -> None:
    training = TrainingSpec(
        framework="hf", seq_length=64, global_batch_size=1, frozen=Frozen(embeddings=True, blocks=2)
    )
    cluster = ClusterSpec.parse("1xA100")
    with pytest.raises(InputError, match="gradients through frozen blocks too"):
        estimate(llama(), cluster, training, Layout(), recompute="full")
    with pytest.raises(InputError, match="gradients through frozen blocks too"):
        search(llama(), cluster, training, choices=Choices(recompute=("full",)))


def test_what_is_frozen_is_read_from_text() -> None:
    assert read("embeddings") == {"embeddings": True}
    assert read("blocks=8") == read("8") == {"embeddings": True, "blocks": 8}
    for text in ("blocks", "head", "blocks=-1", "embeddings=2"):
        with pytest.raises(InputError, match="blocks=8 for the first 8"):
            read(text)
