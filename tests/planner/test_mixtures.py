"""Megatron's mixtures, latent attention and further tokens: rows against traces and sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import ClusterSpec, InputError, ModelSpec, estimate
from planner.api import explain
from planner.layers import Builder
from planner.model import Experts
from planner.overheads import library_bytes
from planner.specs import TrainingSpec
from planner.stages import price
from planner.weights import elements, mtp_weights
from strategies.base import Layer, Role, held
from strategies.layout import Layout, Wire, strategies_of
from tests.helpers import block_of, job_of, llama, saved, states

DATA = json.loads((Path(__file__).parents[1] / "data" / "traced_mixtures.json").read_text())
MIXTRAL = ModelSpec.from_catalog("mixtral-8x7b")
DEEPSEEK = ModelSpec.from_catalog("deepseek-v3")
MIB = 2**20


def cut(model: ModelSpec, layers: int) -> ModelSpec:
    return model.model_copy(update={"num_hidden_layers": layers, "mlps": model.mlps[-layers:]})


def small(**more: Any) -> ModelSpec:
    experts = Experts(num_experts=16, num_experts_per_tok=2, intermediate_size=512)
    return llama(4, 256, 8, 4, experts=experts, **more)


def mixture_block(model: ModelSpec, micro_batch_size: int = 1, **training: Any) -> Layer:
    job = job_of(model, "8xH100", **({"seq_length": 2048} | training))
    return block_of(job, micro_batch_size)


@pytest.mark.parametrize("row", DATA["rows"], ids=lambda row: row["id"])
def test_saved_bytes_of_a_mixture_as_traced(row: dict[str, Any]) -> None:
    """To 4 bytes, a scalar, with the scores recomputed or the block; a mask of s^2 bytes is left out else."""
    block = mixture_block(MIXTRAL, attention="eager", expert_capacity_factor=1.0)
    layout = Layout(data_parallel=8, expert_parallel=row["expert_parallel"])
    kept = saved(block, layout, row["recompute"])
    assert kept == pytest.approx(row["saved"], rel=0.006 if row["recompute"] == "none" else 1e-6)
    assert states(block, layout)[Role.PARAMETER] == 2 * row["parameters"]


def test_activations_of_a_padded_mixture_do_not_depend_on_expert_parallelism() -> None:
    block = mixture_block(MIXTRAL, expert_capacity_factor=1.25)
    assert len({saved(block, Layout(8, expert_parallel=e)) for e in (1, 2, 4, 8)}) == 1


def test_a_capacity_factor_multiplies_what_is_routed_and_nothing_else() -> None:
    def kept(factor: float | None) -> float:
        return saved(mixture_block(MIXTRAL, expert_capacity_factor=factor), Layout(8, expert_parallel=8))

    # Tokens 4h + gate, up, product 6f, probability, index, twice each, in bf16.
    routed = 2048 * 2 * (2 * 4096 + 6 * 14336 + 2 + 8)
    assert kept(1.0) == kept(None)
    assert kept(1.5) - kept(1.0) == pytest.approx(routed / 2)


def test_imbalance_counts_where_experts_lie_on_several_gpus() -> None:
    def kept(imbalance: float, degree: int) -> float:
        job = job_of(MIXTRAL, "8xH100", seq_length=2048, expert_imbalance=imbalance)
        layout = Layout(8, expert_parallel=degree, sharding="zero1")
        return float(price(job, layout, ("none",)).blocks[0].saved)

    assert kept(1.5, 1) == kept(1.0, 1) == kept(1.0, 8)
    assert kept(1.5, 8) - kept(1.0, 8) == pytest.approx(2048 * (2 * 4096 + 6 * 14336 + 10))


def test_latent_attention_keeps_compressed_and_expanded_queries_keys_and_values() -> None:
    """Elements of a token, by hand: DeepSeek-AI 2024, arXiv:2412.19437, section 4.2."""
    block = mixture_block(cut(DEEPSEEK, 2), seq_length=4096)
    heads, tokens = 128, 4096
    compressed = 2 * 1536 + 2 * 512 + 64
    expanded = heads * (192 + 192 + 128 + 128)
    mixture = 8 * (7168 + 3 * 2048) + 3 * 2048
    by_hand = 2 * (4 * 7168 + compressed + expanded + mixture)
    by_hand += 4 * heads + 8 + 8  # log-sum-exp, statistics of norms
    by_hand += 256 * (4 + 4 + 1 + 4 + 4) + 8 * (8 + 2)  # the router's
    assert saved(block) == pytest.approx(tokens * by_hand)


def test_tensor_parallelism_runs_compressing_products_for_own_tokens_and_holds_them_whole() -> None:
    block = mixture_block(cut(DEEPSEEK, 2), seq_length=4096)
    strategies = strategies_of(Layout(4, 2, sequence_parallel=True, expert_parallel=8), Wire())
    for term in block.by_role[Role.FLOPS]:
        if term.name in ("query down weight", "key and value down weight", "query up weight"):
            assert held(term, strategies) == term.amount / 2
    for term in block.by_role[Role.PARAMETER]:
        if "down weight" in term.name and "rank" in " ".join(term.dims):
            assert held(term, strategies) == term.amount


@pytest.mark.parametrize(
    ("option", "freed"),
    [
        ("mla_up_proj", 128 * (192 + 192 + 128) * 2),
        ("moe_act", 8 * 2048 * 2),
        ("shared_experts", 3 * 2048 * 2),
        ("norm", 2 * 7168 * 2),
    ],
)
def test_modules_that_are_recomputed_are_not_kept(option: str, freed: int) -> None:
    """Bytes of a token; what they take is run again, and is there while it is needed."""
    model = cut(DEEPSEEK, 2)
    plain, again = (
        job_of(model, "8xH100", seq_length=4096, options=options) for options in ({}, {option: "recomputed"})
    )
    assert saved(block_of(plain)) - saved(block_of(again)) == pytest.approx(4096 * freed)
    of_plain, of_again = (
        price(job, Layout(8, expert_parallel=8), ("none",)).blocks[0] for job in (plain, again)
    )
    assert of_again.working > of_plain.working - 4096 * freed
    if option in ("mla_up_proj", "shared_experts"):  # the others run memory-bound kernels alone
        assert of_again.seconds > of_plain.seconds


def test_recomputing_the_mixture_keeps_its_input_alone_and_sends_tokens_again() -> None:
    model = cut(DEEPSEEK, 2)
    job = job_of(model, "8xH100", seq_length=4096, global_batch_size=8, options={"moe": "recomputed"})
    plain = job_of(model, "8xH100", seq_length=4096, global_batch_size=8)
    assert not any("expert" in t.name or "routed" in t.dims for t in block_of(job).by_role[Role.ACTIVATION])
    sent = [
        explain(model, ClusterSpec.parse("8xH100"), one.training, Layout(8, expert_parallel=8))
        for one in (job, plain)
    ]
    times = [next(m.count for m in one.messages if m.axis == "expert") for one in sent]
    assert times[0] == times[1] * 1.5


def test_the_forward_of_a_mixture_needs_four_times_its_routed_tokens() -> None:
    """MoELayer.forward holds what it sent and what arrived while results come back (moe_layer.py)."""
    job = job_of(small(), "8xH100", seq_length=2048)
    routed = 2048 * 2 * 256 * 2
    for degree, copies in ((8, 4), (1, 3)):
        prices = price(job, Layout(8, expert_parallel=degree, sharding="zero1"), ("none",))
        arriving = float(prices.buffer_bytes[False, False]["inner"])
        assert float(prices.blocks[0].walk[0].passing) + arriving == copies * routed


def test_optimizer_states_of_experts_are_shared_out_over_their_own_group() -> None:
    """Megatron's distributed optimizer: 6 + 12/d bytes, of experts over the expert-data group."""
    block = mixture_block(MIXTRAL)
    layout = Layout(32, expert_parallel=8, sharding="zero1")
    experts = [t for t in block.by_role[Role.OPTIMIZER] if "experts" in t.dims]
    rest = [t for t in block.by_role[Role.OPTIMIZER] if "experts" not in t.dims]
    strategies = strategies_of(layout, Wire())
    assert sum(held(t, strategies) for t in experts) == sum(t.amount for t in experts) / 8 / 4
    assert sum(held(t, strategies) for t in rest) == pytest.approx(sum(t.amount for t in rest) / 32)


def test_grouped_products_have_four_workspaces() -> None:
    dense, mixture = (job_of(model, "8xH100", seq_length=2048) for model in (llama(), small()))
    assert library_bytes(mixture) - library_bytes(dense) == 4 * 32 * MIB
    local = job_of(small(), "8xH100", seq_length=2048, attention="eager")
    assert library_bytes(local) == library_bytes(dense)


def test_stand_in_gradients_are_of_single_experts() -> None:
    builder_of = job_of(small(), "8xH100", seq_length=2048)
    stage = Builder(builder_of.model, builder_of.training, builder_of.stack, builder_of.recipe).stage()
    sizes = {t.name: t.amount for t in stage.terms}
    assert sizes["stand-in gradient, experts' gate and up"] == 2 * 256 * 512 * 2
    assert sizes["stand-in gradient, experts' down"] == 256 * 512 * 2
    assert not any(name.endswith("gate and up") and "experts" not in name for name in sizes)


# --- Further tokens -------------------------------------------------------------------------------


def test_deepseek_v3s_module_has_the_published_parameters() -> None:
    """README_WEIGHTS.md of DeepSeek-V3: 11.5B of its own, beside embedding and head of 0.9B each."""
    own = elements(mtp_weights(DEEPSEEK))
    assert own == pytest.approx(11.5e9, rel=0.01)


def test_further_tokens_are_on_the_last_stage_with_a_copy_of_the_embedding() -> None:
    model = cut(DEEPSEEK, 8)
    layout = Layout(8, pipeline_parallel=2, expert_parallel=8, grad_accum=4, sharding="zero1")

    def stages(options: dict[str, str]) -> list[dict[str, float]]:
        training = TrainingSpec(seq_length=4096, global_batch_size=32, options=options)
        plan = estimate(model, ClusterSpec.parse("16xH200"), training, layout)
        return [stage.components for stage in plan.stages]

    without, with_it = stages({}), stages({"mtp": "on"})
    assert without[0]["parameters"] == with_it[0]["parameters"]
    own = elements(w for w in mtp_weights(model) if "experts" not in w.dims)
    own += elements(w for w in mtp_weights(model) if "experts" in w.dims) / 8
    more = with_it[1]["parameters"] - without[1]["parameters"]
    assert more == pytest.approx(2 * (own + model.vocab_size * model.hidden_size), rel=1e-3)
    # Logits and probabilities of a second loss, and a block's activations.
    assert with_it[1]["logits"] - without[1]["logits"] >= 4 * 4096 * model.vocab_size
    assert with_it[1]["activations"] > without[1]["activations"] + saved(
        mixture_block(model, seq_length=4096)
    )


def test_what_is_left_out_of_further_tokens_is_said() -> None:
    job = job_of(cut(DEEPSEEK, 4), "8xH200", seq_length=4096)
    assert any("further tokens are left out: option mtp=on" in n for n in job.assumptions)


def test_context_parallelism_sends_keys_and_narrower_values() -> None:
    """128 heads of 192 and 128 elements a token, over 2 GPUs: half of them go to the other."""
    model = cut(DEEPSEEK, 2)
    training = TrainingSpec(seq_length=8192, global_batch_size=4)
    layout = Layout(4, context_parallel=2, expert_parallel=8, sharding="zero1")
    found = explain(model, ClusterSpec.parse("8xH200"), training, layout)
    sent = {m.size for m in found.messages if m.axis == "context"}
    assert 4096 * 128 * (192 + 128) * 2 in sent


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "training", "said"),
    [
        ("mixtral-8x7b", {"options": {"dispatcher": "flex"}}, "dispatcher=flex is not offered"),
        ("mixtral-8x7b", {"options": {"mla_up_proj": "recomputed"}}, "has no latent that it is of"),
        ("llama-3.1-8b", {"options": {"moe_act": "recomputed"}}, "has no experts that it is of"),
        ("mixtral-8x7b", {"options": {"mtp": "on"}}, "has no mtp layers that it is of"),
        (
            "mixtral-8x7b",
            {"precision": "fp8-delayed", "options": {"moe_act": "recomputed"}},
            "moe_act=recomputed is not planned with precision=fp8-delayed: use moe_act=kept",
        ),
        (
            "deepseek-v3",
            {"attention": "eager"},
            "attention=eager: .* deepseek_v3, whose latent attention.s products were .*: leave out attention",
        ),
        ("llama-4-scout", {}, "mixtures of experts of llama4_text's kind"),
        ("qwen2-57b-a14b", {"framework": "deepspeed"}, "not planned in deepspeed"),
        ("llama-3.1-8b", {"expert_imbalance": 1.5}, "has no routed experts"),
        ("llama-3.1-8b", {"expert_capacity_factor": 1.5}, "has no routed experts"),
    ],
)
def test_what_megatron_is_not_planned_with_is_refused(
    model: str, training: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        job_of(ModelSpec.from_catalog(model), "8xH100", **training)
