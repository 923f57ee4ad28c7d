"""Offload: bytes that leave the GPU arrive elsewhere, its budgets, its time, and who runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner import ClusterSpec, ModelSpec, TrainingSpec, estimate, search
from planner.apart import apart, together
from planner.best_first import exhaustive, find
from planner.bounds import quick_bound, sharp_bound, slowest_at_least, tight_bound
from planner.candidate import Candidate
from planner.catalog import host
from planner.defaults import Job, resolve
from planner.errors import InfeasibleError
from planner.layouts import NUMBERS, Choices, enumerate_layouts
from planner.ledger import entries_elsewhere, tensor_entries, view
from planner.offload import HostShare, surely
from planner.offload_choices import menus, offloads
from planner.program import solve
from planner.replay import StageReplay
from planner.stages import Prices, price
from strategies.base import Role
from strategies.layout import Layout
from strategies.offload import PLACES, Way
from tests.helpers import gpt, job_of, llama
from tests.planner.cases import cases, splits

EVERYTHING = ("optimizer", "parameters", "activations", "optimizer:nvme", "parameters:nvme")
FRAMEWORKS = ("megatron", "deepspeed", "fsdp", "torchtitan")


@st.composite
def offloading(draw: st.DrawFn) -> tuple[Job, Layout, tuple[str, ...]]:
    """A job, a layout that offloads something of the whole model or nothing, and ways for its layers."""
    case = draw(cases(frameworks=FRAMEWORKS))
    job = case.job
    job = replace(job, cluster=job.cluster.model_copy(update={"nvme_bytes": 10**13}))
    sharding = draw(st.sampled_from(sorted(job.stack.offloading)))
    data = case.layout.data_parallel
    layout = replace(case.layout, sharding=sharding, data_shards=data, reshard_after_forward=True)
    if sharding not in ("ddp", "zero1"):
        layout = replace(layout, pipeline_parallel=1, chunks=1, schedule="1f1b")
    layout = replace(layout, offload=draw(st.sampled_from(offloads(job, layout, EVERYTHING))))
    return job, layout, draw(st.sampled_from(menus(job, layout, job.stack.policies, EVERYTHING)))


def has_offload(layout: Layout, menu: tuple[str, ...]) -> bool:
    return bool(layout.offload) or any("+" in way for way in menu)


# --- Memory: on the GPU and elsewhere ---------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_the_closed_form_covers_the_pools_and_the_pools_every_snapshot(data: st.DataObject) -> None:
    job, layout, menu = data.draw(offloading())
    prices = price(job, layout, menu)
    candidate = prices.spread()
    rows = data.draw(splits(candidate))
    for index, own in enumerate(rows):
        timeline = StageReplay(prices, index, rows).run()
        closed, moment = candidate.peak(index, own)
        assert closed >= timeline.pools * (1 - 1e-9), (index, moment)
        assert timeline.pools >= max(size for _, size in timeline.snapshots) * (1 - 1e-9), index
        stage = view(prices, rows, index)
        for moment, (snapshot, size) in timeline.peaks().items():
            held = sum(one.held for one in tensor_entries(prices, stage, snapshot))
            assert held == pytest.approx(size, rel=1e-9), (index, moment)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_what_a_stage_has_elsewhere_is_the_sum_of_its_entries(data: st.DataObject) -> None:
    """The program's linear form, without what pinning may add, against the ledger term by term."""
    job, layout, menu = data.draw(offloading())
    assume(has_offload(layout, menu))
    prices = price(job, layout, menu)
    candidate = prices.spread()
    rows = data.draw(splits(candidate))
    for index, own in enumerate(rows):
        most = candidate.held_elsewhere(index, own)
        for place in PLACES:
            held = sum(one.held for one in entries_elsewhere(prices, view(prices, rows, index), place))
            assert most[place] / surely(place) == pytest.approx(held, rel=1e-9), (index, place)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_no_state_is_lost_on_its_way_off_the_gpu(data: st.DataObject) -> None:
    """What a GPU holds less than without any offload lies elsewhere, at least."""
    job, layout, menu = data.draw(offloading())
    assume(has_offload(layout, menu))
    several = len(menu)
    plain = price(job, replace(layout, offload=""), tuple(Way.of(way).recompute for way in menu))
    moved = price(job, layout, menu)
    pairs = zip(
        (plain.embedding, *plain.blocks, plain.head),
        (moved.embedding, *moved.blocks, moved.head),
        strict=True,
    )
    for before, after in pairs:
        less = before.saved - after.saved
        less += sum(before.states[role] - after.states[role] for role in (Role.PARAMETER, Role.OPTIMIZER))
        assert less >= 0
        assert sum(after.elsewhere.values()) >= less * (1 - 1e-12)
    assert len(moved.blocks) == several * (len(moved.layers) - 2)


def test_zero_offload_leaves_two_bytes_a_parameter_on_the_gpu_and_sixteen_on_the_host() -> None:
    """Ren et al. 2021, arXiv:2101.06840, section 4: half-precision weights stay, 16 bytes of fp32 go."""
    model = gpt(4, 1024, 16)
    for data in (1, 4):
        batch = data
        job = job_of(model, f"{data}xV100", framework="deepspeed", seq_length=512, global_batch_size=batch)
        layout = Layout(data_parallel=data, data_shards=data, sharding="zero2", offload="optimizer")
        prices = price(job, layout, ("full",))
        stage = view(prices, [(4,)], 0)
        there = list(entries_elsewhere(prices, stage, "host"))
        states = sum(one.held for one in there if one.component in ("optimizer_states", "gradients"))
        assert states == pytest.approx(16 * model.num_parameters / data)
        plan = estimate(model, job.cluster, job.training, layout, recompute="full")
        components = plan.stages[0].components
        assert components["parameters"] == 2 * model.num_parameters
        assert components["optimizer_states"] == 0


def test_accumulated_gradients_wait_on_the_host_in_half_precision() -> None:
    """DeepSpeed's stage 2 has 2 bytes more a parameter where it accumulates, stage 3 always."""
    model = gpt(4, 1024, 16)

    def bytes_per_parameter(sharding: str, accum: int, offload: str) -> float:
        job = job_of(model, "1xV100", framework="deepspeed", seq_length=512, global_batch_size=accum)
        job = replace(job, cluster=job.cluster.model_copy(update={"nvme_bytes": 10**13}))
        layout = Layout(grad_accum=accum, sharding=sharding, offload=offload)
        prices = price(job, layout, ("full",))
        there = entries_elsewhere(prices, view(prices, [(4,)], 0), "host")
        held = sum(one.held for one in there if one.component != "communication_buffers")
        return held / model.num_parameters

    assert bytes_per_parameter("zero2", 1, "optimizer") == pytest.approx(16)
    assert bytes_per_parameter("zero2", 2, "optimizer") == pytest.approx(18)
    assert bytes_per_parameter("zero3", 1, "optimizer") == pytest.approx(18)
    assert bytes_per_parameter("zero3", 1, "optimizer,parameters") == pytest.approx(20)
    assert bytes_per_parameter("zero3", 1, "optimizer:nvme,parameters") == pytest.approx(4)


def test_each_gpu_has_an_equal_share_of_its_nodes_host() -> None:
    update = {"host_memory_bytes": 8 * 10**11, "host_bytes_per_s": 4e11, "nvme_bytes": 10**13}
    cluster = ClusterSpec.parse("16xA100").model_copy(update=update)
    share = HostShare.of(cluster)
    assert share.capacity == {"host": 1e11, "nvme": 1.25e12}
    assert share.adam == pytest.approx(4e11 * host("adam").value / 8)
    assert HostShare.of(ClusterSpec.parse("72xGB200")).capacity["host"] == 960e9 / 4


def test_offloaded_activations_come_back_one_layer_ahead() -> None:
    """Transformer Engine's double buffer: while one layer runs backward, the next one's are on their way."""
    model = llama(4, 1024, 8, 8, vocab_size=32000)
    job = job_of(model, "1xA100", seq_length=4096, global_batch_size=1)
    plain, moved = price(job, Layout(sharding="zero1"), ("none", "none+activations")).blocks
    assert moved.saved == 0
    assert moved.elsewhere["host"] == plain.saved
    assert plain.working < moved.working <= plain.working + 2 * plain.saved


# --- Time --------------------------------------------------------------------------------------------


def test_cpu_adam_takes_what_was_published() -> None:
    """Ren et al. 2021, arXiv:2101.06840, table 4: 1, 2, 4, 8 and 10 B parameters on a DGX-2's two Xeons."""
    published = {1: 0.22, 2: 0.51, 4: 1.03, 8: 2.41, 10: 2.57}
    cluster = ClusterSpec.parse("1x1xV100").model_copy(update={"host_bytes_per_s": 256e9})
    for billions, seconds in published.items():
        ours = billions * 1e9 * 28 / HostShare.of(cluster).adam
        assert 0.84 <= ours / seconds <= 1.16, billions


def test_an_update_on_the_host_takes_its_bytes_over_the_hosts_share() -> None:
    model = gpt(4, 1024, 16)
    job = job_of(model, "4xV100", framework="deepspeed", seq_length=512, global_batch_size=4)
    for copy, back in (("whole", 4.0), ("tiled", 0.0)):
        training = job.training.model_copy(update={"options": {**job.training.options, "offload_copy": copy}})
        layout = Layout(data_parallel=4, data_shards=4, sharding="zero2", offload="optimizer")
        plan = estimate(model, job.cluster, training, layout)
        own, share = model.num_parameters / 4, HostShare.of(job.cluster)
        expected = own * (28 / share.adam + back / share.link)
        assert plan.stages[0].update_seconds == pytest.approx(expected)


def test_a_slow_link_sets_the_pace_of_a_pass() -> None:
    """Parameters from the host for every pass: no quicker than the link brings them."""
    model = gpt(8, 2048, 16)
    job = job_of(model, "1xV100", framework="deepspeed", seq_length=128, global_batch_size=1)
    gpu = job.cluster.gpu.model_copy(update={"pcie_bytes_per_s": 1e8})
    cluster = job.cluster.model_copy(update={"gpu": gpu})
    layout = Layout(sharding="zero3", offload="optimizer,parameters")
    job = replace(job, cluster=cluster)
    block = price(job, layout, ("none",)).blocks[0]
    weights = 12 * 2048**2 * 2
    assert float(block.forward) == pytest.approx(weights / (1e8 * host("link").value), rel=0.01)


# --- The program -------------------------------------------------------------------------------------


def family_of_one(job: Job, layout: Layout, menu: tuple[str, ...]) -> Prices:
    numbers = {name: np.array([getattr(layout, name)]) for name in NUMBERS}
    return price(job, replace(layout, **numbers), menu)


def all_splits(candidate: Candidate) -> Iterator[tuple[tuple[int, ...], ...]]:
    several = len(candidate.policies)

    def parts(total: int, places: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (total,)
            return
        for first in range(total + 1):
            for rest in parts(total - first, places - 1):
                yield (first, *rest)

    def stages(left: int, count: int) -> Iterator[tuple[tuple[int, ...], ...]]:
        if count == 1:
            for own in parts(left, several):
                yield (own,)
            return
        for here in range(1, left - count + 2):
            for own in parts(here, several):
                for rest in stages(left - here, count - 1):
                    yield (own, *rest)

    yield from stages(candidate.rows, len(candidate.stages))


@given(st.data(), st.floats(0.5, 1.2), st.floats(0.2, 1.2))
@settings(deadline=None, max_examples=100)
def test_the_program_finds_the_best_of_all_splits_and_bounds_stay_below_it(
    data: st.DataObject, part: float, room: float
) -> None:
    """GPUs and hosts that hold a part of what no, and what every, offload needs."""
    job, layout, menu = data.draw(offloading())
    family = family_of_one(job, layout, menu)
    candidate = family.take(0).spread()
    stages, policies = len(candidate.stages), len(candidate.policies)
    assume(len(candidate.order.rows) == 1 and not candidate.mirrored)
    assume(comb(candidate.rows + stages * policies - 1, candidate.rows) <= 5000)
    every = list(all_splits(candidate))
    peaks = [max(candidate.peak(j, own)[0] for j, own in enumerate(rows)) for rows in every]
    rooms = {}
    for place in PLACES:
        needed = [
            max(candidate.held_elsewhere(j, own).get(place, 0.0) for j, own in enumerate(rows))
            for rows in every
        ]
        rooms[place] = room * max(needed) + 1e4
        assume(all(abs(one / rooms[place] - 1) > 1e-4 for one in needed))
    limit = part * max(peaks)
    assume(all(abs(peak / limit - 1) > 1e-4 for peak in peaks))
    candidate = replace(candidate, capacity=limit, rooms=rooms)
    costs = [
        candidate.cost(rows)
        for rows in every
        if candidate.allows(rows) and all(candidate.fits(j, own) for j, own in enumerate(rows))
    ]
    solution = solve([candidate])
    (quick,), _ = quick_bound(family)
    if not costs:
        assert solution is None
        return
    assert solution is not None
    assert solution.cost == pytest.approx(min(costs), rel=2e-6)
    assert all(candidate.fits(j, own) for j, own in enumerate(solution.rows))
    assert candidate.allows(solution.rows)
    assert quick <= min(costs) * (1 + 1e-9)
    least = slowest_at_least(candidate)
    assert sharp_bound(candidate, least) <= min(costs) * (1 + 1e-9)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_no_bound_is_above_what_the_program_finds(data: st.DataObject) -> None:
    job, layout, menu = data.draw(offloading())
    family = family_of_one(job, layout, menu)
    (quick,), _ = quick_bound(family)
    (tight,) = tight_bound(family.take((np.arange(1), None)))
    solution = solve([family.take(0).spread()])
    assert quick <= tight
    if solution is not None:
        assert tight <= solution.cost * (1 + 1e-6)


def test_unlike_rows_that_keep_nothing_on_the_gpu_have_a_bound() -> None:
    mixers = {"mixers": ("full", "window"), "sliding_window": 64, "num_hidden_layers": 2}
    model = ModelSpec.from_catalog("llama-2-7b").model_copy(update=mixers)
    training = TrainingSpec(framework="deepspeed", global_batch_size=1, seq_length=512)
    job = resolve(model, ClusterSpec.parse("1x80G"), training)
    job = replace(job, cluster=job.cluster.model_copy(update={"nvme_bytes": 10**13}))
    layout = Layout(sharding="zero3", data_shards=1, offload="optimizer,parameters")
    family = family_of_one(job, layout, ("none", "full+activations"))
    assert len(family.counts) == 2
    solution = solve([family.take(0).spread()])
    assert solution is not None
    (tight,) = tight_bound(family.take((np.arange(1), None)))
    assert 0 < tight <= solution.cost * (1 + 1e-6)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_rows_counted_apart_come_together_at_the_same_cost_and_bytes(data: st.DataObject) -> None:
    case = data.draw(cases(frameworks=("megatron",), schedules=("1f1b", "gpipe")))
    data_shards = case.layout.data_parallel
    layout = replace(case.layout, sharding="zero1", data_shards=data_shards, reshard_after_forward=True)
    menu = ("none", "selective", "full")
    ways = (*menu, *(f"{policy}+optimizer" for policy in menu))
    candidate = price(case.job, layout, ways).spread()
    base, changes = apart(candidate)
    assert base.policies == menu
    assert len(changes) == layout.pipeline_parallel
    rows = data.draw(splits(base))
    for index, own in enumerate(rows):
        kinds = len(candidate.order.rows)
        several = len(base.policies)
        moved = [data.draw(st.integers(0, sum(own[k * several : (k + 1) * several]))) for k in range(kinds)]
        both = together(candidate, own, moved)
        assert sum(both) == sum(own)
        more = sum(n * s for n, s in zip(moved, changes[index].updates, strict=True))
        assert candidate.update_seconds(index, both) == pytest.approx(base.update_seconds(index, own) + more)
        for place, size in candidate.held_elsewhere(index, both).items():
            change = sum(n * b for n, b in zip(moved, changes[index].elsewhere[place], strict=True))
            assert size == pytest.approx(base.held_elsewhere(index, own)[place] + change)
        for moment, (per_row, fixed, _) in candidate.stages[index].moments.items():
            change = sum(n * b for n, b in zip(moved, changes[index].moments[moment], strict=True))
            before = sum(n * b for n, b in zip(own, base.stages[index].moments[moment][0], strict=True))
            after = sum(n * b for n, b in zip(both, per_row, strict=True))
            assert after == pytest.approx(before + change, abs=1e-6 * (fixed + after))


def small_job(**cluster: Any) -> Job:
    model = llama(6, 2048, 16, 16, vocab_size=32000)
    job = job_of(model, "4xA100", seq_length=2048, global_batch_size=8)
    return replace(job, cluster=job.cluster.model_copy(update=cluster))


def test_the_search_offloads_no_more_layers_than_memory_forces() -> None:
    """Less memory, more layers; none where all fit, and no stage more than one more of it."""
    choices = Choices(
        offload=("optimizer",),
        tensor_parallel=(1,),
        pipeline_parallel=(2,),
        data_parallel=(2,),
        schedule=("1f1b",),
    )
    counts = []
    for budget in (40, 6, 4.5, 4):
        job = small_job(budget_bytes=int(budget * 2**30))
        (best,) = find(job, choices, top=1).answers
        candidate = best.candidate
        assert not candidate.layout.offload
        ways, moved = candidate.policies, 0
        for stage, own in enumerate(best.rows):
            for column, way in enumerate(ways):
                if "optimizer" in way and own[column]:
                    moved += own[column]
                    home = ways.index(Way.of(way).recompute)
                    kept = [n + (r == home) - (r == column) for r, n in enumerate(own)]
                    assert not candidate.fits(stage, kept)
        counts.append(moved)
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] > counts[1]


def test_best_first_equals_every_layout_solved() -> None:
    job = small_job(budget_bytes=8 * 2**30)
    choices = Choices(
        offload=("optimizer", "activations"),
        tensor_parallel=(1, 2),
        micro_batch_size=(1,),
        schedule=("1f1b",),
    )
    ours = find(job, choices, top=3)
    theirs = exhaustive(job, choices, "time", top=3)
    assert ours.optimal
    assert [one.cost for one in ours.answers] == pytest.approx([one.cost for one in theirs], rel=1e-5)
    assert ours.enumerated == ours.unfitting + ours.pruned + ours.solved
    assert ours.enumerated > enumerate_layouts(job, choices).size


def test_a_host_too_small_is_a_limit_like_a_gpu_too_small() -> None:
    model, training = (
        gpt(24, 2048, 16),
        TrainingSpec(framework="deepspeed", seq_length=512, global_batch_size=1),
    )
    layout = Layout(sharding="zero2", offload="optimizer")
    needed = 16 * model.num_parameters
    for share, verdict in ((2.0, "fits"), (1.2, "at risk"), (0.9, "does not fit")):
        update = {"host_memory_bytes": int(share * needed)}
        cluster = ClusterSpec.parse("1xA100").model_copy(update=update)
        assert estimate(model, cluster, training, layout).verdict == verdict
    cluster = ClusterSpec.parse("1xA100").model_copy(update={"host_memory_bytes": int(0.9 * needed)})
    choices = Choices(offload=("optimizer",), sharding=("zero2",))
    # Without the offload it would fit on no GPU of this budget, with it on no host.
    cluster = cluster.model_copy(update={"budget_bytes": 16 * 2**30})
    with pytest.raises(InfeasibleError, match="host is short of"):
        search(model, cluster, training, choices=choices)
