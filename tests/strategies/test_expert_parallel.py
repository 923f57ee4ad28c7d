"""Expert parallelism: experts shared out, tokens sent to them, states of experts in their own group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from strategies.base import STATES, AbstractStrategy, Collective, Layer, Role, Term, held, size_seen_by
from strategies.expert_parallel import ExpertParallel
from strategies.layout import SHARDINGS, Layout, Wire, collectives_of, strategies_of

# A block of Mixtral 8x7B (arXiv:2401.04088, table 1): 8 experts 14,336 wide, 2 of them for a token.
EXPERTS, TOP, HIDDEN, FFN, SEQ = 8, 2, 4096, 14336, 8192
EXPERT = {"experts": EXPERTS, "hidden": HIDDEN, "expert_ffn": FFN}
ROUTED = {"batch": 1, "seq": SEQ, "routed": TOP}
UNTIL_FULL = ("none", "selective")
STATE_TERMS = [
    Term(name, role, dims, unit)
    for name, dims in (("experts", EXPERT | {"gate": 3}), ("router", {"hidden": HIDDEN, "router": EXPERTS}))
    for role, unit in zip(STATES, (2.0, 4.0, 12.0), strict=True)
]
DENSE = [Term("query", role, {"hidden": HIDDEN, "heads": 32, "head_dim": 128}, 2.0) for role in STATES]
TOKENS = Term("routed tokens", Role.MESSAGE, ROUTED | {"width": HIDDEN}, 2.0, UNTIL_FULL)
INPUT = Term("dispatched tokens", Role.ACTIVATION, ROUTED | {"width": HIDDEN}, 2.0, UNTIL_FULL)
INNER = Term("gate and up", Role.ACTIVATION, ROUTED | {"expert_ffn": FFN}, 4.0, UNTIL_FULL)
WORK = Term("experts", Role.FLOPS, ROUTED | {"hidden": HIDDEN, "expert_ffn": FFN}, 6.0, UNTIL_FULL)
BLOCK = Layer("block", (*STATE_TERMS, *DENSE, TOKENS, INPUT, INNER, WORK), 32)
MIXTURE = Layout(
    *(4, 2, 1), data_shards=4, context_parallel=2, expert_parallel=8, sequence_parallel=True, sharding="zero1"
)


def of(term: Term, together: Sequence[AbstractStrategy]) -> float:
    return float(held(term, together) / term.amount)


def messages(layout: Layout, axis: str, policy: str = "none") -> list[Collective]:
    found = collectives_of(BLOCK, strategies_of(layout, Wire(), 0, policy))
    return [one for one in found if one.axis == axis]


@pytest.mark.parametrize("e", [1, 2, 4, 8])
def test_a_gpu_holds_its_experts_and_as_many_tokens_whatever_their_number(e: int) -> None:
    # GShard (arXiv:2006.16668), section 3: evenly spread, what leaves a GPU comes back from others.
    expert = ExpertParallel(e)
    assert of(STATE_TERMS[0], [expert]) == 1 / e
    assert {of(term, [expert]) for term in (INPUT, INNER, WORK, *DENSE)} == {1.0}
    router = [term for term in STATE_TERMS if "router" in term.dims]
    assert {of(term, [expert]) for term in router} == {1.0}


def test_tensor_parallel_experts_have_more_tokens_of_a_narrower_expert() -> None:
    expert = ExpertParallel(2, tensor=4)
    assert of(STATE_TERMS[0], [expert]) == 1 / 8
    assert of(INPUT, [expert]) == 4
    assert of(INNER, [expert]) == of(WORK, [expert]) == 1


def test_tokens_are_cut_by_context_and_sequence_parallelism_before_they_are_routed() -> None:
    together = strategies_of(MIXTURE, Wire())
    for term in (INPUT, INNER, WORK, TOKENS):
        assert of(term, together) == pytest.approx(1 / 2 / 2)
    weight = Term("expert", Role.PARAMETER, EXPERT, 2.0)
    assert of(weight, together) == 1 / 8  # tensor parallelism does not cut an expert's width


def test_each_pass_sends_the_routed_tokens_there_and_back() -> None:
    found = messages(MIXTURE, "expert")
    assert [(one.kind, one.way, one.times) for one in found] == [
        ("all_to_all", "forward", 2),
        ("all_to_all", "backward", 2),
    ]
    assert {one.size for one in found} == {SEQ * TOP * HIDDEN * 2 / 2 / 2}
    again = messages(MIXTURE, "expert", "full")
    assert [one.times for one in again if one.way == "backward"] == [2, 2]


def test_tensor_parallel_experts_gather_each_others_tokens_and_scatter_the_results() -> None:
    layout = Layout(4, 4, sequence_parallel=True, expert_parallel=4, expert_tensor_parallel=4)
    found = messages(layout, "expert_tensor")
    assert [(one.kind, one.way) for one in found] == [
        ("all_gather", "forward"),
        ("reduce_scatter", "forward"),
        ("all_gather", "backward"),
        ("reduce_scatter", "backward"),
    ]
    # Gathered, they are the tokens that sequence parallelism had cut.
    assert {one.size for one in found} == {SEQ * TOP * HIDDEN * 2}


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_gradients_of_experts_are_reduced_in_a_smaller_group(sharding: str) -> None:
    # Of 4 x 2 x 2 ranks 8 share experts out; two have the same ones. All 8 data ranks have the same queries.
    layout = Layout(
        *(4, 2, 1),
        context_parallel=2,
        expert_parallel=8,
        sequence_parallel=True,
        sharding=sharding,
    )
    together = strategies_of(layout, Wire())
    assert (together[0].degree, layout.expert_shards) == (8, 2)
    expert, query = STATE_TERMS[2], DENSE[2]
    cut = sharding != "ddp"
    assert of(expert, together) == pytest.approx(1 / 8 / (2 if cut else 1))
    assert of(query, together) == pytest.approx(1 / 2 / (8 if cut else 1))
    dense_axis = "data_shard" if sharding == "fsdp" else "data"
    of_experts, of_others = messages(layout, "expert_data"), messages(layout, dense_axis)
    assert [(one.kind, one.per, one.behind) for one in of_experts] == [
        (one.kind, one.per, one.behind) for one in of_others
    ]
    elements = 3 * EXPERTS * HIDDEN * FFN / 8
    assert {one.size / elements for one in of_experts} <= {2.0, 4.0}


def test_hybrid_sharding_reduces_what_is_left_of_experts_among_the_replicas() -> None:
    layout = Layout(4, sharding="fsdp", data_shards=2, context_parallel=2, expert_parallel=2)
    assert layout.expert_shards == 2
    replicas = messages(layout, "data_replicate")
    sizes = [one.size for one in replicas]
    assert len(sizes) == 2
    weights = 3 * EXPERTS * HIDDEN * FFN
    assert sizes[1] == pytest.approx(weights / 2 / 2 * 2.0)  # experts, shards, bytes on the wire


def test_experts_that_nobody_shares_out_belong_to_tensor_parallel_ranks_too() -> None:
    # Each routes tokens of its own to them, so their gradients are reduced over these as well.
    layout = Layout(4, 8, sequence_parallel=True, sharding="zero1")
    assert layout.expert_shards == 32
    assert of(STATE_TERMS[2], strategies_of(layout, Wire())) == pytest.approx(1 / 32)


@pytest.mark.parametrize(
    ("strategy", "layer", "value", "rule", "fix"),
    [
        (ExpertParallel(3), BLOCK, "expert_parallel=3", "experts=8", "use 1, 2, 4, 8"),
        (ExpertParallel(1, 3), BLOCK, "expert_tensor_parallel=3", f"expert_ffn={FFN}", "use 1, 2, 4"),
        (
            ExpertParallel(2),
            Layer("block", tuple(DENSE)),
            "expert_parallel=2",
            "no routed experts",
            "use expert_parallel 1",
        ),
    ],
)
def test_an_objection_names_the_value_the_rule_and_the_fix(
    strategy: ExpertParallel, layer: Layer, value: str, rule: str, fix: str
) -> None:
    said = next(text for text in strategy.objections([layer]) if value in text and rule in text)
    assert fix in said


def test_nothing_is_objected_to_degrees_that_divide() -> None:
    assert not [said for e in (1, 2, 4, 8) for said in ExpertParallel(e, 2).objections([BLOCK])]


def test_arriving_tokens_take_room_in_the_backward_where_there_are_groups() -> None:
    def room(e: int) -> float:
        expert = ExpertParallel(e)
        return sum(float(b.size) for b in expert.workspace([BLOCK], size_seen_by(expert, [expert])))

    assert (room(1), room(4)) == (0, SEQ * TOP * HIDDEN * 2)
