"""Configurations of every family: parameters to the last one, block by block, active ones and FLOPs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from planner import ModelSpec
from planner.catalog import names
from planner.defaults import resolve
from planner.errors import InputError
from planner.families import FAMILIES, model_from_config
from planner.hybrids import HYBRIDS
from planner.model import Block
from planner.reading import read_model
from planner.specs import ClusterSpec, TrainingSpec
from planner.stacks import STACKS
from planner.unplanned import MEGATRON, TRACED, unplanned
from planner.weights import Weight, block_weights, embedding_weights, head_weights, mtp_weights

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = json.loads((DATA / "parameter_counts.json").read_text())["models"]
SMALL = json.loads((DATA / "parameter_counts_small.json").read_text())["models"]
ROWS = PUBLISHED + [row | {"name": f"{row['config']['model_type']}-{n}"} for n, row in enumerate(SMALL)]


def total(weights: Iterable[Weight]) -> int:
    """Elements of all of them, the long way."""
    found = 0
    for weight in weights:
        size = 1
        for length in weight.dims.values():
            size *= int(length)
        found += size
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_parameters_and_active_ones_are_the_real_implementations(row: dict[str, Any]) -> None:
    model = model_from_config(row["config"], "config.json")
    assert model.num_parameters == row["parameters"]
    assert model.num_active_parameters == row.get("active", row["parameters"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_every_block_in_order_has_the_real_ones_parameters(row: dict[str, Any]) -> None:
    """Of T5 the first block of each half holds a table of relative positions, which we list beside them."""
    model = model_from_config(row["config"], "config.json")
    ours = [total(block_weights(model, block)) for block in model.blocks]
    if model.position_embedding == "relative":
        for first in (0, model.blocks.index(Block("cross"))):
            ours[first] += model.relative_buckets * model.num_attention_heads
    assert ours == [size for size, count in row["blocks"] for _ in range(count)]


def test_there_are_rows_of_every_family_and_of_all_87_published_shapes() -> None:
    assert {row["config"]["model_type"] for row in PUBLISHED + SMALL} == set(FAMILIES)
    assert len(PUBLISHED) >= 87 + 20


@pytest.mark.parametrize("row", [r for r in PUBLISHED if "catalog" in r], ids=lambda row: row["catalog"])
def test_a_catalog_entry_has_the_counted_shape(row: dict[str, Any]) -> None:
    entry = ModelSpec.from_catalog(row["catalog"])
    assert entry.num_parameters == row["parameters"]
    assert entry.source


PAPERS = {  # billions of parameters, all and active, as the named reports print them
    "mixtral-8x7b": (47, 13),  # arXiv:2401.04088, section 1
    "deepseek-v2": (236, 21),  # arXiv:2405.04434, abstract
    "deepseek-v3": (671, 37),  # arXiv:2412.19437, abstract: the embedding left out
    "kimi-k2": (1026, 32),  # arXiv:2507.20534: 1.04 T and 32.6 B, its head and embedding counted
    "qwen2-57b-a14b": (57, 14),  # arXiv:2407.10671, table 1
    "qwen3-30b-a3b": (30.5, 3.3),  # its model card
    "qwen3-235b-a22b": (235, 22),
    "olmoe-1b-7b": (6.9, 1.3),  # arXiv:2409.02060, abstract: 7B and 1B
    "glm-4.5-air": (106, 12),  # arXiv:2508.06471, table 1: the head left out
    "llama-4-maverick": (400, 17),
    "llama-4-scout": (109, 17),  # with its image part
}


@pytest.mark.parametrize("name", PAPERS)
def test_sizes_are_those_that_reports_print(name: str) -> None:
    model, (whole, active) = ModelSpec.from_catalog(name), PAPERS[name]
    assert model.num_parameters / 1e9 == pytest.approx(whole, rel=0.025)
    ends = 2 * model.vocab_size * model.hidden_size
    least = (model.num_active_parameters - ends) / 1e9
    assert least * 0.975 <= active <= model.num_active_parameters * 1.025 / 1e9


@pytest.mark.parametrize(("name", "printed"), [("deepseek-v2", 155e9), ("deepseek-v3", 250e9)])
def test_training_flops_per_token_of_deepseek(name: str, printed: float) -> None:
    """Zhao et al. 2025, arXiv:2505.09343, table 2: GFLOPs per token at 4,096 tokens, attention causal."""
    model = ModelSpec.from_catalog(name)
    causal = model.flops_per_token(4096) - model.attention_flops_per_token(4096) / 2
    assert causal == pytest.approx(printed, rel=3e-3)


def test_a_window_counts_instead_of_a_longer_sequence() -> None:
    model = ModelSpec.from_catalog("gemma-3-27b")
    full = 12 * model.num_attention_heads * model.head_dim
    assert model.attention_flops_per_token(512) == 62 * full * 512
    assert model.attention_flops_per_token(8192) == full * (52 * 1024 + 10 * 8192)
    assert [block.mixer for block in model.blocks[:7]] == ["window"] * 5 + ["full", "window"]


def test_cross_attention_counts_twice_and_an_encoder_once() -> None:
    t5 = ModelSpec.from_catalog("t5-11b")
    assert t5.attention_flops_per_token(512) == 12 * 128 * 128 * 512 * (24 + 2 * 24)


def test_flops_of_a_state_space_follow_from_its_own_count() -> None:
    """Megatron-LM, mamba_layer_flops, forward: in 2h(2d + 2gn + a), scan 7dn, out 2dh; three times that."""
    model = ModelSpec.from_catalog("mamba-codestral-7b")
    hidden, inner, states, heads, layers = 4096, 8192, 128, 128, 64
    forward = 2 * hidden * (2 * inner + 2 * 8 * states + heads) + 7 * inner * states + 2 * inner * hidden
    convolution = 2 * 4 * (inner + 2 * 8 * states)
    head = 2 * 32768 * hidden
    assert model.flops_per_token(4096) == 3 * (layers * (forward + convolution) + head)
    assert model.flops_per_token(65536) == model.flops_per_token(4096)


def test_flops_of_a_delta_net_follow_from_its_own_count() -> None:
    """Megatron-LM, gdn_layer_flops, forward, without attention's blocks and the experts."""
    model = ModelSpec.from_catalog("qwen3-next-80b-a3b")
    hidden, keys, values = 2048, 16 * 128, 32 * 128
    products = hidden * (2 * keys + 2 * values + 2 * 32) + values * hidden
    net = 2 * (products + 4 * (2 * keys + values) + 32 * 128 * 128 * 4)
    weights = list(block_weights(model, Block("delta", "none")))
    ours = 6 * total(w for w in weights if w.matrix)
    attention = 12 * 4096 * model.num_attention_heads * model.head_dim
    per_block = (model.attention_flops_per_token(4096) - 12 * attention) / 36
    assert ours + per_block == 3 * net


def test_only_the_experts_that_a_token_is_sent_to_are_active() -> None:
    model = ModelSpec.from_catalog("mixtral-8x7b")
    weights = {w.name: w for w in block_weights(model, model.blocks[0])}
    assert weights["expert up weight"].dims == {"experts": 8, "hidden": 4096, "expert_ffn": 14336}
    assert weights["expert up weight"].active == 0.25
    assert (weights["router weight"].dims, weights["router weight"].active) == (
        {"hidden": 4096, "router": 8},
        1,
    )


def test_latent_attention_has_the_agreed_dimensions() -> None:
    model = ModelSpec.from_catalog("deepseek-v3")
    weights = {w.name: w.dims for w in block_weights(model, model.blocks[0])}
    assert weights["query down weight"] == {"hidden": 7168, "q_rank": 1536}
    assert weights["query up weight"] == {"q_rank": 1536, "heads": 128, "qk_dim": 192}
    assert weights["key and value down weight"] == {"hidden": 7168, "kv_rank": 576}
    assert weights["key and value up weight"] == {"kv_rank": 512, "heads": 128, "kv_dim": 256}
    assert weights["attention output weight"] == {"heads": 128, "v_dim": 128, "hidden": 7168}
    assert [n for _, n in model.runs] == [3, 58]


def test_the_module_that_predicts_a_second_token_is_deepseeks() -> None:
    """11.5B parameters of its own: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3. Not among the 671B."""
    model = ModelSpec.from_catalog("deepseek-v3")
    assert model.mtp_layers == 1
    assert total(mtp_weights(model)) / 1e9 == pytest.approx(11.5, rel=0.02)


def test_a_step_of_the_backward_is_named_for_every_weight() -> None:
    from planner.steps import STEPS

    for row in ROWS:
        model = model_from_config(row["config"], "config.json")
        for block in model.block_kinds:
            assert {w.step for w in block_weights(model, block)} <= set(STEPS["block"])
        assert {w.step for w in embedding_weights(model, 1)} <= set(STEPS["embedding"])
        assert {w.step for w in head_weights(model, 1, 0)} <= set(STEPS["head"])


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown word": ({"model_type": "olmo3", "layer_types": ["circular"] * 4}, "'circular'"),
    "too few words": ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "each of the 4 blocks"),
    "windows of no size": (
        {"model_type": "gemma2", "layer_types": ["sliding_attention"] * 4, "sliding_window": None},
        "sliding_window",
    ),
    "biases in latent attention": (
        {"model_type": "deepseek_v3", "n_routed_experts": 8, "attention_bias": True},
        "attention_bias",
    ),
    "experts in every other block": (
        {"model_type": "deepseek_v3", "n_routed_experts": 8, "moe_layer_freq": 2},
        "moe_layer_freq",
    ),
    "more experts to a token than there are": (
        {"model_type": "mixtral", "num_key_value_heads": 4, "num_local_experts": 2, "num_experts_per_tok": 3},
        "more than the 2 experts",
    ),
    "experts in a dense family": ({"num_experts": 8}, "no mixtures of experts"),
    "cross attention in GPT-2": (
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 8}
        | {"add_cross_attention": True},
        "add_cross_attention",
    ),
    "a head that is not modelled": (
        {"model_type": "bert", "architectures": ["BertForTokenClassification"]},
        "BertForTokenClassification",
    ),
    "an encoder as a decoder": ({"model_type": "bert", "is_decoder": True}, "is_decoder"),
    "experts of a latent width": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "ME", "moe_latent_size": 8},
        "moe_latent_size",
    ),
    "an unknown letter": ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}, "M, *, - and E"),
    "a list of no numbers": (
        {"model_type": "qwen3_moe", "num_key_value_heads": 4, "mlp_only_layers": ["first"]},
        "mlp_only_layers",
    ),
    "a family that nobody knows": ({"model_type": "rwkv"}, "layers=32"),
    "a copy in four bits": ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_modelled_is_refused_by_its_key(case: str) -> None:
    changed, named = REFUSED[case]
    with pytest.raises(InputError, match=r"config\.json") as caught:
        model_from_config(LLAMA | changed, "config.json")
    assert named in str(caught.value)


JUNK: list[Any] = ["x", -1, 0, 1.5, 10**30, 10**9, True, None, [], {}, [1], ["x"], [[1]], [None], {"a": 1}]
JUNK += [float("nan"), float("inf"), "7", [["full_attention"]], [True] * 9, "gated-x-y", "M" * 20_000]


def test_no_value_of_any_key_makes_more_than_an_error() -> None:
    """Each key of each small configuration, and those that it leaves out, with what it cannot be."""
    draw, keys = random.Random(5), sorted({key for row in SMALL for key in row["config"]} - {"model_type"})
    longest = 0
    for row in SMALL:
        for key in keys:
            config = row["config"] | {key: draw.choice(JUNK)}
            try:
                model = model_from_config(config, "config.json")
            except InputError as error:
                longest = max(longest, len(str(error)))
                continue
            assert model.num_parameters >= model.num_active_parameters > 0
            assert model.flops_per_token(128) > 0
    assert 0 < longest < 700


def test_weights_published_in_eight_bits_are_read_as_a_shape() -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    assert model_from_config(config, "x") == model_from_config(LLAMA, "x")


def test_the_text_part_of_a_model_of_images_is_read_and_said_to_be_that() -> None:
    """Gemma 3's published files leave most lengths of the text part to its class's defaults."""
    part = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    data = {"model_type": "gemma3", "text_config": part | {"model_type": "gemma3_text"}, "vision_config": {}}
    model = model_from_config(data, "gemma/config.json")
    assert model.num_parameters == ModelSpec.from_catalog("gemma-3-4b").num_parameters
    assert "image part is left out" in model.source


def test_remote_code_is_ignored() -> None:
    assert model_from_config(LLAMA | {"auto_map": {"AutoModel": "evil.Model"}}, "x").model_type == "llama"


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("olmoe-1b-7b", "query and key norms"),
        ("gemma-2-9b", "norms of gemma2's kind"),
        ("bert-large", "encoder"),
        ("t5-11b", "encoder-decoder"),
        ("vit-large-patch16", "vision"),
        ("falcon-7b", "norms"),
        ("falcon-180b", "model_type='falcon'"),
    ],
)
def test_what_is_counted_only_is_not_planned(name: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        resolve(ModelSpec.from_catalog(name), ClusterSpec.parse("8xH100"), TrainingSpec())


def planned(framework: str) -> tuple[set[str], set[str]]:
    """Model types that a framework plans: of the catalog, and of random small configurations."""
    stack = STACKS[framework]
    catalog = [*map(ModelSpec.from_catalog, names("models"))]
    models = [model_from_config(row["config"], "config.json") for row in ROWS]
    of_catalog, of_models = (
        {model.model_type for model in several if not unplanned(model, stack, "", {"attention": "eager"})}
        for several in (catalog, models)
    )
    return of_catalog, of_models


@pytest.mark.parametrize("framework", [name for name in STACKS if not STACKS[name].parts])
def test_the_traced_families_are_planned_and_no_others(framework: str) -> None:
    """None of the others' shapes either, down to the smallest that its keys allow."""
    every = {*TRACED, *STACKS[framework].traced}
    assert planned(framework) == (every, every)


def test_megatron_runs_mixtures_latent_attention_and_state_spaces_too() -> None:
    mixtures = {"mixtral", "deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss"}
    mixtures |= {*HYBRIDS, "qwen3_next"}
    of_catalog, of_models = planned("megatron")
    assert of_catalog == {*TRACED, *mixtures, *MEGATRON, "kimi_k2"} - {"ministral"}
    assert of_models == {*TRACED, *mixtures, *MEGATRON, "kimi_k2"}


def test_torchtitan_runs_its_own_mixtures() -> None:
    mixtures = {"deepseek_v2", "deepseek_v3", "qwen3_moe", "gpt_oss"}
    assert planned("torchtitan") == ({*TRACED, *mixtures}, {*TRACED, *mixtures})


def test_a_shape_is_llamas_and_with_experts_mixtrals() -> None:
    dense = read_model("layers=80,hidden=8192,heads=64,kv_heads=8,ffn=28672,vocab=32000")
    assert dense.num_parameters == ModelSpec.from_catalog("llama-2-70b").num_parameters
    text = "layers=32,hidden=4096,heads=32,kv_heads=8,ffn=14336,vocab=32000,experts=8,top_k=2"
    mixture = ModelSpec.from_catalog("mixtral-8x7b")
    assert read_model(text).num_active_parameters == mixture.num_active_parameters
    assert read_model(text + ",shared_ffn=64").num_parameters - mixture.num_parameters == 32 * 3 * 64 * 4096


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("layers=2,hidden=64", "heads, ffn, vocab missing"),
        ("layers=2,hiden=64", "hidden"),
        ("layers=two", "whole number"),
        ("layers=0", "whole number"),
        ("layers=2,layers=3", "given twice"),
        ("layers=2,hidden=64,heads=4,ffn=96,vocab=100,top_k=2", "experts=8"),
        ("layers=2,hidden=64,heads=4,kv_heads=3,ffn=96,vocab=100", "num_key_value_heads=3"),
    ],
)
def test_a_shape_that_cannot_be_says_what_is_wrong(text: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        read_model(text)
    assert named in str(caught.value)


@pytest.mark.parametrize("family", [[], {}, ["llama"], None, 1])
def test_a_model_type_that_is_no_word_is_refused(family: Any) -> None:
    with pytest.raises(InputError, match="no model_type in it" if family is None else "is not modelled"):
        model_from_config({"model_type": family, "hidden_size": 64}, "config.json")


def test_more_heads_than_elements_are_no_division_by_zero() -> None:
    config = {"model_type": "gptj", "n_embd": 2, "n_head": 64, "head_dim": 1, "n_layer": 2, "vocab_size": 100}
    assert model_from_config(config, "config.json").num_attention_heads == 64
