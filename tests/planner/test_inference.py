"""Inference: weights at a precision, cache, what fits; and accelerate's table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import ClusterSpec, InputError, ModelSpec, serving
from planner.accelerate_table import accelerate_table, as_printed
from planner.cli import app
from planner.inference import InferenceSpec, Placement, infer
from planner.model import DeltaNet, Experts, LatentAttention, StateSpace
from planner.serving_rank import Rank, further_bytes, layers_of, token_bytes
from planner.weights import Weight
from strategies.base import held

DATA = json.loads((Path(__file__).parents[1] / "data" / "inference.json").read_text())
GIB = 2**30


def catalog(name: str) -> ModelSpec:
    return ModelSpec.from_catalog(name)


def whole(model: ModelSpec, tensor: int = 1, **spec: Any) -> Rank:
    return Rank(model, InferenceSpec(**spec), tensor, 1, 0)


def model_of(**more: Any) -> ModelSpec:
    shape: dict[str, Any] = {
        "name": "made-by-hand",
        "model_type": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 4096,
        "vocab_size": 32000,
        "max_position_embeddings": 65536,
    }
    return ModelSpec(**shape | more)


def one(model: ModelSpec, gpus: str, tensor: int, pipeline: int = 1, **spec: Any) -> Placement:
    degrees = {"tensor_parallel": (tensor,), "pipeline_parallel": (pipeline,)}
    (placement,) = infer(model, ClusterSpec.parse(gpus), InferenceSpec(**degrees, **spec)).placements
    return placement


# --- the cache ---------------------------------------------------------------------------------------


def test_a_token_of_opt_13b_takes_800_kb_and_a_request_1_6_gb() -> None:
    # Kwon et al. 2023, arXiv:2309.06180, section 3: 2 x 5120 x 40 x 2 bytes; 2048 tokens.
    rank = whole(catalog("opt-13b"))
    assert token_bytes(rank) == 800 * 1024 == 2 * 5120 * 40 * 2
    assert round(rank.cache(2048) / 2**30, 1) == 1.6


def test_weights_of_a_13b_model_are_65_percent_of_40_gb() -> None:
    # Kwon et al. 2023, figure 1, left: 26 GB on an A100 with 40 GB.
    assert whole(catalog("llama-13b")).weights / 40e9 == pytest.approx(0.65, abs=0.005)


DEEPSEEK_V2 = LatentAttention(
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)


def deepseek_v2() -> ModelSpec:
    heads = {"num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 128}
    return model_of(hidden_size=5120, num_hidden_layers=60, latent=DEEPSEEK_V2, **heads)


def test_latent_attention_caches_as_table_1_of_deepseek_v2_says() -> None:
    # DeepSeek-AI 2024, arXiv:2405.04434, table 1: (d_c + d_h^R) l = 9/2 d_h l elements, as of GQA with 2.25
    # groups; table 1 counts elements, so two bytes each here.
    rank = whole(deepseek_v2())
    assert token_bytes(rank) / 2 == (512 + 64) * 60 == 9 / 2 * 128 * 60 == 2 * 2.25 * 128 * 60


def test_latent_attention_in_6_bits_saves_93_3_percent_of_deepseek_67b() -> None:
    # The same, abstract and section 3.2.3: 6 bits an element on average, against DeepSeek 67B (95 layers,
    # 8 groups of 128) in 16.
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    before = token_bytes(whole(model_of(num_hidden_layers=95, **heads)))
    after = token_bytes(whole(deepseek_v2())) * 6 / 16
    assert round(100 * (1 - after / before), 1) == 93.3


def test_latents_are_whole_on_every_tensor_parallel_rank_and_heads_are_shared_out() -> None:
    assert token_bytes(whole(deepseek_v2(), 8)) == token_bytes(whole(deepseek_v2()))
    llama = catalog("llama-3-70b")
    assert token_bytes(whole(llama)) == 2 * 8 * 128 * 80 * 2 == 320 * 1024
    assert token_bytes(whole(llama, 8)) == token_bytes(whole(llama)) / 8


def test_fewer_heads_than_ranks_are_repeated() -> None:
    llama = catalog("llama-3-70b")
    assert token_bytes(whole(llama, 16)) == token_bytes(whole(llama, 8))
    wide, narrow = whole(llama, 16).weights, whole(llama, 8).weights / 2
    keys = 80 * 8192 * 128 * 2 * 2  # a whole pair of heads instead of half of one
    rotary = llama.max_position_embeddings * 128 * 2
    assert wide - narrow == keys / 2 + ((80 * 2 + 1) * 8192 * 2 + rotary) / 2


def test_an_8_bit_cache_is_half_of_it() -> None:
    model = catalog("llama-2-7b")
    assert token_bytes(whole(model, kv="fp8")) * 2 == token_bytes(whole(model)) == 512 * 1024


def test_the_cache_comes_in_whole_blocks() -> None:
    rank = whole(catalog("llama-2-7b"))
    assert rank.cache(1) == rank.cache(16) == 16 * 512 * 1024
    assert rank.cache(17) == 2 * rank.cache(16)


def test_a_window_keeps_the_blocks_that_it_lies_in() -> None:
    model = model_of(sliding_window=4096, mixers=("window", "window", "window", "full"))
    rank, token = whole(model), 2 * 4 * 64 * 2
    assert rank.cache(4000) == 4 * 4000 * token
    assert rank.cache(32768) == (32768 + 3 * (4096 + 16)) * token  # 4095 tokens before one: 257 blocks
    assert token_bytes(rank) == 4 * token
    assert further_bytes(rank) == token


def test_mistral_has_its_window_everywhere() -> None:
    rank = whole(catalog("mistral-7b"))
    assert rank.cache(32768) == rank.cache(8192) == (4096 + 16) * 128 * 1024
    assert further_bytes(rank) == 0


def test_a_state_space_keeps_a_state_that_does_not_grow() -> None:
    # vLLM's mamba2_state_shape: (k - 1)(inner + 2 groups state) and heads x head_dim x state. Mamba-2 2.7B.
    space = StateSpace(num_heads=80, head_dim=64, n_groups=1, state_size=128)
    model = model_of(state_space=space, mixers=("mamba",) * 4, mlps=("none",) * 4)

    def state(tensor: int) -> float:
        terms = serving.cache_terms(model, model.blocks[0], 100, 16, 2.0, tensor)
        return sum(held(term, whole(model, tensor).strategies) for term in terms)

    assert state(1) == 2 * (80 * 64 * 128 + 3 * (5120 + 2 * 128))
    # A group is repeated on each of four ranks: extra_groups_for_head_shards.
    assert state(4) == 2 * (80 * 64 * 128 + 3 * (5120 + 2 * 4 * 128)) / 4
    assert whole(model).cache(100) == whole(model).cache(60000) == 4 * state(1)


def test_a_delta_net_keeps_a_matrix_of_each_value_head() -> None:
    # Qwen3-Next: gated_delta_net_state_shape of vLLM: 32 x 128 x 128, and 3 x (2 x 2048 + 4096).
    delta = DeltaNet(num_key_heads=16, num_value_heads=32, key_head_dim=128, value_head_dim=128)
    model = model_of(delta=delta, mixers=("delta", "delta", "delta", "full"))
    state = 2 * (32 * 128 * 128 + 3 * (2 * 2048 + 4096))
    assert whole(model).cache(1600) == 3 * state + 1600 * 2 * 4 * 64 * 2


# --- the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", DATA["weights"]["readings"], ids=lambda r: f"{r['model']} {r['gib']}")
def test_weights_are_what_vllm_reports(reading: dict[str, Any]) -> None:
    rank = whole(catalog(reading["model"]), reading["tensor_parallel"], weights=reading["weights"])
    assert round(rank.weights / GIB, reading["digits"]) == round(reading["gib"], reading["digits"])


@pytest.mark.parametrize(("name", "gb"), DATA["awq"]["gb"].items())
def test_int4_is_as_large_as_published_awq_models(name: str, gb: float) -> None:
    rank = whole(catalog(name), weights="int4")
    rotary = rank.model.max_position_embeddings * rank.model.head_dim * 2  # not in a file
    assert round((rank.weights - rotary) / 1e9, 2) == gb


def test_double_quantisation_costs_0_127_bits_a_parameter() -> None:
    # Dettmers et al. 2023, arXiv:2305.14314, section 3.
    assert serving.FORMATS["nf4"].of("", {"n": 1}).amount * 8 == pytest.approx(4 + 0.127, abs=5e-4)


def test_embedding_head_and_norms_stay_in_half_precision() -> None:
    model = catalog("llama-2-7b")
    products = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    saved = whole(model).weights - whole(model, weights="fp8").weights
    assert saved == products - 32 * 6 * 8  # an fp8 weight has 8 bytes of scales; q, kv, out, gate, up, down
    assert serving.is_product(Weight("router weight", {"hidden": 8, "router": 4}, "up", matrix=True)) is False
    assert serving.is_product(Weight("shared gate", {"hidden": 8}, "up", matrix=True)) is False


def test_of_a_mixture_a_token_reads_its_own_experts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts(num_experts=8, num_experts_per_tok=2, intermediate_size=512)
    model = model_of(experts=experts)
    dims = {"experts": 8, "hidden": 1024, "expert_ffn": 512}
    monkeypatch.setattr(serving, "block_weights", lambda *_: iter([Weight("up", dims, "up", matrix=True)]))
    block = model.blocks[0]
    (all_of_it,) = serving.weight_terms(model, block, "bf16", 1)
    (active,) = serving.weight_terms(model, block, "bf16", 1, active=True)
    assert all_of_it.amount == 4 * active.amount == 8 * 1024 * 512 * 2
    (flops,) = serving.product_terms(model, block, tokens=10)
    assert flops.amount == 2 * 10 * 2 * 1024 * 512
    assert held(all_of_it, whole(model, 4).strategies) == all_of_it.amount / 4  # a part of every expert


def test_heads_of_a_state_space_are_shared_out_and_its_groups_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    inner = {"hidden": 1024, "ssm_heads": 32, "ssm_head_dim": 64, "pair": 2}
    groups = {"hidden": 1024, "ssm_groups": 1, "state": 128, "pair": 2}
    weights = [Weight("in", inner, "qkv", matrix=True), Weight("B and C", groups, "qkv", matrix=True)]
    monkeypatch.setattr(serving, "block_weights", lambda *_: iter(weights))
    terms = serving.weight_terms(model, model.blocks[0], "bf16", 4)
    sizes = [held(term, whole(model, 4).strategies) for term in terms]
    assert sizes == [2 * 1024 * 32 * 64 * 2 / 4, 2 * 1024 * 128 * 2]


def test_stages_hold_the_model_once() -> None:
    model = catalog("llama-2-13b")
    rotary = model.max_position_embeddings * model.head_dim * 2
    ranks = [Rank(model, InferenceSpec(), 1, 3, stage) for stage in range(3)]
    assert layers_of(40, 3) == (13, 14, 13)
    assert sum(rank.weights for rank in ranks) == whole(model).weights + 2 * rotary
    assert sum(rank.cache(1024) for rank in ranks) == whole(model).cache(1024)


def test_a_tied_head_is_a_copy_on_a_stage_of_its_own() -> None:
    model = catalog("llama-3.2-1b")
    table = 128256 * 2048 * 2
    rotary = model.max_position_embeddings * model.head_dim * 2
    ranks = [Rank(model, InferenceSpec(), 1, 2, stage) for stage in range(2)]
    assert sum(rank.weights for rank in ranks) == whole(model).weights + rotary + table


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_nothing_is_lost_to_tensor_parallelism(tensor: int) -> None:
    for precision in ("bf16", "fp8", "int8", "nf4"):
        model = catalog("llama-3-8b")
        alone, share = whole(model, weights=precision), whole(model, tensor, weights=precision)
        assert alone.weights <= share.weights * tensor < alone.weights * 1.01
        assert share.cache(512) * tensor == alone.cache(512)


# --- what fits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "gib"), DATA["sampling"]["readings"])
def test_sampling_of_256_sequences_takes_what_vllm_measures(vocab: int, gib: float) -> None:
    (term,) = serving.sampling_terms(model_of(vocab_size=vocab), 256)
    assert term.amount / GIB == pytest.approx(gib, rel=0.10)


@pytest.mark.parametrize("reading", DATA["working_set"]["readings"], ids=lambda r: r["model"])
def test_a_long_prompt_in_one_pass_takes_what_vllm_measures(reading: dict[str, Any]) -> None:
    rank = whole(catalog(reading["model"]), chunk_tokens=reading["context"])
    assert rank.working(reading["batch"], reading["context"]) / GIB == pytest.approx(reading["gib"], rel=0.06)


@pytest.mark.parametrize("reading", DATA["room"]["readings"], ids=lambda r: r["model"])
def test_the_cache_that_fits_is_what_vllm_finds(reading: dict[str, Any]) -> None:
    spec = {name: reading[name] for name in ("context", "chunk_tokens")}
    found = one(catalog(reading["model"]), reading["gpus"], 1, batch=256, **spec)
    assert found.cache_tokens == pytest.approx(reading["tokens"], rel=0.01)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_largest_batch_and_context_fit_and_one_more_does_not(tensor: int, pipeline: int) -> None:
    model, cluster = catalog("qwen2.5-32b"), "4xH100"
    degrees: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline}
    found = one(model, cluster, context=4096, **degrees)
    for batch in (found.largest_batch, found.largest_batch + 1):
        assert one(model, cluster, context=4096, batch=batch, **degrees).fits == (
            batch == found.largest_batch
        )
    most = found.largest_context
    assert one(model, cluster, context=most, **degrees).fits
    if most < model.max_position_embeddings:
        assert not one(model, cluster, context=most + 1, **degrees).fits


def test_a_chunk_in_prefill_holds_more_than_the_windows() -> None:
    model = model_of(sliding_window=1024, mixers=("window",) * 4)
    token = 4 * 2 * 4 * 64 * 2
    rank = whole(model, chunk_tokens=2048)
    assert rank.components(3, 8192)["kv_cache"] == (3 * (1024 + 16) + 2048) * token
    assert rank.components(3, 1024)["kv_cache"] == 3 * 1024 * token


def test_the_working_set_is_the_wider_of_a_blocks_two_parts() -> None:
    # MLP: residual, input, output, gate and up, their product; attention: with q, k, v and its result.
    model = model_of(intermediate_size=4096)
    assert whole(model).working(1, 1000) == 1000 * 2 * (3 * 1024 + 3 * 4096)
    assert whole(model, 4).working(1, 1000) == 1000 * 2 * (3 * 1024 + 3 * 4096 / 4)
    thin = model_of(intermediate_size=64)
    assert whole(thin).working(1, 1000) == 1000 * 2 * (3 * 1024 + 2 * 1024 + 2 * 4 * 64)
    assert whole(model, chunk_tokens=500).working(1, 1000) == whole(model).working(1, 500)


def test_the_best_is_that_with_the_fewest_gpus_then_the_most_cache() -> None:
    found = infer(catalog("llama-3.1-70b"), ClusterSpec.parse("8xH100"), InferenceSpec(context=8192, batch=8))
    fitting = [(p.gpus, -p.cache_tokens) for p in found.placements if p.fits]
    assert fitting == sorted(fitting)
    assert found.placements[0].gpus == 4
    assert found.placements[0].replicas == 2
    assert not found.placements[-1].fits
    assert [p.fits for p in found.placements] == sorted((p.fits for p in found.placements), reverse=True)


def test_a_token_takes_at_least_the_reading_of_weights_and_cache() -> None:
    model, cluster = catalog("llama-2-7b"), ClusterSpec.parse("1xH100")
    found = one(model, "1xH100", 1, context=4096)
    table = 32000 * 4096 * 2  # the embedding is looked up, not read
    rotary = 4096 * 128 * 2
    read = whole(model).weights - table - rotary + 4096 * 512 * 1024
    rate = cluster.gpu.hbm_bytes_per_s * cluster.gpu.achievable["memory"].value
    assert found.token_s == pytest.approx(read / rate, rel=1e-3)
    products = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    peak = cluster.gpu.peak_flops["bf16"] * cluster.gpu.achievable["matmul"].value
    assert found.prefill_s == pytest.approx(2 * products * 4096 / peak)
    assert one(model, "1xH100", 1, context=4096, batch=8).token_s < 8 * found.token_s


def test_an_answer_that_does_not_fit_says_what_would() -> None:
    found = infer(catalog("llama-3.1-405b"), ClusterSpec.parse("8xH100"), InferenceSpec(context=32768))
    assert not found.fits
    assert found.changes == ("--weights fp8",)
    assert infer(
        catalog("llama-3.1-405b"), ClusterSpec.parse("8xH100"), InferenceSpec(context=32768, weights="fp8")
    ).fits


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        (model_of(kind="encoder"), {}, "of kind encoder"),
        (model_of(kind="encoder-decoder", mixers=("cross",) * 4), {}, "of kind encoder-decoder"),
        (model_of(mixers=("full", "cross", "full", "full")), {}, "has cross attention"),
        (model_of(position_embedding="learned"), {"context": 70000}, "65536 positions"),
        (model_of(), {"tensor_parallel": (3,)}, "tensor_parallel=3 does not divide heads=16"),
        (model_of(), {"tensor_parallel": (16,)}, "would leave its node of 8"),
        (model_of(), {"pipeline_parallel": (5,)}, "more than the 4 layers"),
        (model_of(), {"tensor_parallel": (8,), "pipeline_parallel": (4,)}, "needs 32 GPUs"),
        (model_of(intermediate_size=640), {"tensor_parallel": (2,), "weights": "int4"}, "groups of 128"),
    ],
)
def test_what_is_not_modelled_is_refused(model: ModelSpec, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        infer(model, ClusterSpec.parse("2x8xH100"), InferenceSpec(**spec))


# --- accelerate --------------------------------------------------------------------------------------


def test_accelerates_table_of_llama_2_7b() -> None:
    rows = {row.dtype: row for row in accelerate_table(catalog("llama-2-7b"))}
    half = rows["float16"]
    assert as_printed(half.largest_layer) == "388.02 MB"
    assert as_printed(half.total) == "12.37 GB"
    assert as_printed(half.training_using_adam or 0) == "49.48 GB"
    assert [as_printed(size) for size in (half.training or {}).values()] == [
        "24.74 GB",
        "37.11 GB",
        "49.48 GB",
        "49.48 GB",
    ]
    assert rows["int8"].training is None
    assert rows["float32"].total == 8 * rows["int4"].total


@pytest.mark.parametrize("name", DATA["accelerate"]["models"])
def test_sizes_are_what_accelerate_measures_to_the_byte(name: str) -> None:
    measured = DATA["accelerate"]["models"][name]
    row = accelerate_table(catalog(name), rotary_caches=False)[0]
    assert row.total == measured["total"] - measured["buffers"]
    assert row.largest_layer == measured["largest_layer"]


def test_accelerates_table_is_made_of_decoders() -> None:
    with pytest.raises(InputError, match="pooler"):
        accelerate_table(model_of(kind="encoder"))


# --- the command -------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["infer", *arguments], env={"COLUMNS": "100"})


def test_the_exit_status_tells_what_fits() -> None:
    assert run("-m", "llama-2-7b", "-g", "1x80G").exit_code == 0
    assert run("-m", "llama-3.1-405b", "-g", "1x80G", "-q").exit_code == 1
    assert run("-m", "llama-2-7b").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv", "fp4"], "--kv 'fp4'"),
        (["--weights", "q4"], "--weights 'q4'"),
        (["--batch", "0"], "--batch 0"),
        (["--utilization", "2"], "--utilization '2'"),
        (["-tp", "x"], "--tensor-parallel 'x'"),
        (["-tp", "3"], "does not divide heads=32"),
        (["--context", "0"], "--context 0"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], message: str) -> None:
    result = run("-m", "llama-2-7b", "-g", "8x80G", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_json_is_the_answer_and_nothing_else() -> None:
    result = run("-m", "llama-2-7b", "-g", "2x80G", "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == "planner.infer/1"
    assert document["fits"] is True
    assert document["kv_bytes_per_token"] == 512 * 1024
    assert {"weights", "kv_cache", "working_set", "cuda_and_nccl"} == set(
        document["placements"][0]["stages"][0]
    )
    assert json.loads(run("-m", "llama-3.1-405b", "-g", "1x80G", "--json").stdout)["fits"] is False
    table = json.loads(run("-m", "llama-2-7b", "--accelerate", "--json").stdout)
    assert table["schema"] == "planner.accelerate/1"
    assert [row["dtype"] for row in table["rows"]] == ["float32", "float16", "int8", "int4"]


@pytest.mark.parametrize("arguments", [["--help"], ["-m", "llama-2-7b", "-g", "1x80G"]])
def test_neither_solver_nor_graphs_are_loaded(arguments: list[str]) -> None:
    code = (
        f"import sys\nfrom planner.cli import app\ntry: app(['infer', *{arguments!r}])\n"
        "except SystemExit: pass\n"
        "print('LOADED', sorted({'scipy', 'pulp', 'networkx', 'highspy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "LOADED []"
