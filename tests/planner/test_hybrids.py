"""State spaces and blocks of one part: what Megatron-LM keeps of them, against its code and its own runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import ClusterSpec, InputError, ModelSpec, TrainingSpec, estimate, search
from planner.defaults import Job, resolve
from planner.layers import Builder
from planner.layouts import enumerate_layouts
from planner.ledger import tensor_entries, view
from planner.model import Block, DeltaNet, StateSpace
from planner.replay import StageReplay
from planner.stacks import STACKS
from planner.stages import price
from strategies.base import Layer, Role, held
from strategies.layout import Layout, Wire, strategies_of
from tests.helpers import gpt, job_of, llama, saved
from tests.planner.cases import layouts, splits

RUNS = json.loads((Path(__file__).parents[1] / "data/hybrid_runs.json").read_text())
NEMOTRON = ModelSpec.from_catalog("nemotron-h-8b")
MAMBA, ATTENTION, MLP = Block("mamba", "none"), Block("full", "none"), Block("none", "dense")
PARTS = {"M": MAMBA, "*": ATTENTION, "-": MLP}
# Gated delta nets and the attention between them have an MLP each.
WHOLE = {"D": Block("delta", "dense"), "G": Block("full", "dense")}


def of_parts(model: ModelSpec, pattern: str, **space: int) -> ModelSpec:
    """The model with blocks of one part each, as Megatron-LM's ``--hybrid-layer-pattern`` writes them."""
    changes: dict[str, Any] = {
        "model_type": "nemotron_h",
        "num_hidden_layers": len(pattern),
        "mixers": tuple((PARTS | WHOLE)[letter].mixer for letter in pattern),
        "mlps": tuple((PARTS | WHOLE)[letter].mlp for letter in pattern),
        "state_space": StateSpace(**space) if space else None,
    }
    return ModelSpec(**(model.model_dump() | changes))


def layer_of(job: Job, kind: Block, micro: int = 1, tensor: int = 1) -> Layer:
    return Builder(job.model, job.training, job.stack, job.recipe, micro, tensor).block(kind)


def sizes(layer: Layer, role: Role, layout: Layout, step: str = "") -> dict[str, float]:
    """Bytes of each term of a role on one GPU, of transients in one step."""
    *strategies, _ = strategies_of(layout, Wire(), 0, "none")
    found: dict[str, float] = {}
    for term in layer.by_role[role]:
        if not step or step in term.steps:
            share = len(term.steps) if step else 1
            found[term.name] = found.get(term.name, 0.0) + float(held(term, strategies)) / share
    return found


def shapes(tensor: int, sequence_parallel: bool, b: int, s: int) -> Mapping[str, int]:
    """Lengths of Nemotron-H 8B's state space on one of ``tensor`` GPUs, as mamba_mixer.py names them."""
    space = NEMOTRON.state_space
    assert space is not None
    local: dict[str, int] = {"b": b, "l": s, "d_model": NEMOTRON.hidden_size}
    local["stream"] = s // tensor if sequence_parallel else s
    local["nheads"] = space.num_heads // tensor
    local["ngroups"], local["n"] = space.n_groups // tensor, space.state_size
    local["d_inner"] = local["nheads"] * space.head_dim
    local["zxbcdt"] = 2 * local["d_inner"] + 2 * local["ngroups"] * local["n"] + local["nheads"]
    local["xbc"] = local["d_inner"] + 2 * local["ngroups"] * local["n"]
    return local


@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, True), (4, False), (8, True)])
@pytest.mark.parametrize("b", [1, 4])
def test_a_state_space_keeps_what_its_kernels_save_for_the_backward(
    tensor: int, sequence_parallel: bool, b: int
) -> None:
    """TELayerNormColumnParallelLinear: input, norm's output, 1 / rms; MambaSplitConv1dScanCombinedFn:
    zxbcdt, out_x; LayerNormFn of the gated norm: x, rstd by group; TERowParallelLinear: input."""
    job = job_of(NEMOTRON, "8xH100", framework="megatron", seq_length=2048, precision="bf16")
    layout = Layout(tensor_parallel=tensor, sequence_parallel=sequence_parallel, micro_batch_size=b)
    at = shapes(tensor, sequence_parallel, b, 2048)
    stream = at["b"] * at["stream"]
    tokens = at["b"] * at["l"]
    by_hand = 2 * stream * at["d_model"] + 2 * stream * at["d_model"] + 4 * stream
    by_hand += 2 * tokens * at["zxbcdt"] + 2 * tokens * at["d_inner"]
    by_hand += 2 * tokens * at["d_inner"] + 4 * tokens * at["ngroups"] + 2 * tokens * at["d_inner"]
    layer = layer_of(job, MAMBA, b, tensor)
    assert saved(layer, layout) == by_hand
    assert saved(layer, layout, "selective") == by_hand  # core attention is none of it
    assert saved(layer, layout, "full") == 2 * stream * at["d_model"]


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_a_scans_backward_has_the_tensors_that_its_function_makes(tensor: int) -> None:
    """What lives in ``_mamba_chunk_scan_combined_bwd`` as states' gradients are passed on, and later."""
    job = job_of(NEMOTRON, "8xH100", framework="megatron", seq_length=2048, precision="bf16")
    layout = Layout(tensor_parallel=tensor, sequence_parallel=tensor > 1)
    at = shapes(tensor, tensor > 1, 1, 2048)
    heads, groups, n, chunk = at["nheads"], at["ngroups"], at["n"], 128
    chunks, tokens, inner = 2048 // chunk, 2048, at["d_inner"]
    both = {
        "gradient of the residual stream": 2 * at["stream"] * at["d_model"],
        "dout, dout_x": 2 * 2 * tokens * inner,
        "xBC_conv, dxBC": 2 * 2 * tokens * at["xbc"],
        "dzxbcdt": 2 * tokens * at["zxbcdt"],
        "dt_in": 2 * tokens * heads,
        "CB": 4 * chunks * groups * chunk * chunk,
        "states, dstates": 2 * 2 * chunks * inner * n,
    }
    passing = {"states, dstates in fp32": 2 * 4 * chunks * inner * n, "dt, dA_cumsum": 2 * 4 * tokens * heads}
    last = {
        "dB, dC": 2 * 4 * tokens * groups * n,
        "dcb, and its sum": 2 * 4 * chunks * groups * chunk * chunk,
        "dt, dA_cumsum, ddt, ddA_next, ddA_prev, ddA_cumsum_prev": 6 * 4 * tokens * heads,
        "flipped": 4 * tokens * heads,
        "blocks of 32 rows of ddA, and their sum": (chunk // 32 + 1) * 4 * tokens * heads,
    }
    layer = layer_of(job, MAMBA, 1, tensor)
    found = {step: sum(sizes(layer, Role.TRANSIENT, layout, step).values()) for step in ("scan", "core")}
    assert found["scan"] == sum(both.values()) + sum(passing.values())
    assert found["core"] == sum(both.values()) + sum(last.values())


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_parameters_of_a_gpu_are_those_of_megatrons_mixer(tensor: int) -> None:
    """in_proj, conv1d with its bias, A_log, D and dt_bias, the gated norm, out_proj; the norm is repeated."""
    job = job_of(NEMOTRON, "8xH100", framework="megatron", seq_length=2048, precision="bf16")
    at = shapes(tensor, False, 1, 2048)
    own = at["d_model"] * at["zxbcdt"] + at["xbc"] * (4 + 1) + 3 * at["nheads"] + at["d_inner"]
    own += at["d_inner"] * at["d_model"] + at["d_model"]
    layer = layer_of(job, MAMBA, 1, tensor)
    assert sum(sizes(layer, Role.PARAMETER, Layout(tensor_parallel=tensor)).values()) == 2 * own


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("policy", ["none", "selective"])
def test_attention_and_an_mlp_apart_are_a_block_of_both(kind: str, attention: str, policy: str) -> None:
    """One norm and one sum each: the input of the MLP's is what the block keeps for its second norm."""
    made = gpt(2, 256, 8, vocab=1000) if kind == "gpt" else llama(2)
    training = {"framework": "megatron", "seq_length": 256, "attention": attention, "precision": "bf16"}
    whole, parts = job_of(made, **training), job_of(of_parts(made, "*-"), **training)
    layout = Layout(tensor_parallel=2, sequence_parallel=True, micro_batch_size=3)
    block = layer_of(whole, Block(), 3, 2)
    layers = [layer_of(parts, one, 3, 2) for one in (ATTENTION, MLP)]
    assert sum(saved(layer, layout, policy) for layer in layers) == saved(block, layout, policy)
    for role in (Role.PARAMETER, Role.GRADIENT, Role.OPTIMIZER, Role.FLOPS, Role.TRAFFIC, Role.MESSAGE):
        apart = sum(sum(sizes(layer, role, layout).values()) for layer in layers)
        assert apart == pytest.approx(sum(sizes(block, role, layout).values()))
    for step in block.steps:  # a part's own steps are the block's
        one = layers[step in ("down", "act", "up", "norm2")]
        expected = sum(sizes(block, Role.TRANSIENT, layout, step).values())
        assert sum(sizes(one, Role.TRANSIENT, layout, step).values()) == pytest.approx(expected)


def test_a_state_spaces_work_is_what_megatron_counts_but_for_the_convolution() -> None:
    model = ModelSpec.from_catalog("mamba-codestral-7b")
    job = job_of(model, "8xH100", framework="megatron", seq_length=4096, precision="bf16")
    space = model.state_space
    assert space is not None
    channels = space.num_heads * space.head_dim + 2 * space.n_groups * space.state_size
    layer = layer_of(job, MAMBA)
    work = sum(sizes(layer, Role.FLOPS, Layout()).values()) / 4096 * model.num_hidden_layers
    head = 6 * model.hidden_size * model.vocab_size
    convolutions = 6 * channels * space.conv_kernel * model.num_hidden_layers
    assert work + head + convolutions == model.flops_per_token(4096)


def measured_job() -> tuple[ModelSpec, TrainingSpec]:
    shape = {name: value for name, value in RUNS["model"].items() if name not in ("pattern", "state_space")}
    usual = gpt(1, 1024, 16).model_dump() | shape
    model = of_parts(ModelSpec(**usual), RUNS["model"]["pattern"], **RUNS["model"]["state_space"])
    training = TrainingSpec(
        framework="megatron", precision="bf16", seq_length=1024, global_batch_size=32, attention="eager"
    )
    return model, training


@pytest.mark.parametrize("run", RUNS["runs"], ids=lambda run: f"tp{run['tensor']}pp{run['pipeline']}")
def test_megatrons_own_hybrid_runs_allocate_what_is_predicted(run: dict[str, Any]) -> None:
    """Within 2 %, and never more; their steps, of small kernels, take 1.06 to 1.19 times as long."""
    model, training = measured_job()
    replicas = 8 // run["tensor"] // run["pipeline"]
    layout = Layout(
        data_parallel=replicas,
        tensor_parallel=run["tensor"],
        pipeline_parallel=run["pipeline"],
        chunks=run["chunks"],
        schedule="interleaved" if run["chunks"] > 1 else "1f1b",
        micro_batch_size=4,
        grad_accum=8 // replicas,
        sharding="zero1",
    )
    plan = estimate(model, ClusterSpec.parse("8xH100"), training, layout)
    assert 0 <= plan.stages[-1].tensor_bytes / run["allocated_bytes"] - 1 <= 0.02
    assert plan.step_time_least_s <= run["seconds"] <= plan.step_time_most_s


@st.composite
def hybrids(draw: st.DrawFn) -> tuple[Job, Layout]:
    """A small model of blocks of one part each, on a layout whose degrees divide what they cut."""
    groups = draw(st.sampled_from([1, 2, 4]))
    made = (gpt if draw(st.booleans()) else llama)(1, 64, 8)
    made = made.model_copy(update={"num_key_value_heads": groups, "max_position_embeddings": 512})
    space = {"num_heads": groups * draw(st.sampled_from([1, 3, 8])), "n_groups": groups}
    space |= {name: draw(st.sampled_from([8, 64])) for name in ("head_dim", "state_size")}
    pattern = draw(st.text("M*-DG", min_size=1, max_size=12))
    heads = {"num_key_heads": groups, "num_value_heads": groups * draw(st.sampled_from([1, 2]))}
    widths = {name: draw(st.sampled_from([8, 64])) for name in ("key_head_dim", "value_head_dim")}
    net = DeltaNet(**heads, **widths) if "D" in pattern else None
    made = made.model_copy(update={"delta": net, "attention_gate": draw(st.booleans())})
    model = of_parts(made, pattern, **space)
    schedules = ("1f1b", "interleaved") if len(model.block_kinds) == 1 else ("1f1b",)
    tensor = draw(st.sampled_from([t for t in (1, 2, 4) if groups % t == 0]))
    layout = draw(layouts(model, tensor, schedules))
    layout = replace(layout, sharding=draw(st.sampled_from(["ddp", "zero1"])), reshard_after_forward=True)
    layout = replace(layout, data_shards=layout.data_parallel)
    training = TrainingSpec(
        framework="megatron",
        precision=draw(st.sampled_from(["bf16", "fp32"])),
        seq_length=draw(st.sampled_from([64, 512])),
        global_batch_size=layout.global_batch_size,
        options={"attention": "flash" if "D" in pattern else draw(st.sampled_from(["flash", "eager"]))},
    )
    return resolve(model, ClusterSpec.parse(f"{layout.world_size}xA100"), training), layout


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_the_closed_form_covers_the_pools_the_pools_every_snapshot_and_the_ledger_sums(
    data: st.DataObject,
) -> None:
    job, layout = data.draw(hybrids())
    prices = price(job, layout)
    candidate = prices.spread()
    rows = data.draw(splits(candidate))
    for index, own in enumerate(rows):
        timeline = StageReplay(prices, index, rows).run()
        closed, _ = candidate.peak(index, own)
        assert closed >= timeline.pools * (1 - 1e-9)
        assert timeline.pools >= max(size for _, size in timeline.snapshots) * (1 - 1e-9)
        stage = view(prices, rows, index)
        for snapshot, size in timeline.peaks().values():
            entries = tensor_entries(prices, stage, snapshot)
            assert sum(one.held for one in entries) == pytest.approx(size, rel=1e-9)


def test_a_stage_has_stand_ins_only_for_the_products_that_its_model_has() -> None:
    def stand_ins(model: ModelSpec) -> dict[str, float]:
        job = job_of(model, "8xH100", framework="megatron", seq_length=2048, precision="bf16")
        stage = Builder(job.model, job.training, job.stack, job.recipe).stage()
        return sizes(stage, Role.BUFFER, Layout())

    pure = stand_ins(ModelSpec.from_catalog("mamba-codestral-7b"))
    assert all("state space" in name for name in pure)
    width, inner, groups, n, heads = 4096, 8192, 8, 128, 128
    assert sum(pure.values()) == 2 * width * (2 * inner + 2 * groups * n + heads + inner)
    mixed = stand_ins(NEMOTRON)
    assert mixed.items() > pure.items()
    assert mixed["stand-in gradient, up"] == 2 * width * 21504


LAYOUT = Layout(8, sharding="zero1")


@pytest.mark.parametrize(
    ("name", "layout", "training", "said"),
    [
        (
            "nemotron-h-8b",
            Layout(4, context_parallel=2, grad_accum=2, sharding="zero1"),
            {},
            "that of mamba layers",
        ),
        ("nemotron-h-8b", Layout(8, sharding="fsdp", data_shards=8), {}, "fsdp: use ddp, zero1"),
        ("nemotron-h-8b", LAYOUT, {"framework": "hf"}, "not under hf: use --framework megatron"),
        ("nemotron-h-8b", LAYOUT, {"framework": "torchtitan"}, "torchtitan has no nemotron_h models"),
        ("nemotron-h-8b", LAYOUT, {"framework": "deepspeed"}, "not under deepspeed"),
        ("nemotron-h-8b", LAYOUT, {"precision": "fp8-delayed"}, "8- or 4-bit products are not planned"),
        ("nemotron-h-8b", LAYOUT, {"options": {"norm": "recomputed"}}, "use norm=kept"),
        (
            "mamba-codestral-7b",
            Layout(1, tensor_parallel=16, grad_accum=8),
            {},
            "ssm_groups=8: use 1, 2, 4 or 8",
        ),
    ],
)
def test_what_is_not_planned_of_a_state_space_is_refused_by_name(
    name: str, layout: Layout, training: dict[str, Any], said: str
) -> None:
    cluster = ClusterSpec.parse(f"{layout.world_size}xH100")
    job = {"seq_length": 8192, "global_batch_size": 8, "framework": "megatron"} | training
    with pytest.raises(InputError, match=said):
        estimate(ModelSpec.from_catalog(name), cluster, TrainingSpec(**job), layout)


def test_experts_between_state_spaces_keep_what_experts_keep() -> None:
    """Nemotron 3 Nano: a mixture's layer has no attention's rows, nor a state space's."""
    nano = ModelSpec.from_catalog("nemotron-3-nano-30b-a3b")
    job = job_of(nano, "16xH100", framework="megatron", seq_length=4096, precision="bf16")
    layout = Layout(16, expert_parallel=8, sharding="zero1")
    names = {kind: set(sizes(layer_of(job, kind), Role.ACTIVATION, layout)) for kind in nano.block_kinds}
    experts, mamba = names[Block("none", "experts")], names[MAMBA]
    assert {"routed tokens, by expert", "MLP input (norm output)", "norm statistics"} <= experts
    assert experts & mamba == {"block input", "norm statistics"}
    assert "log-sum-exp of the scores" in names[ATTENTION]
    assert "routed tokens, by expert" not in names[ATTENTION]
    stage = Builder(job.model, job.training, job.stack, job.recipe).stage()
    assert {"stand-in gradient, experts' up", "stand-in gradient, state space: output"} <= {
        term.name for term in stage.terms
    }


@pytest.mark.parametrize(("tokens_per_s", "tflops"), [(39749, 885), (37316, 831), (33522, 747), (14719, 328)])
def test_nvidias_flops_of_a_token_of_nemotron_3_nano_are_ours(tokens_per_s: int, tflops: int) -> None:
    """NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md (067f987d), container 26.06, s = 8192.

    Megatron-LM (training.py) halves attention, leaves the router out, and takes a state space's inner
    elements for twice the width, 5,376 where the model has 4,096.
    """
    nano = ModelSpec.from_catalog("nemotron-3-nano-30b-a3b")
    assert nano.state_space is not None
    assert nano.experts is not None
    count = {block: nano.blocks.count(block) for block in nano.block_kinds}
    width, more = nano.hidden_size, 2 * nano.hidden_size - 64 * 64
    attention = 12 * 8192 * nano.num_attention_heads * nano.head_dim * count[ATTENTION]
    router = 6 * width * nano.experts.num_experts * count[Block("none", "experts")]
    inner = (18 * width * more + 21 * more * nano.state_space.state_size) * count[MAMBA]
    theirs = nano.flops_per_token(8192) - attention / 2 - router + inner
    assert theirs == pytest.approx(tflops * 1e12 / tokens_per_s, rel=0.003)


def test_nvidias_recipe_of_nemotron_3_nano_may_fit_its_gpus() -> None:
    """perf_recipes/nemotronh/h100/nemotronh.py: 16 H100, bf16, EP8, experts (and norms) recomputed."""
    nano = ModelSpec.from_catalog("nemotron-3-nano-30b-a3b")
    layout = Layout(16, expert_parallel=8, sharding="zero1", grad_accum=64)
    verdicts = {}
    for moe in ("kept", "recomputed"):
        options = {"moe": moe}
        training = TrainingSpec(
            framework="megatron", precision="bf16", seq_length=8192, global_batch_size=1024, options=options
        )
        verdicts[moe] = estimate(nano, ClusterSpec.parse("16xH100"), training, layout).verdict
    assert verdicts == {"kept": "does not fit", "recomputed": "at risk"}


def test_a_search_interleaves_equal_blocks_only() -> None:
    training = {"seq_length": 4096, "global_batch_size": 64, "framework": "megatron"}
    for name, expected in (("nemotron-h-8b", {"1f1b"}), ("mamba-codestral-7b", {"1f1b", "interleaved"})):
        space = enumerate_layouts(job_of(ModelSpec.from_catalog(name), "16xH100", **training))
        assert {family.schedule for family in space.families} == expected
        left_out = [reason for reason in space.refused if "in layouts given by hand only" in reason]
        assert len(left_out) == ("interleaved" not in expected)


def test_a_searched_plan_of_a_hybrid_fits_when_it_is_replayed() -> None:
    training = TrainingSpec(framework="megatron", seq_length=8192, global_batch_size=128, precision="bf16")
    plan = search(NEMOTRON, ClusterSpec.parse("16xH100"), training)[0]
    assert plan.verdict != "does not fit"
    assert max(stage.peak_bytes for stage in plan.stages) == plan.peak_bytes <= plan.capacity_bytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state_space": {"bias": True}}, "its products none"),
        ({"state_space": {"conv_bias": False}}, "convolution has a bias"),
        ({"state_space": {"n_groups": 5}}, "n_groups=5 does not divide the 128 heads"),
        ({"model_type": "bamba"}, "two layers of a block of bamba"),
    ],
)
def test_state_spaces_that_megatron_does_not_make_are_refused(changes: dict[str, Any], said: str) -> None:
    assert NEMOTRON.state_space is not None
    space = NEMOTRON.state_space.model_copy(update=changes.get("state_space", {}))
    model = NEMOTRON.model_copy(update=changes | {"state_space": space})
    with pytest.raises(InputError, match=said):
        resolve(model, ClusterSpec.parse("8xH100"), TrainingSpec(framework="megatron"))


def test_models_without_state_spaces_have_the_rows_they_had() -> None:
    """Each of a block's rows once, the halves of rows of both parts never."""
    job = job_of(llama(2), framework="megatron", seq_length=256, precision="bf16")
    layer = layer_of(job, Block())
    for role in (Role.ACTIVATION, Role.TRAFFIC, Role.TRANSIENT):
        names = [term.name for term in layer.by_role[role]]
        assert len(names) == len(set(names))
    assert not any("state space" in term.name for term in layer.terms)
    assert {row.name for row in STACKS["megatron"].rows["stage"]} > {"attention scores, shared"}
