"""What GPUs send each other: the papers' volumes, and that composition keeps their message sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import permutations
from math import isclose

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.defaults import resolve
from planner.layers import Builder
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.base import AbstractStrategy, Collective, Layer, Role, Term, held, size_seen_by
from strategies.ddp import DataParallel
from strategies.fsdp import FullyShardedDataParallel
from strategies.layout import SHARDINGS, Layout, Wire, collectives_of, strategies_of
from strategies.pipeline_parallel import PipelineParallel
from strategies.recompute import Recompute
from strategies.sequence_parallel import SequenceParallel
from strategies.tensor_parallel import TensorParallel
from strategies.zero1 import Zero1
from strategies.zero2 import Zero2
from strategies.zero3 import Zero3
from tests.helpers import job_of, llama

# A ring moves a buffer of n bytes once for an all-gather or a reduce-scatter and twice for an
# all-reduce, which is one of each: Rajbhandari et al. 2020, arXiv:1910.02054, section 7.1.
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}

PSI = 1_000_000
WIRE = 2.0  # bytes per element, of weights, gradients and activations alike
LAYER = Layer(
    "block",
    (
        Term("up weight", Role.PARAMETER, {"hidden": 1000, "ffn": 1000}, WIRE),
        Term("up weight", Role.GRADIENT, {"hidden": 1000, "ffn": 1000}, WIRE),
        Term("up weight", Role.OPTIMIZER, {"hidden": 1000, "ffn": 1000}, 12.0),
        Term(
            "regions",
            Role.MESSAGE,
            {"batch": 2, "seq": 512, "residual": 1000, "crossings": 4},
            WIRE,
            ("none", "selective"),
        ),
    ),
)
BSH = 2 * 512 * 1000


def sent(strategy: AbstractStrategy, together: Sequence[AbstractStrategy] = ()) -> list[Collective]:
    return list(strategy.collectives(LAYER, size_seen_by(strategy, together or [strategy])))


def volume(messages: Iterable[Collective], micro_batches: int = 1) -> float:
    """Elements that one GPU of a large ring sends in a step of so many micro-batches."""
    total = 0.0
    for one in messages:
        repeats = micro_batches if one.per == "micro-batch" else 1
        total += RING[one.kind] * one.times * one.size / WIRE * repeats
    return total


# --- Data parallelism: Rajbhandari et al. 2020, section 7; Zhao et al. 2023, arXiv:2304.11277 ------


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_ddp_moves_two_psi_per_step_as_a_ring_passes_an_all_reduce_twice(micro_batches: int) -> None:
    (message,) = sent(DataParallel(64))
    assert message.kind == "all_reduce"
    assert volume([message], micro_batches) == 2 * PSI


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_zero1_moves_two_psi_per_step_as_ddp_does(micro_batches: int) -> None:
    assert volume(sent(Zero1(64)), micro_batches) == 2 * PSI


def test_zero2_moves_two_psi_in_a_step_of_one_micro_batch() -> None:
    assert volume(sent(Zero2(64)), 1) == 2 * PSI


def test_zero2_reduces_gradients_in_every_micro_batch_as_no_gpu_keeps_the_others() -> None:
    assert volume(sent(Zero2(64)), 8) == (8 + 1) * PSI


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_zero3_moves_three_psi_per_micro_batch(micro_batches: int) -> None:
    assert volume(sent(Zero3(64)), micro_batches) == 3 * PSI * micro_batches


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_zero3_gathers_twice_and_reduces_once(micro_batches: int) -> None:
    gathers = [one for one in sent(Zero3(64)) if one.kind == "all_gather"]
    scatters = [one for one in sent(Zero3(64)) if one.kind == "reduce_scatter"]
    assert volume(gathers, micro_batches) == 2 * PSI * micro_batches
    assert volume(scatters, micro_batches) == PSI * micro_batches


def test_fsdp_moves_three_psi_and_two_where_it_keeps_what_it_gathered() -> None:
    # Zhao et al. 2023, section 3.2.1: one all-gather less without resharding after the forward.
    resharded = [one for one in sent(FullyShardedDataParallel(64, shards=64)) if one.axis == "data_shard"]
    kept = [
        one
        for one in sent(FullyShardedDataParallel(64, shards=64, reshard_after_forward=False))
        if one.axis == "data_shard"
    ]
    assert volume(resharded, 8) == 3 * PSI * 8
    assert volume(kept, 8) == 2 * PSI * 8


@pytest.mark.parametrize("shards", [1, 4, 8, 64])
def test_hsdp_all_reduces_one_shard_between_its_replicas_once_per_step(shards: int) -> None:
    # Zhao et al. 2023, section 3.2.2: 2 M / G cross-host for shards of G GPUs.
    (extra,) = (
        one for one in sent(FullyShardedDataParallel(64, shards=shards)) if one.axis == "data_replicate"
    )
    assert extra.kind == "all_reduce"
    assert extra.size == PSI * WIRE / shards
    assert volume([extra], micro_batches=8) == 2 * PSI / shards


@pytest.mark.parametrize("strategy", [Zero3(8), FullyShardedDataParallel(8, shards=8)])
def test_weights_at_rest_in_fp32_are_gathered_on_the_wires_width(strategy: AbstractStrategy) -> None:
    wide = Layer("block", (Term("up weight", Role.PARAMETER, {"hidden": 10, "ffn": 10}, 4.0),))
    gathers = [
        one
        for one in strategy.collectives(wide, size_seen_by(strategy, [strategy]))
        if one.kind == "all_gather"
    ]
    assert {one.size for one in gathers} == {10 * 10 * 2.0}


@pytest.mark.parametrize("reduce_bytes", [2.0, 4.0])
def test_gradients_are_reduced_on_a_width_of_their_own(reduce_bytes: float) -> None:
    for strategy in (
        Zero3(8, reduce_bytes=reduce_bytes),
        FullyShardedDataParallel(8, shards=8, reduce_bytes=reduce_bytes),
    ):
        (scatter,) = (one for one in sent(strategy) if one.kind == "reduce_scatter")
        assert scatter.size == PSI * reduce_bytes


# --- Tensor parallelism: Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022 ------------


def test_tensor_parallelism_all_reduces_bsh_four_times_per_block_and_micro_batch() -> None:
    # Shoeybi et al. 2019, figure 4: two all-reduces in the forward and two in the backward.
    messages = sent(TensorParallel(8))
    assert [(one.kind, one.times, one.way) for one in messages] == [
        ("all_reduce", 2, "forward"),
        ("all_reduce", 2, "backward"),
    ]
    assert {(one.per, one.behind, one.size) for one in messages} == {("micro-batch", "", BSH * WIRE)}
    assert volume(messages) == 2 * 4 * BSH


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_an_inputs_gradient_is_reduced_behind_the_product_of_its_weights(sequence_parallel: bool) -> None:
    # Megatron-LM's asynchronous all-reduce, or reduce-scatter: the two of the backward.
    plain, hidden = (
        {
            (one.kind, one.way): one.behind
            for one in sent(TensorParallel(8, sequence_parallel, overlaps))
            if one.of
        }
        for overlaps in (False, True)
    )
    kind = "reduce_scatter" if sequence_parallel else "all_reduce"
    assert set(plain.values()) == {""}
    assert {key for key, behind in hidden.items() if behind} == {(kind, "backward")}


def test_sequence_parallelism_makes_gathers_and_scatters_of_the_same_volume() -> None:
    # Korthikanti et al. 2022, section 4.2.2: "a ring all-reduce is composed of two steps: a
    # reduce-scatter followed by an all-gather", so the bandwidth is the same.
    together = [TensorParallel(8, sequence_parallel=True), SequenceParallel(8)]
    exposed = [one for one in sent(together[0], together) if not one.behind]
    for way in ("forward", "backward"):
        own = {one.kind: one.times for one in exposed if one.way == way}
        assert own == {"all_gather": 2, "reduce_scatter": 2}
    assert volume(exposed) == volume(sent(TensorParallel(8)))


def test_sequence_parallelism_gathers_two_inputs_again_behind_the_backwards_products() -> None:
    together = [TensorParallel(8, sequence_parallel=True), SequenceParallel(8)]
    hidden = [one for one in sent(together[0], together) if one.behind]
    assert [(one.kind, one.times, one.behind) for one in hidden] == [("all_gather", 2, "layer")]
    assert volume(hidden) == 2 * BSH


def test_sequence_parallelism_sends_nothing_of_its_own() -> None:
    together = [TensorParallel(8, sequence_parallel=True), SequenceParallel(8)]
    assert sent(together[1], together) == []


def test_full_recompute_adds_two_all_reduces_for_the_second_forward() -> None:
    for policy, times in (("none", (2, 2)), ("selective", (2, 2)), ("full", (2, 4))):
        messages = list(collectives_of(LAYER, [TensorParallel(8), Recompute(policy=policy)]))
        assert {one.size for one in messages} == {BSH * WIRE}
        ways = [sum(one.times for one in messages if one.way == way) for way in ("forward", "backward")]
        assert tuple(ways) == times


@pytest.mark.parametrize("name", ["llama-2-7b", "gpt2-xl", "llama-3-70b"])
def test_a_real_models_block_crosses_four_regions_and_its_ends_one_each(name: str) -> None:
    # An all-reduce of the embedding's output forward, and of the head's input gradient backward.
    model = ModelSpec.from_catalog(name)
    job = resolve(model, ClusterSpec.parse("8xA100"), TrainingSpec(seq_length=512, global_batch_size=24))
    layers = Builder(model, job.training, job.stack, job.recipe, batch=3, tensor_parallel=2).layers()
    tensor = TensorParallel(2)
    per_layer = [list(tensor.collectives(layer, size_seen_by(tensor, [tensor]))) for layer in layers]
    assert [sum(one.times for one in messages) for messages in per_layer] == [1, 4, 1]
    sizes = {one.size for messages in per_layer for one in messages}
    assert sizes == {3 * 512 * model.hidden_size * 2.0}


# --- Composition ----------------------------------------------------------------------------------

degrees = st.sampled_from([1, 2, 3, 4, 8, 12])


@st.composite
def lists_of_strategies(draw: st.DrawFn) -> tuple[AbstractStrategy, ...]:
    shards, replicas = draw(degrees), draw(degrees)
    layout = Layout(
        shards * replicas,
        draw(degrees),
        draw(degrees),
        grad_accum=draw(degrees),
        data_shards=shards,
        sequence_parallel=draw(st.booleans()),
        sharding=draw(st.sampled_from(SHARDINGS)),
        reshard_after_forward=draw(st.booleans()),
        schedule=draw(st.sampled_from(["1f1b", "gpipe", "pipedream"])),
    )
    policy = draw(st.sampled_from(["none", "selective", "full"]))
    return strategies_of(layout, Wire(bucket_fraction=1.0), policy=policy)


@given(lists_of_strategies())
@settings(deadline=None, max_examples=40)
def test_what_a_strategy_sees_does_not_depend_on_the_order_of_strategies(
    together: tuple[AbstractStrategy, ...],
) -> None:
    for strategy in together:
        for term in LAYER.terms:
            seen = [float(size_seen_by(strategy, some)(term)) for some in permutations(together)]
            assert all(isclose(size, seen[0], rel_tol=1e-12) for size in seen)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_tensor_parallel_messages_do_not_shrink_with_sequence_parallelism(tensor: int) -> None:
    # Nor with its own degree: every GPU sends the whole residual stream round its ring.
    together = [TensorParallel(tensor, sequence_parallel=True), SequenceParallel(tensor)]
    assert {one.size for one in sent(together[0], together)} == {BSH * WIRE}
    assert {one.size for one in sent(TensorParallel(tensor))} == {BSH * WIRE}


@pytest.mark.parametrize("data", [DataParallel(8), Zero1(8), Zero2(8), Zero3(8), Zero3(1)])
def test_tensor_parallel_messages_do_not_depend_on_data_parallelism_or_the_pipeline(
    data: AbstractStrategy,
) -> None:
    tensor = TensorParallel(4)
    pipeline = PipelineParallel(8, stage=2, microbatches=16)
    assert sent(tensor, [data, tensor, pipeline]) == sent(tensor)


@pytest.mark.parametrize("pipeline", [1, 4, 16])
@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_gradient_messages_shrink_by_t_and_not_by_the_pipeline(
    sharding: str, tensor: int, pipeline: int
) -> None:
    # A stage's layer has all of its gradients; each tensor-parallel rank reduces its own 1/t of them.
    layout = Layout(8, tensor, pipeline, grad_accum=16, data_shards=8, sharding=sharding)
    together = strategies_of(layout, Wire())
    (reduced, *_) = (
        one for one in sent(together[0], together) if one.kind in ("reduce_scatter", "all_reduce")
    )
    assert reduced.size == pytest.approx(PSI * WIRE / tensor)


@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_gathered_parameters_shrink_by_t_and_not_by_their_own_sharding(sharding: str, tensor: int) -> None:
    layout = Layout(64, tensor, data_shards=64, sharding=sharding)
    together = strategies_of(layout, Wire())
    gathered = [one.size for one in sent(together[0], together) if one.kind == "all_gather"]
    assert gathered == pytest.approx([PSI * WIRE / tensor] * len(gathered))


def test_replicated_weights_are_reduced_whole_on_every_tensor_parallel_rank() -> None:
    norm = Layer(
        "block",
        (
            Term("norm", Role.PARAMETER, {"hidden": 4096}, 2.0),
            Term("norm", Role.GRADIENT, {"hidden": 4096}, 2.0),
        ),
    )
    together = [DataParallel(8), TensorParallel(8)]
    (message,) = together[0].collectives(norm, size_seen_by(together[0], together))
    assert message.size == 4096 * 2


def test_pipedreams_stashed_weights_are_not_gathered() -> None:
    zero = Zero1(8)
    pipeline = PipelineParallel(4, microbatches=16, schedule="pipedream")
    assert sent(zero, [zero, pipeline]) == sent(zero)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_messages_of_arrays_are_the_messages_of_their_numbers(sharding: str, sequence_parallel: bool) -> None:
    rows = [(1, 1, 1), (8, 2, 4), (12, 8, 3), (64, 4, 64)]

    def messages(data: object, tensor: object, shards: object) -> list[Collective]:
        layout = Layout(
            data, tensor, data_shards=shards, sharding=sharding, sequence_parallel=sequence_parallel
        )
        together = strategies_of(layout, Wire())
        return [one for strategy in together for one in sent(strategy, together)]

    family = messages(*(np.array(column) for column in zip(*rows, strict=True)))
    for index, row in enumerate(rows):
        alone = messages(*row)
        assert len(family) == len(alone)
        for whole, one in zip(family, alone, strict=True):
            assert (whole.kind, whole.axis, whole.per, whole.behind) == (
                one.kind,
                one.axis,
                one.per,
                one.behind,
            )
            for name in ("size", "times"):
                column = np.broadcast_to(getattr(whole, name), (len(rows),))
                assert column[index] == pytest.approx(getattr(one, name), rel=1e-14)


# --- What is allocated for messages ---------------------------------------------------------------


def at_once(
    strategy: AbstractStrategy, together: Sequence[AbstractStrategy], *spans: str, stream: str = ""
) -> float:
    """Bytes that a strategy allocates for messages of one layer during any of these spans."""
    buffers = strategy.workspace([LAYER], size_seen_by(strategy, together))
    return float(sum(one.size for one in buffers if one.span in spans and stream in ("", one.stream)))


def in_backward(strategy: AbstractStrategy, together: Sequence[AbstractStrategy]) -> float:
    return at_once(strategy, together, "passes", "block")


def test_zero3_gathers_all_of_a_small_model_and_keeps_its_gradients_in_a_bucket() -> None:
    zero = Zero3(64, gather_bytes=2.0, reduce_bytes=4.0)
    assert in_backward(zero, [zero]) == PSI * 2.0 + PSI * 4.0
    assert at_once(zero, [zero], "passes") == PSI * 2.0


def test_zero3_keeps_no_more_gathered_than_its_limits_say() -> None:
    # DeepSpeed's stage3_max_live_parameters, stage3_prefetch_bucket_size and reduce_bucket_size.
    live, prefetch, bucket = 0.3 * PSI, 0.1 * PSI, 0.2 * PSI
    zero = Zero3(64, 2.0, 4.0, live, prefetch, bucket)
    assert in_backward(zero, [zero]) == pytest.approx(0.4 * PSI * 2.0 + 0.2 * PSI * 4.0)


def test_fsdp_has_two_blocks_gathered_in_the_backward_and_the_input_of_one_reduce_scatter() -> None:
    fsdp = FullyShardedDataParallel(64, shards=64, gather_bytes=2.0, reduce_bytes=4.0)
    inner = ("passes", "block", "not first", "not last")
    assert at_once(fsdp, [fsdp], *inner) == 2 * PSI * 2.0 + PSI * 4.0
    # The second of them is allocated on the stream that gathers: a pool of its own.
    assert at_once(fsdp, [fsdp], *inner, stream="gather") == PSI * 2.0
    # At the end nothing is left to be gathered.
    assert at_once(fsdp, [fsdp], "passes", "block", "not first") == PSI * 2.0 + PSI * 4.0


def test_fsdp_that_keeps_what_it_gathered_gathers_nothing_in_the_backward() -> None:
    kept = FullyShardedDataParallel(64, shards=64, reshard_after_forward=False, reduce_bytes=4.0)
    assert at_once(kept, [kept], "passes", "block", "not first", "not last") == PSI * 4.0


def test_fsdp_within_a_pipeline_sends_once_and_allocates_nothing_for_it_in_between() -> None:
    fsdp = FullyShardedDataParallel(64, shards=64, pipelined=1)
    assert sum(one.size for one in fsdp.workspace([LAYER], size_seen_by(fsdp, [fsdp]))) == 0


def test_gathered_layers_shrink_with_tensor_parallelism_and_not_with_their_own_sharding() -> None:
    zero = Zero3(64)
    assert in_backward(zero, [zero, TensorParallel(4)]) == pytest.approx(in_backward(zero, [zero]) / 4)
    assert in_backward(Zero3(8), [Zero3(8)]) == in_backward(zero, [zero])


def test_sequence_parallelism_holds_one_gathered_residual_stream() -> None:
    together = [TensorParallel(8, sequence_parallel=True), SequenceParallel(8)]
    (buffer,) = together[1].workspace([LAYER], size_seen_by(together[1], together))
    assert buffer.size == BSH * WIRE


def buckets_of(zero: Zero1) -> dict[str, float]:
    """Bytes of the buffers by their spans."""
    found: dict[str, float] = {}
    for one in zero.workspace([LAYER], size_seen_by(zero, [zero])):
        found[one.span] = found.get(one.span, 0.0) + one.size
    return {span: size for span, size in found.items() if size}


def test_zero1_and_zero2_hold_their_buckets_only_where_a_framework_has_them() -> None:
    assert not buckets_of(Zero1(8))
    assert not buckets_of(Zero2(8))
    whole = LAYER.count * LAYER.by_role[Role.PARAMETER][0].amount
    for bucket in (whole / 64, whole):
        # From the first gradient to the last; the own part is copied out while the bucket still fills.
        most = max(bucket, whole / 8)
        assert buckets_of(Zero1(8, bucket)) == {"block": bucket, "end": bucket, "reduction": most}
        assert buckets_of(Zero2(8, bucket)) == {"block": bucket, "end": bucket, "reduction": bucket}
        # Between micro-batches ZeRO-1's stays.
        assert buckets_of(Zero1(8, bucket, accumulates=1)) == {"passes": bucket, "reduction": most}


def test_fp32_accumulation_casts_all_gradients_at_once() -> None:
    whole = LAYER.count * LAYER.by_role[Role.PARAMETER][0].amount
    assert buckets_of(Zero1(8, 16.0, lasting=2 / 3)) == {"reduction": whole}


def test_what_an_engine_keeps_of_its_gradients() -> None:
    """ZeRO-1: all, its own part at the end; ZeRO-2: its own part, twice once micro-batches add up."""
    assert Zero1(8).kept_gradients() is Zero2(8).kept_gradients() is DataParallel(8).kept_gradients() is None
    assert Zero1(8, 16.0).kept_gradients() == (0, 0, 1 / 8)
    assert Zero1(8, 16.0, accumulates=1).kept_gradients() == (1, 1, 1 / 8)
    assert Zero1(8, 16.0, lasting=2 / 3).kept_gradients() == (2 / 3, 2 / 3, 1)
    (gradient,) = LAYER.by_role[Role.GRADIENT]
    one, two = Zero2(8, 16.0), Zero2(8, 16.0, accumulates=1)
    assert (one.share(gradient), two.share(gradient)) == (1 / 8, 2 / 8)
    assert one.kept_gradients() == (0, 1, 1)
    assert two.kept_gradients() == (1 / 2, 1, 1 / 2)
    assert one.arriving(gradient, size_seen_by(one, [one])) is None


def test_zero2_holds_a_blocks_whole_gradients_until_they_are_scattered() -> None:
    zero = Zero2(8)
    size = size_seen_by(zero, [zero])
    (gradient,) = LAYER.by_role[Role.GRADIENT]
    assert zero.arriving(gradient, size) == PSI * WIRE
    assert held(gradient, [zero]) == PSI * WIRE / 8
    # On one GPU they arise in the place where they stay, as ZeRO-1's and DDP's do.
    assert not Zero2(1).arriving(gradient, size)
    assert Zero1(8).arriving(gradient, size) is None
    assert DataParallel(8).arriving(gradient, size) is None


def test_fsdps_gradients_arise_whole_in_the_dtype_of_the_products() -> None:
    (gradient,) = LAYER.by_role[Role.GRADIENT]
    in_fp32 = Term("up weight", Role.GRADIENT, gradient.dims, 4.0)
    fsdp = FullyShardedDataParallel(64, shards=64, gather_bytes=2.0, reduce_bytes=4.0)
    assert fsdp.arriving(in_fp32, size_seen_by(fsdp, [fsdp])) == PSI * 2.0
    assert held(in_fp32, [fsdp]) == PSI * 4.0 / 64


def test_more_gpus_than_key_and_value_heads_gather_the_product_and_keep_a_head_each() -> None:
    """Megatron Core 0.16.1, attention.py: the product of all heads is cut by t, gathered, and sliced.

    8 heads of 32, 2 of keys and values, t = 4: weights a quarter each, b s (8 + 4) 32 elements gathered, one
    key and one value head kept.
    """
    model = llama(layers=1, hidden=256, heads=8, kv=2)
    job = job_of(model, "4xA100", seq_length=64, global_batch_size=1)
    layer = Builder(model, job.training, job.stack, job.recipe, tensor_parallel=4).block()
    layout = Layout(tensor_parallel=4, sequence_parallel=True)
    *strategies, _ = strategies_of(layout, job.stack.wire(job.recipe, job.training.options))
    kept = {term.name: held(term, strategies) for term in layer.by_role[Role.ACTIVATION]}
    assert kept["key and value"] == 2 * 64 * 32 * 2
    weights = {term.name: held(term, strategies) for term in layer.by_role[Role.PARAMETER]}
    assert weights["key and value weights"] == 256 * 2 * 2 * 32 * 2 / 4
    sent = [one for one in collectives_of(layer, strategies) if one.size == 64 * (8 + 2 * 2) * 32 * 2]
    assert [(one.kind, one.way) for one in sent] == [
        ("all_gather", "forward"),
        ("reduce_scatter", "backward"),
    ]
    assert not list(TensorParallel(4, repeats_heads=True).objections([layer]))
    assert list(TensorParallel(4).objections([layer]))
