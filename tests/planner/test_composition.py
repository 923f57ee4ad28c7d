"""Strategies put together: random models on random layouts, and what must hold for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import comb, gcd, isfinite

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from planner.api import given_plan
from planner.bounds import quick_bound, tight_bound
from planner.candidate import Candidate
from planner.defaults import Job, resolve
from planner.layer_price import LayerPrice
from planner.ledger import COMPONENTS, StageView, entries, view
from planner.order import Order
from planner.program import solve
from planner.replay import MOMENTS, StageReplay, Timeline
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from planner.splits import solve_layout
from planner.stages import Prices, price
from strategies.base import Role
from strategies.layout import SHARDINGS, Layout
from tests.planner.cases import (
    ONCE,
    Case,
    bytes_outside,
    cases,
    divisors,
    even_split,
    layouts,
    library_workspace,
    splits,
)

GIB = 2**30
ALLOCATED = ("parameters", "gradients", "optimizer_states")
NUMBERS = (
    *("data_parallel", "tensor_parallel", "pipeline_parallel", "chunks"),
    *("micro_batch_size", "grad_accum", "data_shards"),
)


def stage_views(prices: Prices, rows: tuple[tuple[int, ...], ...]) -> list[StageView]:
    return [view(prices, rows, index) for index in range(len(rows))]


def component(prices: Prices, stage: StageView, rows: tuple[tuple[int, ...], ...], *names: str) -> float:
    """Bytes of some components of a stage while its last micro-batch's optimizer step runs."""
    peaks = StageReplay(prices, stage.index, rows).run().peaks()
    held = entries(prices, stage, peaks["optimizer step"][0])
    return sum(one.held for one in held if one.component in names)


# --- Parameters -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """Parameters by what tensor parallelism does with them, counted by hand."""

    cut: int  # all blocks' matrices and the biases of their columns
    replicated: int  # norms, biases of rows, positions
    vocabulary: int  # one padded matrix


def count_of(model: ModelSpec, tensor: int) -> Count:
    """Vaswani et al. 2017's block with grouped queries (Ainslie et al. 2023), matrix by matrix."""
    h, f, d = model.hidden_size, model.intermediate_size, model.head_dim
    a, k, first = model.num_attention_heads, model.num_key_value_heads, 2 if model.gated_mlp else 1
    cut = h * a * d + 2 * h * k * d + a * d * h + first * h * f + f * h
    cut += (a + 2 * k) * d * model.qkv_bias + first * f * model.mlp_bias
    norm = 2 * h if model.norm == "layernorm" else h
    replicated = 2 * norm + 2 * d * model.qk_norm + h * model.attention_output_bias + h * model.mlp_bias
    around = norm + 2 * h * model.embedding_norm
    if model.position_embedding == "learned":
        around += (model.max_position_embeddings + model.position_offset) * h
    padded = -(-model.vocab_size // tensor) * tensor
    layers = model.num_hidden_layers
    return Count(layers * cut, layers * replicated + around, padded * h)


def parameters_of_all_ranks(case: Case, rows: tuple[tuple[int, ...], ...], prices: Prices) -> float:
    stages = stage_views(prices, rows)
    held = sum(component(prices, stage, rows, "parameters") for stage in stages)
    return held / case.job.recipe.weight * case.layout.tensor_parallel


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_stages_hold_exactly_the_models_parameters_without_tensor_parallelism(data: st.DataObject) -> None:
    # Untied, in stacks that pad no vocabulary: nothing twice, nothing lost, however the layers fall.
    case = data.draw(cases(("torchtitan", "fsdp", "hf"), tied=False, tensor=1, schedules=ONCE))
    schedule = "1f1b" if case.layout.schedule == "pipedream" else case.layout.schedule
    layout = replace(case.layout, sharding="ddp", schedule=schedule, reshard_after_forward=True)
    prices = price(case.job, layout)
    rows = data.draw(splits(prices.spread()))
    count = count_of(case.model, 1)
    whole = count.cut + count.replicated + 2 * count.vocabulary
    assert parameters_of_all_ranks(case, rows, prices) == whole
    assert case.model.num_parameters == whole


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_tied_head_is_held_once_on_one_stage_and_twice_on_several(data: st.DataObject) -> None:
    case = data.draw(cases(("torchtitan", "fsdp", "hf"), tied=True, tensor=1, schedules=ONCE))
    layout = replace(case.layout, sharding="ddp", reshard_after_forward=True)
    layout = replace(layout, schedule="1f1b" if layout.schedule == "pipedream" else layout.schedule)
    prices = price(case.job, layout)
    rows = data.draw(splits(prices.spread()))
    count = count_of(case.model, 1)
    copies = 2 if layout.pipeline_parallel > 1 else 1
    assert parameters_of_all_ranks(case, rows, prices) == (
        count.cut + count.replicated + copies * count.vocabulary
    )
    assert case.model.num_parameters == count.cut + count.replicated + count.vocabulary


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_tensor_parallel_ranks_together_repeat_norms_row_biases_and_positions_only(
    data: st.DataObject,
) -> None:
    case = data.draw(cases(("torchtitan", "fsdp", "hf"), schedules=ONCE))
    layout = replace(case.layout, sharding="ddp", reshard_after_forward=True)
    layout = replace(layout, schedule="1f1b" if layout.schedule == "pipedream" else layout.schedule)
    prices = price(case.job, layout)
    rows = data.draw(splits(prices.spread()))
    tensor = layout.tensor_parallel
    count = count_of(case.model, tensor)
    copies = 1 if case.model.tie_word_embeddings and layout.pipeline_parallel == 1 else 2
    expected = count.cut + tensor * count.replicated + copies * count.vocabulary
    assert parameters_of_all_ranks(case, rows, prices) == pytest.approx(expected, rel=1e-12)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_megatron_pads_its_vocabulary_to_128_t_and_nothing_else(data: st.DataObject) -> None:
    case = data.draw(cases(("megatron",), tied=False))
    layout = replace(case.layout, sharding="ddp", reshard_after_forward=True, schedule="1f1b", chunks=1)
    prices = price(case.job, layout)
    rows = data.draw(splits(prices.spread()))
    tensor = layout.tensor_parallel
    count = count_of(case.model, 128 * tensor)
    expected = count.cut + tensor * count.replicated + 2 * count.vocabulary
    assert parameters_of_all_ranks(case, rows, prices) == pytest.approx(expected, rel=1e-12)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_data_parallel_group_holds_every_optimizer_state_once_under_zero(data: st.DataObject) -> None:
    case = data.draw(cases())
    assume(case.training.optimizer != "sgd" or case.job.recipe.master)
    plain = replace(case.layout, sharding="ddp", reshard_after_forward=True)
    rows = data.draw(splits(price(case.job, plain).spread()))
    for sharding in ("zero1", "zero2", "zero3", "fsdp"):
        cut = replace(plain, sharding=sharding, data_shards=plain.data_parallel)
        for index in range(plain.pipeline_parallel):
            sizes = []
            for layout in (plain, cut):
                prices = price(case.job, layout)
                stage = view(prices, rows, index)
                sizes.append(component(prices, stage, rows, "optimizer_states"))
            assert sizes[1] * plain.data_parallel == pytest.approx(sizes[0], rel=1e-12)


# --- The ledger and the peak ----------------------------------------------------------------------


def replayed(
    case: Case, rows: tuple[tuple[int, ...], ...], prices: Prices
) -> Iterator[tuple[StageView, Timeline]]:
    for stage in stage_views(prices, rows):
        yield stage, StageReplay(prices, stage.index, rows).run()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_stages_entries_sum_to_its_pools_and_what_lies_outside_tensors(data: st.DataObject) -> None:
    case = data.draw(cases())
    prices = price(case.job, case.layout)
    rows = data.draw(splits(prices.spread()))
    slack, library = case.job.stack.allocator.value, library_workspace(case.job)
    outside = bytes_outside(case.job, case.layout)
    for stage, timeline in replayed(case, rows, prices):
        snapshot, _ = max(timeline.peaks().values(), key=lambda one: one[1])
        total = sum(one.held for one in entries(prices, stage, snapshot, timeline.pools))
        # Idle room of less than a byte has no entry.
        assert total == pytest.approx((timeline.pools + library) * (1 + slack) + outside, rel=1e-9, abs=2)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_what_the_ledger_lists_as_tensors_is_never_above_the_pools(data: st.DataObject) -> None:
    case = data.draw(cases())
    prices = price(case.job, case.layout)
    rows = data.draw(splits(prices.spread()))
    for stage, timeline in replayed(case, rows, prices):
        peaks = timeline.peaks()
        assert [name for name in MOMENTS if name in peaks] == list(peaks)
        assert ("loss" in peaks) == stage.last
        for moment, (snapshot, _) in peaks.items():
            held = entries(prices, stage, snapshot)
            tensors = sum(one.held for one in held if one.component != "framework_overhead")
            assert tensors <= timeline.pools * (1 + 1e-9), moment


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_an_entry_is_its_copies_times_its_shares(data: st.DataObject) -> None:
    case = data.draw(cases())
    prices = price(case.job, case.layout)
    rows = data.draw(splits(prices.spread()))
    for stage, timeline in replayed(case, rows, prices):
        for snapshot, _ in timeline.peaks().values():
            for one in entries(prices, stage, snapshot, timeline.pools):
                assert one.component in COMPONENTS
                assert one.held == pytest.approx(one.whole * one.count * np.prod(list(one.shares.values())))
                if one.dims:
                    assert one.whole == pytest.approx(np.prod(list(one.dims.values())) * one.unit)


@given(cases(), st.sampled_from(["none", "full", "auto"]))
@settings(deadline=None, max_examples=40)
def test_components_sum_to_the_peak_which_is_positive_and_finite(case: Case, recompute: str) -> None:
    seq = case.training.seq_length
    assume(not case.layout.sequence_parallel or seq is None or seq % case.layout.tensor_parallel == 0)
    runs = case.job.stack.policies_with(case.layout.schedule)
    assume(recompute == "auto" or recompute in runs)
    plan = given_plan(case.job, solve_layout(case.job, case.layout, recompute))
    copies = 2 if case.layout.schedule == "dualpipe" else 1
    assert sum(stage.layers for stage in plan.stages) == copies * case.model.num_hidden_layers
    for stage in plan.stages:
        assert set(stage.components) == set(COMPONENTS)
        # Each of eight is rounded to a byte, and so is the peak; idle room below a byte is left out.
        assert sum(stage.components.values()) == pytest.approx(stage.peak_bytes, abs=6)
        assert stage.tensor_bytes <= stage.reserved_bytes <= stage.peak_bytes
        assert stage.least_bytes <= stage.peak_bytes <= stage.most_bytes
        assert stage.moments[stage.moment] == stage.tensor_bytes == max(stage.moments.values())
        assert 0 < stage.peak_bytes < 1e15
        assert min(stage.components.values()) >= 0
    assert plan.peak_bytes == max(stage.peak_bytes for stage in plan.stages)
    assert isfinite(plan.step_time_s)
    assert plan.step_time_s > 0


# --- Degrees --------------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_more_tensor_parallelism_never_raises_a_stages_states(data: st.DataObject) -> None:
    case = data.draw(cases())
    model = case.model
    cut = gcd(gcd(model.num_attention_heads, model.num_key_value_heads), model.intermediate_size)
    assume(cut > 1)
    rows = data.draw(splits(price(case.job, case.layout).spread()))
    degrees = divisors(cut)
    sizes = {}
    for tensor in degrees:
        prices = price(case.job, replace(case.layout, tensor_parallel=tensor))
        stages = stage_views(prices, rows)
        sizes[tensor] = [component(prices, stage, rows, *ALLOCATED) for stage in stages]
    for few, many in combinations(degrees, 2):
        # Padding to a multiple of t needs degrees that divide one another to be comparable.
        if many % few == 0:
            for before, after in zip(sizes[few], sizes[many], strict=True):
                assert after <= before * (1 + 1e-12)
                assert after >= before * few / many * (1 - 1e-12)


def layer_prices(prices: Prices) -> list[LayerPrice]:
    return [prices.embedding, *prices.blocks, prices.head]


@given(cases(), st.sampled_from(SHARDINGS))
@settings(deadline=None, max_examples=60)
def test_every_sharding_over_one_gpu_prices_layers_as_ddp_does(case: Case, sharding: str) -> None:
    alone = replace(case.layout, data_parallel=1, data_shards=1, sharding="ddp", reshard_after_forward=True)
    if sharding == "fsdp":  # within a pipeline it keeps a gathered copy, of one shard too
        alone = replace(alone, pipeline_parallel=1, chunks=1, schedule="1f1b")
    shared = layer_prices(price(case.job, replace(alone, sharding=sharding)))
    engine = case.job.stack.name == "deepspeed"
    for one, other in zip(layer_prices(price(case.job, alone)), shared, strict=True):
        # New gradients beside earlier ones, unless they are accumulated in fp32.
        more = alone.grad_accum > 1 and case.training.gradient_dtype is None
        twice = engine and sharding == "zero2" and more
        for role, size in one.states.items():
            times = 2 if twice and role is Role.GRADIENT else 1
            assert float(other.states[role]) == times * float(size)
        # fully_shard makes whole gradients in the products' dtype, of one shard too; DeepSpeed's ZeRO
        # engine copies gradients as no plain DDP does.
        room = () if engine else ("update_room",) if sharding == "fsdp" else ("working", "update_room")
        for name in ("saved", "seconds", "update_bytes", *room):
            assert float(getattr(one, name)) == pytest.approx(float(getattr(other, name)), rel=1e-12)
        # A group of one sends nothing.
        assert [
            float(seconds) for each in (one, other) for seconds in each.per_step.values() if seconds
        ] == []


@given(cases(("megatron", "torchtitan", "fsdp", "hf")), st.sampled_from(["zero1", "zero2"]))
@settings(deadline=None, max_examples=40)
def test_zero_over_one_gpu_is_ddp_to_the_byte_and_the_second(case: Case, sharding: str) -> None:
    alone = replace(case.layout, data_parallel=1, data_shards=1, sharding="ddp", reshard_after_forward=True)
    first = price(case.job, alone).spread()
    second = price(case.job, replace(alone, sharding=sharding)).spread()
    assert replace(second, layout=first.layout) == first


@given(cases())
@settings(deadline=None, max_examples=40)
def test_a_pipeline_of_one_stage_is_gradient_accumulation(case: Case) -> None:
    # Every micro-batch runs by itself, and nothing is handed on.
    layout = replace(case.layout, pipeline_parallel=1, chunks=1, schedule="1f1b")
    prices = price(case.job, layout)
    candidate = prices.spread()
    rows = even_split(candidate, 0)
    whole = sum(float(one.seconds) for one in (prices.embedding, prices.head))
    several = len(prices.policies)
    whole += sum(float(prices.blocks[kind * several].seconds) for kind in case.model.kinds)
    assert candidate.cost(rows) == pytest.approx(layout.grad_accum * whole + float(prices.step_seconds))
    for schedule in ("pipedream", "gpipe"):
        once = replace(layout, grad_accum=1)
        others = [price(case.job, replace(once, schedule=name)).spread() for name in ("1f1b", schedule)]
        assert others[0].cost(rows) == pytest.approx(others[1].cost(rows))
        assert others[0].stages == others[1].stages


# --- Families -------------------------------------------------------------------------------------


def close(one: object, other: object) -> bool:
    """Equal, but for the last bits of floats, however nested."""
    if isinstance(one, float):
        return other == pytest.approx(one, rel=1e-12, abs=1e-12)
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return list(one) == list(other) and all(close(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        assert isinstance(other, tuple)
        return len(one) == len(other) and all(close(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Candidate) or hasattr(one, "moments"):
        return all(close(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))  # type: ignore[arg-type]
    return one == other


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_family_of_arrays_is_priced_as_each_of_its_layouts_alone(data: st.DataObject) -> None:
    case = data.draw(cases())
    first = case.layout
    members = [first]
    for _ in range(data.draw(st.integers(1, 4))):
        other = data.draw(layouts(case.model))
        # Of a family: sharding, schedule and the switches are shared, the degrees are not.
        chunked = first.schedule == "interleaved"
        unlike = len(case.model.block_kinds) > 1 and other.chunks != first.chunks
        if chunked and (other.schedule != "interleaved" or unlike):
            other = replace(first, micro_batch_size=other.micro_batch_size)
        members.append(
            replace(
                other,
                chunks=other.chunks if chunked else first.chunks,
                schedule=first.schedule,
                sharding=first.sharding,
                data_shards=other.data_shards if first.sharding == "fsdp" else other.data_parallel,
                reshard_after_forward=first.reshard_after_forward,
                sequence_parallel=first.sequence_parallel,
            )
        )
    columns = {name: np.array([getattr(one, name) for one in members]) for name in NUMBERS}
    family = price(case.job, replace(first, **columns))
    for index, member in enumerate(members):
        alone = price(case.job, member).spread()
        taken = family.take(index).spread()
        assert taken.layout == alone.layout == member
        assert close(alone, taken)


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_bounds_of_a_family_are_the_bounds_of_each_of_its_layouts(data: st.DataObject) -> None:
    case = data.draw(cases())
    sizes = sorted(data.draw(st.sets(st.integers(1, 6), min_size=2)))
    several = replace(case.layout, micro_batch_size=np.array(sizes))
    columns = {name: np.full(len(sizes), getattr(case.layout, name)) for name in NUMBERS}
    several = replace(several, **(columns | {"micro_batch_size": np.array(sizes)}))
    family = price(case.job, several)
    together = tight_bound(family.take((np.arange(len(sizes)), None)))
    for index, size in enumerate(sizes):
        one = replace(case.layout, **{name: np.array([getattr(case.layout, name)]) for name in NUMBERS})
        alone = price(case.job, replace(one, micro_batch_size=np.array([size])))
        assert tight_bound(alone.take((np.arange(1), None)))[0] == pytest.approx(together[index], rel=1e-5)
        assert quick_bound(alone)[0][0] == pytest.approx(quick_bound(family)[0][index], rel=1e-12)


# --- Bounds, and what the program finds -----------------------------------------------------------


def with_budget(case: Case, part: float, policy: int) -> Job:
    """The job on GPUs whose tensors may fill ``part`` of what an even split under a policy needs."""
    job = case.job
    candidate = price(job, case.layout).spread()
    rows = even_split(candidate, min(policy, len(candidate.policies) - 1))
    needed = part * max(candidate.peak(index, own)[0] for index, own in enumerate(rows))
    outside = bytes_outside(job, case.layout, "most")
    budget = int((needed + library_workspace(job)) * (1 + job.stack.allocator.most) + outside)
    return replace(job, cluster=job.cluster.model_copy(update={"budget_bytes": budget}))


def family_of_one(job: Job, layout: Layout) -> Prices:
    return price(job, replace(layout, **{name: np.array([getattr(layout, name)]) for name in NUMBERS}))


@pytest.mark.parametrize(("depth", "lacking"), [(12, 0), (11, 1), (10, 2)])
def test_chunks_at_the_ends_lack_as_many_layers_in_a_family_as_alone(depth: int, lacking: int) -> None:
    model = ModelSpec.from_catalog("llama-2-7b").model_copy(update={"num_hidden_layers": depth})
    job = resolve(model, ClusterSpec.parse("2x80G"), TrainingSpec(global_batch_size=4))
    layout = Layout(pipeline_parallel=2, chunks=3, schedule="interleaved", grad_accum=4)
    for prices in (price(job, layout), family_of_one(job, layout)):
        missing = [np.ravel(n)[0] for n, _ in prices.missing(True, True)]
        assert sum(missing) == lacking == np.ravel(prices.short)[0]


# Not to the byte what the even split needs: there the solver's tolerance decides.
budgets = st.sampled_from([0.9, 0.97, 1.001, 1.02, 1.1]) | st.floats(0.6, 1.4).filter(
    lambda part: abs(part - 1) > 1e-4
)


@given(cases(), budgets, st.integers(0, 2))
@settings(deadline=None, max_examples=150)
def test_no_bound_is_above_what_the_program_finds(case: Case, part: float, policy: int) -> None:
    job = with_budget(case, part, policy)
    family = family_of_one(job, case.layout)
    (quick,), (possible,) = quick_bound(family)
    (tight,) = tight_bound(family.take((np.arange(1), None)))
    solution = solve([family.take(0).spread()])
    assert quick <= tight
    if not possible or not isfinite(tight):
        assert solution is None
    if solution is not None:
        # The solver's own tolerance is 1e-6 of the memory.
        assert tight <= solution.cost * (1 + 1e-6)


@given(cases(), budgets, st.integers(0, 2))
@settings(deadline=None, max_examples=80)
def test_no_bound_on_headroom_is_above_what_the_program_finds(case: Case, part: float, policy: int) -> None:
    job = with_budget(case, part, policy)
    family = family_of_one(job, case.layout)
    (tight,) = tight_bound(family.take((np.arange(1), None)), "headroom")
    candidate = family.take(0).spread()
    solution = solve([candidate], "headroom")
    if not isfinite(tight):
        assert solution is None
    if solution is not None:
        assert tight <= solution.cost + 1e-5 * candidate.capacity


def splits_of(order: Order, stages: int, policies: int) -> list[tuple[tuple[int, ...], ...]]:
    """Every split of the rows in their order, no stage empty."""
    kinds = len(order.rows)

    def parts(total: int, places: int) -> list[tuple[int, ...]]:
        if places == 1:
            return [(total,)]
        return [(n, *rest) for n in range(total + 1) for rest in parts(total - n, places - 1)]

    def under(sequence: tuple[int, ...]) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = [()]
        for kind in range(kinds):
            found = [(*own, *more) for own in found for more in parts(sequence.count(kind), policies)]
        return found

    def splits(sequence: tuple[int, ...], left: int) -> list[tuple[tuple[int, ...], ...]]:
        if left == 1:
            return [(own,) for own in under(sequence)]
        return [
            (own, *rest)
            for here in range(1, len(sequence) - left + 2)
            for own in under(sequence[:here])
            for rest in splits(sequence[here:], left - 1)
        ]

    return splits(order.sequence, stages)


# Steps of a model this small take less than a microsecond, which no solver's absolute gap may hide.
TINY = Case(
    ModelSpec(
        name="tiny",
        model_type="llama",
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        vocab_size=17,
        max_position_embeddings=512,
    ),
    TrainingSpec(seq_length=24, global_batch_size=1),
    Layout(),
)


@given(cases(), budgets, st.integers(0, 2))
@settings(deadline=None, max_examples=60)
@example(TINY, 1.25, 0)
def test_the_program_finds_the_best_of_all_splits_and_bounds_stay_below_it(
    case: Case, part: float, policy: int
) -> None:
    job = with_budget(case, part, policy)
    family = family_of_one(job, case.layout)
    candidate = family.take(0).spread()
    stages, policies = len(candidate.stages), len(candidate.policies)
    assume(comb(candidate.rows + stages * policies - 1, candidate.rows) <= 5000)
    every = splits_of(candidate.order, stages, policies)
    limit = candidate.capacity
    peaks = [max(candidate.peak(j, own)[0] for j, own in enumerate(rows)) for rows in every]
    # A split within the solver's tolerance of the limit may count either way.
    assume(all(abs(peak / limit - 1) > 1e-5 for peak in peaks))
    costs = [candidate.cost(rows) for rows, peak in zip(every, peaks, strict=True) if peak <= limit]
    solution = solve([candidate])
    (tight,) = tight_bound(family.take((np.arange(1), None)))
    if not costs:
        assert solution is None
    else:
        assert solution is not None
        assert solution.cost == pytest.approx(min(costs), rel=2e-6)
        assert tight <= min(costs) * (1 + 1e-9)


@pytest.mark.parametrize("budget", [GIB // 4, GIB // 2, GIB // 2 + 1])
def test_a_budget_that_what_lies_outside_tensors_fills_holds_no_split(budget: int) -> None:
    # The CUDA context alone takes half a GiB.
    model = ModelSpec.from_catalog("gpt2-small")
    cluster = ClusterSpec.parse("1xA100").model_copy(update={"budget_bytes": budget})
    job = resolve(model, cluster, TrainingSpec(seq_length=512, global_batch_size=1))
    assert solve([price(job, Layout()).spread()]) is None
