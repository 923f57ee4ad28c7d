"""What each strategy's GPUs hold of a term: the papers' shares, and what all shares have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from math import isclose, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.base import STATES, AbstractStrategy, Layer, Role, Term, held, size_seen_by
from strategies.context_parallel import ContextParallel
from strategies.ddp import DataParallel
from strategies.expert_parallel import ExpertParallel
from strategies.fsdp import FullyShardedDataParallel
from strategies.layout import SHARDINGS, Layout, Wire, strategies_of
from strategies.pipeline_parallel import SCHEDULES, PipelineParallel
from strategies.recompute import Recompute
from strategies.sequence_parallel import SequenceParallel
from strategies.tensor_parallel import TensorParallel
from strategies.zero1 import Zero1
from strategies.zero2 import Zero2
from strategies.zero3 import Zero3

DIMS = (
    *("batch", "seq", "seq_k", "residual", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab"),
    *("pair", "positions", "copies", "crossings"),
    *("experts", "expert_ffn", "routed", "width", "router"),
)
KEPT = (("none", "selective", "full"), ("none", "selective"), ("none",))
TERMS = [Term(f"{role} {dim}", role, {dim: 48}, 2.0, kept) for role in Role for dim in DIMS for kept in KEPT]
DEGREES = (2, 3, 7, 8, 49, 64, 1024)

# ZeRO, arXiv:1910.02054, figure 1: 7.5B parameters, 2 bytes of weight, 2 of gradient and 12 of Adam.
PSI = 7.5e9
STATES_OF_7B = [
    Term("weights", Role.PARAMETER, {"hidden": PSI}, 2.0),
    Term("weights", Role.GRADIENT, {"hidden": PSI}, 2.0),
    Term("weights", Role.OPTIMIZER, {"hidden": PSI}, 12.0),
]

# GPT-3 175B with s = 2048 in half precision. Korthikanti et al. 2022, arXiv:2205.05198, section 4.1:
# a block keeps sbh(34 + 5as/h), of which 10 lie on the residual stream (two norms' inputs 4, the inputs
# of attention and MLP 4, two dropout masks 2), 24 within the regions that tensor parallelism cuts
# (q, k, v and attention output 8, MLP 16), and 5as/h = 80 in the attention core.
BATCH, SEQ, HEADS, HEAD_DIM = 1, 2048, 96, 128
HIDDEN = HEADS * HEAD_DIM
TOKENS = {"batch": BATCH, "seq": SEQ}
SBH = BATCH * SEQ * HIDDEN
STREAM, WIDE, CORE = (
    {"residual": HIDDEN},
    {"heads": HEADS, "head_dim": HEAD_DIM},
    {"heads": HEADS, "seq_k": SEQ},
)
UNTIL_FULL = ("none", "selective")
GPT3_BLOCK = [
    Term("block input", Role.ACTIVATION, TOKENS | STREAM, 2.0),
    Term("norms, inputs of regions, masks", Role.ACTIVATION, TOKENS | STREAM, 8.0, UNTIL_FULL),
    Term("q, k, v, attention output", Role.ACTIVATION, TOKENS | WIDE, 8.0, UNTIL_FULL),
    Term("MLP", Role.ACTIVATION, TOKENS | {"ffn": 4 * HIDDEN}, 4.0, UNTIL_FULL),
    Term("scores, their mask, their dropout", Role.ACTIVATION, TOKENS | CORE, 5.0, ("none",)),
]

# Of every strategy, the one with a degree; the data-parallel ones without buckets of their own.
OF_DEGREE: dict[str, Callable[[int], AbstractStrategy]] = {
    "ddp": DataParallel,
    "zero1": Zero1,
    "zero2": Zero2,
    "zero3": Zero3,
    "fsdp": lambda d: FullyShardedDataParallel(d, shards=d),
    "tp": TensorParallel,
    "tp of sp": lambda d: TensorParallel(d, sequence_parallel=True),
    "sp": SequenceParallel,
    "cp": ContextParallel,
    "ep": ExpertParallel,
    "etp": lambda d: ExpertParallel(1, tensor=d),
    "1f1b": lambda d: PipelineParallel(d, microbatches=6),
    "interleaved": lambda d: PipelineParallel(d, microbatches=6 * d, chunks=3, schedule="interleaved"),
    "pipedream": lambda d: PipelineParallel(d, microbatches=6, schedule="pipedream"),
    "gpipe": lambda d: PipelineParallel(d, microbatches=1, schedule="gpipe"),
}


def gigabytes(strategy: AbstractStrategy) -> float:
    return float(sum(held(term, [strategy]) for term in STATES_OF_7B)) / 1e9


def per_element(strategies: Sequence[AbstractStrategy]) -> float:
    """Bytes that a GPT-3 block keeps per element of its residual stream."""
    return float(sum(held(term, strategies) for term in GPT3_BLOCK)) / SBH


def states_of(dim: str) -> list[Term]:
    return [Term("weight", role, {dim: 1024}, 2.0) for role in STATES]


# --- The published share and a published number, strategy by strategy -----------------------------


@pytest.mark.parametrize(
    ("strategy", "published"),
    [
        (DataParallel(64), 120.0),
        (Zero1(64), 31.4),
        (Zero2(64), 16.6),
        (Zero3(64), 1.9),
        (FullyShardedDataParallel(64, shards=64), 1.9),
    ],
    ids=lambda value: getattr(value, "label", None),
)
def test_7_5_billion_parameters_on_64_gpus_take_what_figure_1_of_zero_says(
    strategy: AbstractStrategy, published: float
) -> None:
    assert round(gigabytes(strategy), 1) == published


def test_ddp_shares_nothing_out() -> None:
    assert all(DataParallel(64).share(term) == 1 for term in TERMS)


def test_ddp_buckets_are_a_second_copy_of_the_gradients_only() -> None:
    # torch DistributedDataParallel, gradient_as_bucket_view: "peak memory saved will be equal to the
    # total gradients size".
    ddp = DataParallel(8, bucket_fraction=1.0)
    assert {term.role for term in TERMS if ddp.share(term) != 1} == {Role.GRADIENT}
    assert gigabytes(ddp) == pytest.approx((2 + 2 + 2 + 12) * 7.5)


def test_ddp_on_one_gpu_has_no_buckets() -> None:
    assert gigabytes(DataParallel(1, bucket_fraction=1.0)) == pytest.approx(120.0)


def test_zero1_shares_out_optimizer_states_only() -> None:
    for term in TERMS:
        assert Zero1(64).share(term) == (1 / 64 if term.role is Role.OPTIMIZER else 1)


def test_zero2_shares_out_gradients_but_not_parameters() -> None:
    for term in TERMS:
        cut = term.role in (Role.OPTIMIZER, Role.GRADIENT)
        assert Zero2(64).share(term) == (1 / 64 if cut else 1)


def test_zero3_shares_out_every_model_state_and_nothing_else() -> None:
    for term in TERMS:
        cut = term.role in (Role.OPTIMIZER, Role.GRADIENT, Role.PARAMETER)
        assert Zero3(64).share(term) == (1 / 64 if cut else 1)


def test_hsdp_shares_out_over_its_shards_not_over_its_replicas() -> None:
    # 120 GB over the 8 GPUs of a node, whatever the number of nodes.
    for nodes in (1, 2, 8):
        assert gigabytes(FullyShardedDataParallel(8 * nodes, shards=8)) == pytest.approx(15.0)


def test_fsdp_that_keeps_its_gathered_parameters_holds_a_copy_of_them_on_the_wires_width() -> None:
    # 1/64 of 16 bytes, and from the forward to the backward the whole parameters in 2 bytes.
    kept = FullyShardedDataParallel(64, shards=64, reshard_after_forward=False)
    assert gigabytes(kept) == pytest.approx(7.5 * 16 / 64)
    in_fp32 = Term("weights", Role.PARAMETER, {"hidden": PSI}, 4.0)
    assert held(in_fp32, [kept]) == PSI * 4 / 64
    assert kept.gathered(in_fp32, size_seen_by(kept, [kept])) == PSI * 2
    resharded = FullyShardedDataParallel(64, shards=64)
    assert resharded.gathered(in_fp32, size_seen_by(resharded, [resharded])) == 0
    # A pipeline keeps them gathered from its first micro-batch to its last.
    pipelined = FullyShardedDataParallel(64, shards=64, pipelined=1)
    assert pipelined.gathered(in_fp32, size_seen_by(pipelined, [pipelined])) == PSI * 2


def test_gpt3_keeps_114_bytes_per_element_without_any_strategy() -> None:
    assert per_element([]) == pytest.approx(34 + 80)


def test_tensor_parallelism_leaves_10_bytes_of_the_residual_stream_whole() -> None:
    # Equation 2: sbh(10 + 24/t + 5as/ht).
    assert per_element([TensorParallel(8)]) == pytest.approx(10 + 24 / 8 + 80 / 8)


def test_sequence_parallelism_cuts_the_rest_so_that_all_114_bytes_are_cut_by_t() -> None:
    # Equation 4: sbh/t (34 + 5as/h).
    assert per_element([TensorParallel(8, True), SequenceParallel(8)]) == pytest.approx(114 / 8)


def test_selective_recompute_saves_70_percent_of_gpt3s_activations() -> None:
    # Korthikanti et al. 2022, section 5 and table 2: 34/t with both.
    assert round(1 - per_element([Recompute(policy="selective")]) / per_element([]), 2) == 0.70
    all_three = [TensorParallel(8, True), SequenceParallel(8), Recompute(policy="selective")]
    assert per_element(all_three) == pytest.approx(34 / 8)


def test_full_recompute_keeps_2_bytes_per_element() -> None:
    # Table 2, last row: sbh(2), tensor parallelism or not.
    assert per_element([Recompute(policy="full")]) == pytest.approx(2)
    assert per_element([TensorParallel(8), Recompute(policy="full")]) == pytest.approx(2)


def test_full_recompute_takes_96_flops_where_72_were_taken() -> None:
    # Narayanan et al. 2021, arXiv:2104.04473, section 5.1: 96 B s l h^2 (...) with recomputation,
    # which is 72 for forward and backward and 24 for the forward once more.
    product = Term("product", Role.FLOPS, {"hidden": 12}, 6.0, UNTIL_FULL)
    assert held(product, [Recompute(policy="full")]) == pytest.approx(96)
    assert held(product, [Recompute(policy="selective")]) == 72


def test_recompute_sends_the_forwards_messages_again() -> None:
    # Four crossings of a block, two of them forward: six with the forward run twice.
    message = Term("regions", Role.MESSAGE, {"residual": 100, "crossings": 4}, 2.0, UNTIL_FULL)
    assert held(message, [Recompute(policy="full")]) == pytest.approx(6 * 200)


def test_recompute_leaves_model_states_and_transients_alone() -> None:
    for policy in ("none", "selective", "full"):
        for term in TERMS:
            if term.role in (*STATES, Role.TRANSIENT):
                assert Recompute(policy=policy).share(term) == 1


def test_first_stage_of_a_1f1b_pipeline_keeps_p_micro_batches_and_the_last_one() -> None:
    # Narayanan et al. 2021, section 2.2.1.
    activation = Term("block input", Role.ACTIVATION, {"residual": 8}, 2.0)
    shares = [PipelineParallel(8, stage=i, microbatches=64).share(activation) for i in range(8)]
    assert shares == [8, 7, 6, 5, 4, 3, 2, 1]


def test_interleaving_gpt3_in_3_chunks_of_8_stages_keeps_29_percent_more() -> None:
    # Korthikanti et al. 2022, section 4.2.3: a factor of 1 + (p - 1)/(p m) with m chunks.
    activation = Term("block input", Role.ACTIVATION, {"residual": 8}, 2.0)
    pipeline = PipelineParallel(8, stage=0, microbatches=64, chunks=3, schedule="interleaved")
    assert pipeline.share(activation) / 8 == pytest.approx(1 + 7 / 24)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "gpipe"])
def test_a_pipeline_multiplies_activations_and_nothing_else(schedule: str) -> None:
    pipeline = PipelineParallel(4, stage=0, microbatches=8, chunks=1, schedule=schedule)
    assert {term.role for term in TERMS if pipeline.share(term) != 1} == {Role.ACTIVATION}


# --- What a strategy may cut ----------------------------------------------------------------------


def test_tensor_parallelism_cuts_heads_kv_heads_ffn_and_vocab_only() -> None:
    tensor = TensorParallel(8)
    for term in TERMS:
        (dim,) = term.dims
        assert tensor.share(term) == (1 / 8 if dim in ("heads", "kv_heads", "ffn", "vocab") else 1)


def test_tensor_parallelism_cuts_a_term_once_though_two_of_its_dimensions_could_be() -> None:
    tied = Term("two cut dimensions", Role.PARAMETER, {"heads": 32, "ffn": 64}, 2.0)
    assert TensorParallel(8).share(tied) == 1 / 8


def test_sequence_parallelism_cuts_activations_transients_and_traffic_on_the_residual_stream() -> None:
    sequence = SequenceParallel(8)
    for term in TERMS:
        role_is_cut = term.role in (Role.ACTIVATION, Role.OUTPUT_GRADIENT, Role.TRANSIENT, Role.TRAFFIC)
        routed = term.role not in (*STATES, Role.BUFFER) and not {"routed", "router"}.isdisjoint(term.dims)
        cut = role_is_cut and "residual" in term.dims
        assert sequence.share(term) == (1 / 8 if cut or routed else 1)


def test_sequence_parallelism_leaves_messages_whole() -> None:
    message = Term("regions", Role.MESSAGE, {"batch": 1, "seq": 8, "residual": 16, "crossings": 4}, 2.0)
    assert SequenceParallel(8).share(message) == 1
    assert TensorParallel(8, sequence_parallel=True).share(message) == 1


def test_tensor_and_sequence_parallelism_never_cut_the_same_activation_twice() -> None:
    together = [TensorParallel(8, True), SequenceParallel(8)]
    for term in GPT3_BLOCK:
        assert held(term, together) == pytest.approx(term.amount / 8)


# --- Every strategy at once -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_DEGREE)
def test_degree_1_changes_nothing(name: str) -> None:
    strategy = OF_DEGREE[name](1)
    assert {float(strategy.share(term)) for term in TERMS} == {1.0}


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", OF_DEGREE)
def test_no_part_of_a_model_state_is_lost(name: str, degree: int) -> None:
    # Fewer than ``degree`` shares of 1/degree each would leave a part of it on no GPU.
    strategy = OF_DEGREE[name](degree)
    for term in TERMS:
        if term.role in STATES:
            assert strategy.share(term) * degree >= 1 - 1e-12


@given(
    degrees=st.tuples(*[st.integers(1, 64)] * 4),
    sharding=st.sampled_from(SHARDINGS),
    reshard=st.booleans(),
    sequence_parallel=st.booleans(),
    schedule=st.sampled_from(SCHEDULES),
)
@settings(deadline=None, max_examples=100)
def test_no_part_of_a_model_state_is_lost_by_strategies_together(
    degrees: tuple[int, int, int, int],
    sharding: str,
    reshard: bool,
    sequence_parallel: bool,
    schedule: str,
) -> None:
    shards, replicas, tensor, pipeline = degrees
    layout = Layout(
        shards * replicas,
        tensor,
        pipeline,
        grad_accum=pipeline,
        data_shards=shards,
        sequence_parallel=sequence_parallel,
        sharding=sharding,
        reshard_after_forward=reshard,
        schedule=schedule,
    )
    gpus = shards * replicas * tensor * pipeline
    together = strategies_of(layout, Wire())
    for dim in DIMS:
        for term in states_of(dim):
            assert held(term, together) * gpus >= term.amount * (1 - 1e-12)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_no_part_of_a_state_is_lost_among_context_and_expert_groups(sharding: str) -> None:
    for data, shards, c, t, e, own in ((6, 3, 4, 2, 8, 1), (8, 8, 2, 2, 4, 4), (4, 2, 1, 8, 16, 1)):
        kept = shards if sharding == "fsdp" else data
        layout = Layout(
            *(data, t, 3),
            data_shards=kept,
            sharding=sharding,
            sequence_parallel=True,
            context_parallel=c,
            expert_parallel=e,
            expert_tensor_parallel=own,
        )
        together = strategies_of(layout, Wire())
        copies = data // kept if sharding == "fsdp" else 1
        for dim in DIMS:
            for term in states_of(dim):
                part = held(term, together) / term.amount
                assert part * layout.world_size >= 1 - 1e-12
        expert = {"experts": 16, "hidden": 64, "expert_ffn": 32}
        weight = Term("expert", Role.OPTIMIZER, expert, 12.0)
        if sharding != "ddp":  # a pipeline stage has its layers whole: exactly once, but for replicas
            assert held(weight, together) * layout.world_size / 3 == pytest.approx(weight.amount * copies)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_order_of_all_seven_strategies_does_not_matter(sharding: str, policy: str) -> None:
    layout = Layout(
        *(12, 4, 5),
        grad_accum=9,
        sharding=sharding,
        sequence_parallel=True,
        context_parallel=2,
        expert_parallel=8,
    )
    together = strategies_of(layout, Wire(), stage=1, policy=policy)
    assert len(together) == 7
    orders = [*permutations(together)][::97]
    for term in TERMS:
        sizes = [float(held(term, some)) for some in orders]
        assert all(isclose(size, sizes[0], rel_tol=1e-12) for size in sizes)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_order_of_strategies_does_not_matter(sharding: str, policy: str) -> None:
    layout = Layout(
        12, 7, 5, grad_accum=9, data_shards=6, sharding=sharding, sequence_parallel=True, schedule="pipedream"
    )
    together = strategies_of(layout, Wire(bucket_fraction=1.0), stage=1, policy=policy)
    assert len(together) == 5
    for term in TERMS:
        sizes = [float(held(term, some)) for some in permutations(together)]
        assert all(isclose(size, sizes[0], rel_tol=1e-12) for size in sizes)


def test_what_a_gpu_holds_is_the_amount_times_all_shares() -> None:
    # A pipeline gives stages other layers; it takes no share of a layer's parameters.
    term = Term("up weight", Role.OPTIMIZER, {"hidden": 100, "ffn": 400}, 12.0)
    together = strategies_of(Layout(8, 4, 2, data_shards=8, sharding="zero1"), Wire())
    assert held(term, together) == pytest.approx(100 * 400 * 12 / 8 / 4)
    assert prod(strategy.share(term) for strategy in together) == pytest.approx(1 / 32)


ARRAYS: dict[str, Callable[..., AbstractStrategy]] = {
    "ddp": lambda d, i, m, v: DataParallel(d, bucket_fraction=0.5),
    "zero1": lambda d, i, m, v: Zero1(d),
    "zero2": lambda d, i, m, v: Zero2(d),
    "zero3": lambda d, i, m, v: Zero3(d),
    "fsdp": lambda d, i, m, v: FullyShardedDataParallel(2 * d, shards=d),
    "fsdp+keep": lambda d, i, m, v: FullyShardedDataParallel(d, shards=d, reshard_after_forward=False),
    "tp": lambda d, i, m, v: TensorParallel(d),
    "sp": lambda d, i, m, v: SequenceParallel(d),
    "cp": lambda d, i, m, v: ContextParallel(d),
    "ep": lambda d, i, m, v: ExpertParallel(d, v),
    "recompute": lambda d, i, m, v: Recompute(d, policy="selective"),
    **{
        schedule: lambda d, i, m, v, schedule=schedule: PipelineParallel(d, i, m, v, schedule)
        for schedule in SCHEDULES
    },
}


@pytest.mark.parametrize("name", ARRAYS)
def test_shares_of_arrays_are_the_shares_of_their_numbers(name: str) -> None:
    rows = [(1, 0, 3, 1), (2, 1, 2, 1), (3, 0, 9, 2), (8, 5, 16, 4), (8, 0, 8, 1), (64, 63, 128, 3)]
    whole = ARRAYS[name](*(np.array(column) for column in zip(*rows, strict=True)))
    alone = [ARRAYS[name](*row) for row in rows]
    for term in TERMS:
        family = np.broadcast_to(whole.share(term), (len(rows),))
        assert family.tolist() == pytest.approx([one.share(term) for one in alone], rel=1e-14)


# --- Objections: the value, the rule, the fix -----------------------------------------------------


def decoder(heads: int = 32, kv_heads: int = 8, ffn: int = 11008, seq: int = 4096, depth: int = 32) -> Layer:
    weights = [
        Term("query", Role.PARAMETER, {"hidden": 4096, "heads": heads, "head_dim": 128}, 2.0),
        Term("keys", Role.PARAMETER, {"hidden": 4096, "kv_heads": kv_heads, "head_dim": 128}, 2.0),
        Term("up", Role.PARAMETER, {"hidden": 4096, "ffn": ffn}, 2.0),
        Term("head", Role.PARAMETER, {"vocab": 50257, "hidden": 4096}, 2.0),
    ]
    regions = Term("regions", Role.MESSAGE, {"batch": 1, "seq": seq, "residual": 4096, "crossings": 4}, 2.0)
    return Layer("block", (*weights, regions), depth)


def interleaved(degree: int, microbatches: int, chunks: int = 2) -> PipelineParallel:
    return PipelineParallel(degree, 0, microbatches, chunks, "interleaved")


OBJECTIONS = [
    (TensorParallel(3), decoder(), "tensor_parallel=3", "heads=32", "1, 2, 4, 8, 16 or 32"),
    (TensorParallel(16), decoder(), "tensor_parallel=16", "kv_heads=8", "1, 2, 4 or 8"),
    (TensorParallel(8), decoder(ffn=100), "tensor_parallel=8", "ffn=100", "1, 2, 4, 5, 10, 20, 25 or 50"),
    (TensorParallel(2), decoder(kv_heads=1), "tensor_parallel=2", "kv_heads=1", "use 1"),
    (
        SequenceParallel(1),
        decoder(),
        "sequence_parallel",
        "without tensor parallelism",
        "use tensor_parallel 2",
    ),
    (SequenceParallel(8), decoder(seq=1001), "tensor_parallel=8", "seq_length=1001", "use"),
    (PipelineParallel(64), decoder(), "pipeline_parallel=64", "more than the 32 layers", "use 32 or fewer"),
    (interleaved(8, 16, 8), decoder(), "chunks=8", "more than the 32 layers", "use chunks 4 or fewer"),
    (interleaved(1, 4), decoder(), "interleaved", "without a pipeline", "use pipeline_parallel 2"),
    (interleaved(4, 6), decoder(), "grad_accum=6", "not a multiple of pipeline_parallel=4", "use"),
]


@pytest.mark.parametrize(("strategy", "layer", "value", "rule", "fix"), OBJECTIONS)
def test_an_objection_names_the_value_the_rule_and_the_fix(
    strategy: AbstractStrategy, layer: Layer, value: str, rule: str, fix: str
) -> None:
    said = next(text for text in strategy.objections([layer]) if value in text and rule in text)
    assert fix in said


@pytest.mark.parametrize(("kv_heads", "heads"), [(1, 32), (71, 71)])
def test_an_objection_with_one_fix_offers_no_empty_alternative(kv_heads: int, heads: int) -> None:
    # Multi-query attention has one head for keys; Falcon-7B (arXiv:2311.16867) has 71 for queries.
    objections = list(TensorParallel(2).objections([decoder(heads=heads, kv_heads=kv_heads)]))
    assert objections
    assert [said for said in objections if "use 1" not in said] == []


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_nothing_is_objected_to_degrees_that_divide(degree: int) -> None:
    layers = [decoder()]
    assert list(TensorParallel(degree).objections(layers)) == []
    assert list(PipelineParallel(degree, microbatches=8).objections(layers)) == []
    if degree > 1:
        assert list(SequenceParallel(degree).objections(layers)) == []
        assert list(interleaved(degree, 8).objections(layers)) == []


def test_a_vocabulary_that_does_not_divide_is_no_objection() -> None:
    # 50257 is odd; it is padded, not refused.
    assert not any("vocab" in said for said in TensorParallel(8).objections([decoder()]))


@pytest.mark.parametrize(
    "strategy", [DataParallel(7), Zero1(7), Zero2(7), Zero3(7), Recompute(policy="full")]
)
def test_data_parallelism_and_recompute_object_to_no_layers(strategy: AbstractStrategy) -> None:
    assert list(strategy.objections([decoder()])) == []
