"""Context parallelism: 1/c of what has a place in the sequence, and the papers' messages."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.base import STATES, AbstractStrategy, Collective, Layer, Role, Term, held, size_seen_by
from strategies.context_parallel import COMMS, ContextParallel
from strategies.layout import Layout, Wire, collectives_of, strategies_of
from strategies.recompute import Recompute
from strategies.sequence_parallel import SequenceParallel
from strategies.tensor_parallel import TensorParallel

# A block of Llama 3 8B: 32 heads, 8 of keys, of 128; sequences of 131,072 tokens in half precision.
SEQ, HEADS, KV_HEADS, WIDTH = 131072, 32, 8, 128
TOKENS = {"batch": 1, "seq": SEQ}
UNTIL_FULL = ("none", "selective")
KV = Term("kv", Role.MESSAGE, TOKENS | {"kv_heads": KV_HEADS, "head_dim": WIDTH, "pair": 2}, 2.0, UNTIL_FULL)
Q = Term("q", Role.MESSAGE, TOKENS | {"heads": HEADS, "head_dim": WIDTH, "pair": 2}, 2.0, UNTIL_FULL)
REGIONS = Term("regions", Role.MESSAGE, TOKENS | {"residual": 4096, "crossings": 4}, 2.0, UNTIL_FULL)
WEIGHT = Term("up", Role.PARAMETER, {"hidden": 4096, "ffn": 14336}, 2.0)
CORE = Term("core", Role.FLOPS, TOKENS | {"seq_k": SEQ, "heads": HEADS, "head_dim": WIDTH}, 7.0, UNTIL_FULL)
BLOCK = Layer("block", (WEIGHT, CORE, REGIONS, KV, Q), 32)
KV_BYTES = 2 * SEQ * KV_HEADS * WIDTH * 2
LEVELS = {"ulysses_degree": 4}  # of ulysses+ring; no other way has two


def context(degree: int, comm: str = "ring", **more: Any) -> ContextParallel:
    return ContextParallel(degree, comm, **(LEVELS if comm == "ulysses+ring" else {}) | more)


def sends(strategy: AbstractStrategy, *others: AbstractStrategy) -> list[Collective]:
    together = [strategy, *others]
    return list(strategy.collectives(BLOCK, size_seen_by(strategy, together)))


def buffers(strategy: ContextParallel, *others: AbstractStrategy) -> dict[str, float]:
    size = size_seen_by(strategy, [strategy, *others])
    return {one.name: float(one.size) for one in strategy.workspace([BLOCK], size)}


@pytest.mark.parametrize("role", Role)
def test_everything_with_a_place_in_the_sequence_is_cut_but_no_state(role: Role) -> None:
    context = ContextParallel(4)
    assert context.share(Term("x", role, {"seq": 64, "hidden": 8}, 2.0)) == (1 if role in STATES else 1 / 4)
    assert context.share(Term("x", role, {"seq_k": 64, "hidden": 8}, 2.0)) == 1


def test_attention_takes_one_cth_of_its_work_not_one_of_c_squared() -> None:
    # Balanced by zig-zag every GPU has its queries against all keys: s/c x s.
    assert held(CORE, [ContextParallel(8)]) == pytest.approx(CORE.amount / 8)


def test_a_ring_sends_key_and_value_blocks_of_4_c_d_bytes() -> None:
    # Liu et al. 2023, arXiv:2310.01889, section 3: blocks of c tokens, d wide: 4cd bytes of k and v.
    whole = Term("kv", Role.MESSAGE, TOKENS | {"kv_heads": HEADS, "head_dim": WIDTH, "pair": 2}, 2.0)
    layer = Layer("block", (whole,))
    ring = ContextParallel(16)
    forward, backward = ring.collectives(layer, size_seen_by(ring, [ring]))
    block = SEQ // 16
    assert (forward.kind, forward.size, forward.times) == ("send", 4 * block * HEADS * WIDTH, 15)
    assert forward.behind == backward.behind == "attention"
    # Their gradients go with them on the way back (Transformer Engine, AttnFuncWithCPAndKVP2P).
    assert (backward.size, backward.times) == (2 * forward.size, 15)


def test_an_all_gather_ends_with_the_keys_and_values_of_the_whole_sequence() -> None:
    # Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2: before attention, so exposed.
    found = sends(ContextParallel(16, "all-gather"))
    assert [(one.kind, one.way) for one in found] == [
        ("all_gather", "forward"),
        ("all_gather", "backward"),
        ("reduce_scatter", "backward"),
    ]
    assert {(one.size, one.times, one.behind) for one in found} == {(KV_BYTES, 1, "")}


def test_ulysses_hands_out_4_n_h_over_p_elements() -> None:
    # Jacobs et al. 2023, arXiv:2309.14509, section 3, where keys have as many heads as queries.
    ulysses = ContextParallel(8, "ulysses")
    wide = Term("kv", Role.MESSAGE, Q.dims | {"kv_heads": HEADS}, 2.0)
    dims = {name: n for name, n in wide.dims.items() if name != "heads"}
    layer = Layer("block", (Term("kv", Role.MESSAGE, dims, 2.0), Q))
    found = list(ulysses.collectives(layer, size_seen_by(ulysses, [ulysses])))
    for way in ("forward", "backward"):
        elements = sum(one.size * one.times / 2.0 for one in found if one.way == way)
        assert elements == 4 * SEQ * HEADS * WIDTH / 8
        assert sum(one.times for one in found if one.way == way) == 4
    assert {one.kind for one in found} == {"all_to_all"}


def test_grouped_queries_make_ulysses_cheaper_by_what_keys_are_narrower() -> None:
    forward = [one for one in sends(ContextParallel(8, "ulysses")) if one.way == "forward"]
    sizes = sorted(one.size for one in forward)
    assert sizes == [SEQ * KV_HEADS * WIDTH * 2 / 8, SEQ * HEADS * WIDTH * 2 / 8]


def moved(strategy: ContextParallel) -> list[tuple[object, ...]]:
    """What is sent, but for what a group of one GPU sends itself, and which level it is sent on."""
    of_level = {"heads": strategy.head_ranks, "ring": strategy.degree // strategy.head_ranks}
    return [
        (one.kind, float(one.size), one.times, one.way, one.behind)
        for one in sends(strategy)
        if of_level.get(one.axis.removeprefix("context_"), strategy.degree) > 1
    ]


@pytest.mark.parametrize(("u", "end"), [(1, "ring"), (16, "ulysses")])
def test_ring_and_ulysses_are_the_ends_of_both_at_once(u: int, end: str) -> None:
    both, one = ContextParallel(16, "ulysses+ring", ulysses_degree=u), ContextParallel(16, end)
    assert moved(both) == moved(one)
    assert len(moved(one)) == {"ring": 2, "ulysses": 4}[end]
    assert {n: size for n, size in buffers(both).items() if size} == buffers(one)
    assert [both.share(term) for term in BLOCK.terms] == [one.share(term) for term in BLOCK.terms]


def test_of_two_levels_the_inner_one_hands_out_heads_and_rings_join_those_of_equal_heads() -> None:
    # Fang and Zhao 2024, arXiv:2405.07719; Transformer Engine's AttnFuncWithCPAndKVP2P with two groups.
    found = sends(ContextParallel(16, "ulysses+ring", ulysses_degree=8))
    inner = [one for one in found if one.axis == "context_heads"]
    assert {one.kind for one in inner} == {"all_to_all"}
    # Queries, keys and values before attention, their output after it: each GPU's own tokens of each.
    forward = sum(one.size * one.times for one in inner if one.way == "forward")
    assert forward == 2 * SEQ / 16 * (HEADS + KV_HEADS) * WIDTH * 2
    outer = [one for one in found if one.axis == "context_ring"]
    assert [(one.kind, one.way, one.size, one.times, one.behind) for one in outer] == [
        ("send", "forward", KV_BYTES / 16, 1, "attention"),
        ("send", "backward", 2 * KV_BYTES / 16, 1, "attention"),
    ]
    assert len(found) == len(inner) + len(outer)


@pytest.mark.parametrize("u", [2, 4, 8, 16])
def test_two_levels_send_what_the_papers_table_says(u: int) -> None:
    # Fang and Zhao 2024, arXiv:2405.07719, table 2: 8 all-to-alls of 8/N O(bs L d) elements, with G query
    # heads to a key 4/N + 4/(N G); with the ring no more than a ring alone sends.
    n, groups = 16, HEADS // KV_HEADS
    found = sends(ContextParallel(n, "ulysses+ring", ulysses_degree=u))
    inner = [one for one in found if one.axis == "context_heads"]
    assert sum(one.times for one in inner) == 8
    elements = sum(one.size * one.times for one in inner) / 2
    assert elements == pytest.approx((4 / n + 4 / n / groups) * SEQ * HEADS * WIDTH)
    # Forward a ring passes on all of keys and values but its own part, 2 O(bs L d / G) (n - 1) / n.
    ring, rings = (
        sum(one.size * one.times for one in these if one.kind == "send" and one.way == "forward") / 2
        for these in (sends(ContextParallel(n)), found)
    )
    assert ring == pytest.approx(2 * SEQ * KV_HEADS * WIDTH * (n - 1) / n)
    assert rings == pytest.approx(ring * (n / u - 1) / (n - 1))


@pytest.mark.parametrize("comm", COMMS)
def test_tensor_parallelism_leaves_1_t_of_the_heads_to_send(comm: str) -> None:
    strategy = context(8, comm)
    alone, cut = sends(strategy), sends(strategy, TensorParallel(8, True), SequenceParallel(8))
    assert [one.size for one in cut] == pytest.approx([one.size / 8 for one in alone])


@pytest.mark.parametrize("comm", COMMS)
def test_recompute_sends_what_the_forward_sends_once_more(comm: str) -> None:
    layout = Layout(context_parallel=8, context_comm=comm, ulysses_degree=4)
    counts = {}
    for policy in ("none", "selective", "full"):
        found = collectives_of(BLOCK, strategies_of(layout, Wire(), 0, policy))
        on = [one for one in found if one.axis.startswith("context")]
        counts[policy] = sum(one.size * one.times for one in on if one.way == "backward")
        forward = sum(one.size * one.times for one in on if one.way == "forward")
    assert counts["selective"] == counts["none"]
    assert counts["full"] == pytest.approx(counts["none"] + forward)


def test_pytorch_sends_gradients_round_in_fp32_even_where_it_gathers() -> None:
    # torch 2.13, tensor/experimental/_context_parallel/_attention.py: dkv_rotater, convert_to_f32.
    found = sends(ContextParallel(4, "all-gather", rotated_bytes=4.0))
    assert [(one.kind, one.way) for one in found][2] == ("send", "backward")
    assert found[2].size * found[2].times == pytest.approx(2 * KV_BYTES * 3 / 4)
    back = sends(ContextParallel(4, "ring", rotated_bytes=4.0))[1]
    assert back.size == pytest.approx((1 + 2) * KV_BYTES / 4)


def test_tensor_parallelism_sends_the_residual_stream_only() -> None:
    tensor = TensorParallel(8)
    found = sends(tensor, ContextParallel(4))
    assert {one.size for one in found} == {SEQ * 4096 * 2 / 4}


def test_workspace_is_two_neighbours_or_the_whole_keys_and_values() -> None:
    # Transformer Engine: two buffers of keys, values and their gradients; gathered whole, both.
    assert list(buffers(ContextParallel(8)).values()) == [2 * 2 * KV_BYTES / 8]
    assert list(buffers(ContextParallel(8, "all-gather")).values()) == [KV_BYTES, KV_BYTES]
    arriving = SEQ * HEADS * WIDTH * 2 / 8
    assert list(buffers(ContextParallel(8, "ulysses")).values()) == [arriving]
    # Its buffers of the ring are there while the gradients of heads go back to their tokens.
    assert list(buffers(context(8, "ulysses+ring")).values()) == [arriving, 2 * 2 * KV_BYTES / 8]
    for comm in COMMS:
        assert not any(buffers(ContextParallel(1, comm)).values())


@pytest.mark.parametrize(
    ("strategy", "seq", "value", "rule", "fix"),
    [
        (ContextParallel(3), SEQ, "context_parallel=3", f"seq_length={SEQ}", "a multiple of 6"),
        (ContextParallel(8), 8, "context_parallel=8", "seq_length=8", "a multiple of 16"),
        (ContextParallel(16, "ulysses"), SEQ, "context_parallel=16", "kv_heads=8", "context_comm ring"),
        (
            ContextParallel(4, "ulysses", tensor=4),
            SEQ,
            "tensor_parallel=4 x context_parallel=4",
            "kv_heads=8",
            "context_comm ring",
        ),
        (
            context(8, "ulysses+ring", ulysses_degree=3),
            SEQ,
            "ulysses_degree=3",
            "two levels of context_parallel=8",
            "use ulysses_degree 2, 4, or context_comm ring or ulysses",
        ),
        (
            context(2, "ulysses+ring", ulysses_degree=1),
            SEQ,
            "ulysses_degree=1",
            "two levels of context_parallel=2",
            "use context_comm ring",
        ),
        (
            context(4, "ulysses+ring"),
            SEQ,
            "ulysses_degree=4",
            "two levels of context_parallel=4",
            "use ulysses_degree 2, or context_comm ulysses",
        ),
        (context(12, "ulysses+ring"), SEQ, "context_parallel=12", f"seq_length={SEQ}", "a multiple of 24"),
        (
            context(32, "ulysses+ring", ulysses_degree=16),
            SEQ,
            "ulysses_degree=16",
            "kv_heads=8",
            "use a ulysses_degree that does, or context_comm ring",
        ),
        (
            context(8, "ulysses+ring", tensor=4),
            SEQ,
            "tensor_parallel=4 x ulysses_degree=4",
            "kv_heads=8",
            "context_comm ring",
        ),
        (
            ContextParallel(2, "ring", tensor=3, sequence_parallel=True),
            SEQ,
            "tensor_parallel=3 x context_parallel=2",
            f"seq_length={SEQ}",
            "a multiple of 6",
        ),
    ],
)
def test_an_objection_names_the_value_the_rule_and_the_fix(
    strategy: ContextParallel, seq: int, value: str, rule: str, fix: str
) -> None:
    terms = [Term(t.name, t.role, dict(t.dims) | {"seq": seq}, t.unit) for t in (KV, Q)]
    said = [
        one for one in strategy.objections([Layer("block", tuple(terms))]) if value in one and rule in one
    ]
    assert said
    assert fix in said[0]


@pytest.mark.parametrize("comm", COMMS)
def test_nothing_is_objected_to_degrees_that_divide(comm: str) -> None:
    for c in (1, 2, 4, 8) if comm != "ulysses+ring" else (8, 16, 64):
        assert not list(context(c, comm).objections([BLOCK]))


def test_recompute_of_attention_frees_nothing_that_context_parallelism_counts() -> None:
    both = [ContextParallel(4), Recompute(policy="full")]
    assert held(CORE, both) == pytest.approx(CORE.amount / 4 * 4 / 3)
