"""A step gone through layer by layer, against the search's closed form, the ledger, and the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.ledger import tensor_entries, view
from planner.order import Order, Turn
from planner.replay import Snapshot, StageReplay, Timeline
from planner.stages import Prices, price
from strategies.layout import Layout
from strategies.pipeline_parallel import PipelineParallel
from tests.helpers import gpt, job_of, llama
from tests.planner.cases import cases, splits


def test_memory_may_be_highest_where_a_backward_turns_to_another_kind_of_layer() -> None:
    """Recomputed windows hold more with their gradients than before, full layers that were kept less."""
    mixers = ("full",) * 3 + ("window",) * 3
    model = llama(6, 40, 1, 1, head_dim=8, intermediate_size=24, vocab_size=17, sliding_window=64)
    model = model.model_copy(update={"mixers": mixers})
    job = job_of(model, "1xH100", framework="fsdp", seq_length=24, global_batch_size=1)
    prices, rows = price(job, Layout()), (3, 0, 0, 3)
    timeline = StageReplay(prices, 0, (rows,)).run()
    place, highest = max(timeline.snapshots, key=lambda one: one[1])
    assert (place.moment, place.arrived) == ("backward", (0, 2))
    assert prices.spread().peak(0, rows) == (highest, "backward")


def test_turns_are_where_kinds_follow_each_other_from_the_last_layer_back() -> None:
    order = Order(((0,), (1,), (2,)), (0, 0, 1, 1, 1, 2))
    assert order.turns == [Turn((0.0, 0.0, 1.0), 2, 1), Turn((0.0, 1.0, 1.0), 1, 0)]
    assert Order().whole(8).turns == []


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_the_closed_form_covers_the_pools_and_the_pools_every_snapshot(data: st.DataObject) -> None:
    case = data.draw(cases())
    prices = price(case.job, case.layout)
    candidate = prices.spread()
    rows = data.draw(splits(candidate))
    for index, own in enumerate(rows):
        timeline = StageReplay(prices, index, rows).run()
        closed, moment = candidate.peak(index, own)
        highest = max(size for _, size in timeline.snapshots)
        assert closed >= timeline.pools * (1 - 1e-9), (index, moment)
        assert timeline.pools >= highest * (1 - 1e-9), index
        if case.layout.sharding != "fsdp" and not prices.apart:  # one stream, one pool
            assert timeline.pools == pytest.approx(highest, rel=1e-12)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_the_ledger_of_a_snapshot_sums_to_its_bytes(data: st.DataObject) -> None:
    case = data.draw(cases())
    prices = price(case.job, case.layout)
    candidate = prices.spread()
    rows = data.draw(splits(candidate))
    for index in range(len(rows)):
        stage = view(prices, rows, index)
        for moment, (snapshot, size) in StageReplay(prices, index, rows).run().peaks().items():
            held = sum(one.held for one in tensor_entries(prices, stage, snapshot))
            assert held == pytest.approx(size, rel=1e-9), (index, moment)


def prices_of(layout: Layout, layers: int = 4, framework: str = "megatron", **options: str) -> Prices:
    model = llama(layers, 1024, 8, 8, vocab_size=32000)
    batch = layout.global_batch_size
    gpus = f"{layout.world_size}xA100"
    job = job_of(model, gpus, framework=framework, seq_length=512, global_batch_size=batch, options=options)
    return price(job, layout)


def run(prices: Prices, rows: Sequence[int], stage: int = 0) -> Timeline:
    depth = int(prices.layout.pipeline_parallel)
    return StageReplay(prices, stage, [rows] * depth).run()


def snapshots(timeline: Timeline) -> list[Snapshot]:
    return [snapshot for snapshot, _ in timeline.snapshots]


SCHEDULES = [("1f1b", 1, 2), ("1f1b", 1, 9), ("gpipe", 1, 9), ("interleaved", 2, 8), ("interleaved", 3, 16)]


@pytest.mark.parametrize(("schedule", "chunks", "micro_batches"), SCHEDULES)
def test_a_stage_holds_what_the_formula_says(schedule: str, chunks: int, micro_batches: int) -> None:
    """Passes in flight, counted on the replayed order; the head's never wait, but in GPipe's."""
    depth = 4
    layout = Layout(
        pipeline_parallel=depth, chunks=chunks, grad_accum=micro_batches, sharding="ddp", schedule=schedule
    )
    prices = prices_of(layout, layers=2 * depth * chunks)
    for stage in range(depth):
        seen = snapshots(run(prices, (2, 0, 0), stage))
        pipeline = PipelineParallel(depth, stage, micro_batches, chunks, schedule)
        assert max(sum(one.kept) for one in seen) == 2 * pipeline.in_flight
        held = pipeline.first_chunk_in_flight if stage == 0 else 0
        assert max(one.embeddings for one in seen) == held
        waiting = micro_batches if schedule == "gpipe" else 1
        assert max(one.heads for one in seen) == (waiting if stage == depth - 1 else 0)


def test_a_backward_takes_activations_away_and_brings_gradients() -> None:
    """One GPU, one micro-batch, four layers, plain first: those that recompute run backward last."""
    seen = snapshots(run(prices_of(Layout(), framework="hf"), (3, 1)))
    backward = [one for one in seen if one.at == "block"]
    assert [one.kept for one in backward] == [(3, 1), (2, 1), (1, 1), (0, 1)]
    assert [one.arrived for one in backward] == [(0,), (1,), (2,), (3,)]
    assert [one.block for one in backward] == [0, 0, 0, 1]
    assert [one.place for one in backward] == ["first", "inner", "inner", "last"]
    assert [one.moment for one in backward] == ["backward"] * 3 + ["gradients complete"]
    assert seen[-1].moment == "optimizer step"
    assert seen[-1].arrived == (4,)
    assert not sum(seen[-1].kept)


def test_a_step_of_ddp_on_one_gpu_rises_and_falls_by_what_comes_and_goes() -> None:
    """Between two layers' backwards: one layer's activations less, its gradients more."""
    prices = prices_of(Layout(), framework="hf")
    sizes = [size for one, size in run(prices, (4, 0)).snapshots if one.at == "block"]
    block = 4 * 1024**2 + 3 * 1024 * 3072 + 2 * 1024
    change = 4 * block - float(prices.plain.saved)
    assert [b - a for a, b in pairwise(sizes)] == pytest.approx([change] * 3)


def test_each_stream_keeps_a_pool_of_its_own_as_large_as_it_ever_was() -> None:
    """fully_shard: gathers and reduced gradients are allocated on streams of their own."""
    layout = Layout(data_parallel=8, sharding="fsdp")
    prices = prices_of(layout, layers=8, framework="torchtitan")
    replay = StageReplay(prices, 0, [(8, 0, 0)])
    timeline = replay.run()
    streams = [replay.pools(one) for one in snapshots(timeline)]
    compute, gather, reduce = (max(sizes) for sizes in zip(*streams, strict=True))
    # The pool of the gathers is that of the head: its all-gather's output, before it is copied.
    head = (32000 * 1024 + 1024) * 2
    assert timeline.pools == compute + max(gather, head) + reduce
    # All shards of fp32 gradients are there in the end.
    assert reduce == pytest.approx(prices.job.model.num_parameters * 4 / 8)
    assert timeline.pools > max(size for _, size in timeline.snapshots)


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_keeps_parameters_gathered_from_the_forward_to_their_backward(reshard: bool) -> None:
    layout = Layout(data_parallel=8, sharding="fsdp", reshard_after_forward=reshard)
    prices = prices_of(layout, framework="torchtitan")
    block = 4 * 1024**2 + 3 * 1024 * 3072 + 2 * 1024
    assert float(prices.plain.gathered) == (0 if reshard else 2 * block)
    seen = snapshots(run(prices, (4, 0, 0)))
    assert [one.gathered for one in seen if one.at == "block"] == [(4,), (3,), (2,), (1,)]
    assert not sum(seen[-1].gathered)


@pytest.mark.parametrize("framework", ["fsdp", "torchtitan"])
def test_units_kept_gathered_count_to_the_last_reduction(framework: str) -> None:
    """A vocabulary that dwarfs the layers: what is largest lies at the end of the backward."""
    layout = Layout(data_parallel=8, grad_accum=2, sharding="fsdp", reshard_after_forward=False)
    model = llama(1, 64, 4, 4, vocab_size=100_000)
    job = job_of(model, "8xA100", framework=framework, seq_length=8, global_batch_size=16)
    prices = price(job, layout)
    rows = (1,) + (0,) * (len(prices.policies) - 1)
    closed, moment = prices.spread().peak(0, rows)
    pools = run(prices, rows).pools
    assert moment == "gradients complete"
    assert pools <= closed <= pools * 1.001


def test_gpipes_heads_wait_through_the_backward_of_the_others() -> None:
    """At the end of the first backward, where ZeRO-2 has the embedding's gradients whole."""
    layout = Layout(data_parallel=2, grad_accum=6, sharding="zero2", schedule="gpipe")
    job = job_of(gpt(1, 64, 4, vocab=128, seq=8192), "2xA100", seq_length=24, global_batch_size=12)
    prices = price(job, layout)
    closed, moment = prices.spread().peak(0, (1, 0, 0))
    timeline = run(prices, (1, 0, 0))
    top, _ = max(timeline.snapshots, key=lambda one: one[1])
    assert (top.place, top.heads) == ("end", 5)
    assert moment == top.moment == "gradients complete"
    assert closed == pytest.approx(timeline.pools)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_reduced_on_every_stage(stage: int) -> None:
    """DeepSpeed casts all of a stage's gradients to half precision at once, the last stage's too."""
    model = llama(8, 1024, 8, 8, vocab_size=32000)
    layout = Layout(data_parallel=2, pipeline_parallel=4, grad_accum=4, sharding="zero1")
    job = job_of(
        model,
        "8xA100",
        framework="deepspeed",
        seq_length=512,
        global_batch_size=8,
        gradient_dtype="fp32",
        options={"kernels": "megatron"},
    )
    prices = price(job, layout, ("none",))
    timeline = StageReplay(prices, stage, [(2,)] * 4).run()
    reduced = [size for one, size in timeline.snapshots if one.place == "reduction"]
    before = [size for one, size in timeline.snapshots if one.place == "last"]
    whole = float(prices.buffer_bytes[stage == 0, stage == 3]["reduction"])
    assert whole > 2 * 2 * 12e6
    assert max(reduced) > max(before)
    closed, _ = prices.spread().peak(stage, (2,))
    assert timeline.pools <= closed <= timeline.pools * 1.05
