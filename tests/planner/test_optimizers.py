"""Optimizer states, temporaries and traffic: against PyTorch's and bitsandbytes' own, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import ClusterSpec, InputError, ModelSpec, TrainingSpec
from planner.defaults import Job, resolve
from planner.given import check_layout
from planner.layouts import Choices, enumerate_layouts
from planner.optimizer_states import Tensor, blocks, newton_schulz_flops, shampoo_flops, shampoo_state
from planner.optimizers import INDICES, OPTIMIZERS, REFUSED, shampoo, step_flops, tensors_of
from planner.stacks.base import Recipe
from planner.stages import Prices, price
from strategies.base import Role
from strategies.layout import Layout

DATA: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "optimizers.json").read_text())
ROUNDING = 512 * 3
"""Bytes that an allocator rounds a tensor's states up by at most, and its step counter."""


def job_of(
    model: str = "llama-3.2-1b", gpus: str = "1xA100", step: str = "", batch: int = 1, **given: Any
) -> Job:
    options = {"optimizer_step": step} if step else {}
    fields = {"framework": "hf", "precision": "pure-bf16", "seq_length": 1024, "global_batch_size": batch}
    training = TrainingSpec(**{**fields, "options": options, **given})
    return resolve(ModelSpec.from_catalog(model), ClusterSpec.parse(gpus), training)


def priced(job: Job, **layout: Any) -> Prices:
    return price(job, Layout(**layout), ["none"])


def total(prices: Prices, what: str) -> float:
    """A number of all layers together."""
    of = {
        "states": lambda p: p.states[Role.OPTIMIZER],
        "gradients": lambda p: p.states[Role.GRADIENT],
        "room": lambda p: p.update_room,
        "moved": lambda p: p.update_bytes,
    }[what]
    ends = float(of(prices.embedding)) + float(of(prices.head))
    return ends + prices.job.model.num_hidden_layers * float(of(prices.plain))


def paged(job: Job) -> float:
    """Bytes of states that may lie on the host: those of tensors of 100,000 elements or more."""
    optimizer, model = OPTIMIZERS[job.training.optimizer], job.model
    if not optimizer.paged:
        return 0.0
    sizes = 0.0
    for layer, count in zip(priced(job).layers, (1, model.num_hidden_layers, 1), strict=True):
        for term in layer.by_role[Role.OPTIMIZER]:
            each = float(term.elements) / term.dims.get("pair", 1)
            sizes += count * float(term.elements) * (2 * (1 + 4 / 256) if each >= 1e5 else 0)
    return sizes


def temporaries(prices: Prices) -> float:
    buffers = [b.size for b in prices.buffers(True, True) if b.span == "optimizer step"]
    return total(prices, "room") + sum(buffers)


@pytest.mark.parametrize("row", DATA["rows"], ids=[row["id"] for row in DATA["rows"]])
def test_states_are_those_of_the_real_optimizer(row: dict[str, Any]) -> None:
    job = job_of(row["model"], step=row["step"], optimizer=row["optimizer"], precision=row["precision"])
    found = total(priced(job), "states") + paged(job)
    if row["optimizer"].endswith("8bit") or OPTIMIZERS[row["optimizer"]].flops:  # to the byte
        assert found == row["state_bytes"]
    else:
        assert 0 <= row["state_bytes"] - found <= ROUNDING * row["tensors"]


@pytest.mark.parametrize(
    "row", [r for r in DATA["rows"] if "temporary_bytes" in r], ids=lambda row: str(row["id"])
)
def test_the_steps_temporaries_are_those_of_the_real_optimizer(row: dict[str, Any]) -> None:
    job = job_of(row["model"], step=row["step"], optimizer=row["optimizer"], precision=row["precision"])
    assert temporaries(priced(job)) == pytest.approx(row["temporary_bytes"], rel=1e-4)


@pytest.mark.parametrize(
    "row", [r for r in DATA["rows"] if "peak_bytes" in r], ids=lambda row: str(row["id"])
)
def test_the_peak_of_a_whole_step_is_the_traced_one(row: dict[str, Any]) -> None:
    names = ("optimizer", "precision", "batch")
    job = job_of(row["model"], step=row["step"], seq_length=row["seq"], **{name: row[name] for name in names})
    prices = priced(job, micro_batch_size=row["batch"])
    moments = {
        name: job.model.num_hidden_layers * rows[0] + fixed + working[0]
        for name, (rows, fixed, working) in prices.spread().stages[0].moments.items()
    }
    assert moments["optimizer step"] == pytest.approx(row["step_bytes"], rel=2e-4)
    assert max(moments.values()) == pytest.approx(row["peak_bytes"], rel=1e-3)


@pytest.mark.parametrize("row", DATA["steps"]["rows"], ids=str)
def test_a_matrix_takes_the_temporaries_that_it_took(row: dict[str, Any]) -> None:
    width = 4.0 if row["precision"] == "fp32" else 2.0
    room = OPTIMIZERS[row["optimizer"]].room
    assert room is not None
    tensor, recipe = Tensor(tuple(row["shape"]), hidden=True), Recipe(width, width, 0, width)
    found = room([tensor], recipe)
    if "state_bytes" in row:
        states = OPTIMIZERS[row["optimizer"]].per_element(tensor, recipe, 1)
        assert states * tensor.elements == row["state_bytes"]
    assert found == pytest.approx(row["bytes"], rel=0.015)  # means of rows and columns besides


def alone(row: dict[str, Any]) -> tuple[Tensor, Recipe]:
    width = 4.0 if row["precision"] == "fp32" else 2.0
    return Tensor(tuple(row["shape"])), Recipe(width, width, 0, width)


@pytest.mark.parametrize("row", DATA["whole_matrices"]["rows"], ids=str)
def test_soap_keeps_makes_moves_and_multiplies_what_it_did(row: dict[str, Any]) -> None:
    optimizer, (tensor, recipe) = OPTIMIZERS[row["optimizer"]], alone(row)
    assert optimizer.room is not None
    assert optimizer.accesses is not None
    assert optimizer.flops is not None
    states = optimizer.per_element(tensor, recipe, 1)
    assert states * tensor.elements == row["state_bytes"]
    room = optimizer.room([tensor], recipe)
    if row["shape"] == [400, 64]:  # the larger length last is planned, as in a down projection
        assert 1 < room / row["bytes"] < 1.25
    else:
        assert room == pytest.approx(row["bytes"], rel=0.004)  # the columns' order besides
    if row["shape"] in ([64, 96], [64, 400]):
        usual, decomposed = row["moved"]
        moved = optimizer.accesses(recipe, states) * tensor.elements
        assert moved == pytest.approx(0.9 * usual + 0.1 * decomposed, rel=0.09)
    cubes = {"soap": 26 / 3, "pytorch-optimizer-soap": 14 / 3}[row["optimizer"]] / 10
    lengths = [d for d in row["shape"] if d <= 10_000 and len(row["shape"]) > 1]
    assert optimizer.flops(tensor) == pytest.approx(row["flops"] + cubes * sum(d**3 for d in lengths))


@pytest.mark.parametrize("row", DATA["shampoo"]["rows"], ids=str)
def test_shampoo_keeps_makes_moves_and_multiplies_what_it_did(row: dict[str, Any]) -> None:
    optimizer, most = shampoo(row["most"]), row["most"]
    assert optimizer.kept is not None
    assert optimizer.accesses is not None
    pairs = [alone(row | {"shape": shape}) for shape in row["shapes"]]
    tensors, recipe = [tensor for tensor, _ in pairs], pairs[0][1]
    states = [optimizer.per_element(t, recipe, 1) * t.elements for t in tensors]
    assert sum(states) == pytest.approx(row["state_bytes"], rel=1e-14)
    if "bytes" in row:  # copies of all at once, and the indices of triangles
        copies = optimizer.foreach_room * recipe.weight * sum(t.elements for t in tensors)
        assert row["bytes"] - (copies + optimizer.kept(tensors, recipe)) == pytest.approx(16, abs=16)
    moved = sum(
        optimizer.accesses(recipe, size / t.elements) * t.elements
        for t, size in zip(tensors, states, strict=True)
    )
    assert moved == pytest.approx(row["moved"], rel=0.09)
    roots = sum(11 * d**3 * n for t in tensors for n, lengths in blocks(t, most) for d in lengths)
    products = sum(float(shampoo_flops(most)(t)) for t in tensors) - roots / 100
    assert products == pytest.approx(row["flops"])


def test_shampoo_of_whole_blocks_keeps_half_of_its_papers_four_matrices() -> None:
    """4 m n of factors and inverse roots (distributed_shampoo.py, "Memory cost"), packed in triangles."""
    most = 1024
    packed = 4 * float(shampoo_state(most)(Tensor((8192, 2048)), Recipe(0.0, 0.0, 0.0, 0.0), 1)) / 4
    assert packed == pytest.approx(4 * 4 / 2, rel=2 / most)


def test_soap_keeps_what_its_paper_says() -> None:
    """2 m^2 + 2 n^2 + 3 m n with the gradient (Vyas et al. 2024, arXiv:2409.11321, "Space usage of SOAP")."""
    m, n = 4096, 1024
    kept = OPTIMIZERS["soap"].per_element(Tensor((m, n)), Recipe(1.0, 1.0, 0.0, 1.0), 1) * m * n
    assert kept + m * n == 2 * m * m + 2 * n * n + 3 * m * n


def test_soaps_products_of_embeddings_and_blocks_are_in_fp32_unless_they_are_halves() -> None:
    soap, halves = job_of(optimizer="soap", precision="bf16"), job_of(optimizer="pytorch-optimizer-soap")
    rates = [priced(job).compute.products_of(job.recipe.weight) for job in (soap, halves)]
    assert rates[1] / rates[0] == pytest.approx(312 / 19.5)
    flops = step_flops("soap", soap.model)
    assert float(priced(soap).step_seconds) > flops / rates[0]
    inner = step_flops("soap", soap.model, embeddings=False)
    embedding = 128256 * 2048 * 2048
    assert flops - inner == pytest.approx(10 * embedding + 26 / 3 * 2048**3 / 10)


def test_shampoos_indices_are_there_between_steps_too() -> None:
    job = job_of(optimizer="shampoo-1024")
    spans = [b.span for b in priced(job).buffers(True, True) if b.name == INDICES]
    assert spans == ["passes", "optimizer step"]


def test_came_still_holds_what_it_made_of_the_tensor_before() -> None:
    """Measured in a third step of came_pytorch 0.1.3 on tensors of these three shapes, in order."""
    room = OPTIMIZERS["came"].room
    assert room is not None
    tensors = [Tensor((64, 96)), Tensor((640, 96)), Tensor((64, 64))]
    for width, measured in ((4.0, 786_432), (2.0, 1_032_192)):
        assert room(tensors, Recipe(width, width, 0, width)) == measured


def test_adafactors_factors_of_transformers_are_fp32_whatever_the_weights() -> None:
    own, theirs = (
        total(priced(job_of(optimizer=name)), "states") for name in ("adafactor", "transformers-adafactor")
    )
    assert theirs == 2 * own


@pytest.mark.parametrize(("model", "real"), [("phi-3-mini", 3_685_632), ("falcon-7b", 4_818_560)])
def test_adafactor_sees_the_tensors_that_transformers_joins(model: str, real: int) -> None:
    """2 bytes for each row and column of the parameters of transformers 5.23's modules."""
    assert total(priced(job_of(model, optimizer="adafactor")), "states") == real


def test_muon_keeps_one_moment_of_the_blocks_matrices_and_two_of_the_rest() -> None:
    job = job_of(optimizer="muon")
    model = job.model
    attention = (
        2 * model.hidden_size * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    )
    matrices = model.num_hidden_layers * (attention + 3 * model.hidden_size * model.intermediate_size)
    rest = model.num_parameters - matrices
    assert total(priced(job), "states") == 2 * matrices + 4 * rest


def test_newton_schulz_of_a_square_matrix_costs_what_its_fifteen_products_do() -> None:
    n = 1000
    assert newton_schulz_flops(Tensor((n, n), hidden=True)) == 15 * 2 * n**3
    assert newton_schulz_flops(Tensor((n, n))) == 0  # embedding and head are AdamW's


def test_muons_overhead_is_that_of_its_authors() -> None:
    """At most T m / B of a step's FLOPs, for T iterations, width m and B tokens a batch.

    Jordan et al. 2024, section "Runtime analysis", from 6 n m B FLOPs of an n x m matrix's products.
    """
    model = ModelSpec.from_catalog("gpt-3-175b")
    tokens, width = 3_200_000, model.hidden_size
    square = newton_schulz_flops(Tensor((width, width), hidden=True)) / (6 * width**2 * tokens)
    assert square == pytest.approx(5 * width / tokens)
    ratio = step_flops("muon", model) / (model.flops_per_token(2048) * tokens)
    assert 0.5 * square < ratio < square


def test_muon_takes_longer_by_its_products() -> None:
    adamw, muon = (priced(job_of(optimizer=name)) for name in ("adamw", "muon"))
    seconds = step_flops("muon", adamw.job.model) / muon.compute.half_products
    assert float(muon.step_seconds) > seconds > 0
    assert float(muon.step_seconds) > float(adamw.step_seconds)


@pytest.mark.parametrize(("name", "count"), [("adamw8bit", 2), ("lion8bit", 1)])
def test_transformers_trainer_keeps_embeddings_states_in_fp32(name: str, count: int) -> None:
    own, trainers = (total(priced(job_of(optimizer=one)), "states") for one in (name, f"trainer-{name}"))
    embedding = 128256 * 2048
    assert trainers - own == pytest.approx(count * (4 - (1 + 4 / 256)) * embedding, rel=1e-12)


def test_paged_states_need_no_room_but_those_of_small_tensors() -> None:
    job = job_of(optimizer="paged-adamw8bit")
    norms = (2 * job.model.num_hidden_layers + 1) * job.model.hidden_size
    assert total(priced(job), "states") == 8 * norms
    assert any("paged optimizer states are left out" in note for note in job.assumptions)
    plain = job_of(optimizer="adamw8bit")
    assert total(priced(job), "moved") == pytest.approx(total(priced(plain), "moved"), rel=1e-3)


def test_sgd_in_operations_makes_no_copy_and_adam_one() -> None:
    for name, copies in {"sgd": 0, "momentum": 0, "adamw": 1, "adam": 1}.items():
        prices = priced(job_of(optimizer=name, step="foreach"))
        assert temporaries(prices) == copies * 2 * prices.job.model.num_parameters, name


@pytest.mark.parametrize(
    ("name", "accesses"), [("sgd", 2 + 2), ("momentum", 2 * 2 + 4), ("adamw", 4 * 2 + 4)]
)
def test_a_fused_step_reads_and_writes_states_once(name: str, accesses: int) -> None:
    prices = priced(job_of(optimizer=name))
    assert total(prices, "moved") == accesses * prices.job.model.num_parameters


def test_8_bit_states_move_a_quarter_of_what_fp32_ones_do() -> None:
    whole, small = (priced(job_of(optimizer=name, precision="bf16")) for name in ("adamw", "adamw8bit"))
    n = whole.job.model.num_parameters
    assert total(whole, "moved") == (16 + 8) * n
    assert total(small, "moved") == pytest.approx((4 + 8) * n, rel=0.01)


def test_torchaos_8_bit_states_have_a_table_for_each_of_them() -> None:
    """One byte, 4 for a block of 256, 1 KiB a state; norms of 2,048 stay in the weights' type."""
    job = job_of(optimizer="torchao-adamw8bit")
    model, layers = job.model, job.model.num_hidden_layers
    norms = (2 * layers + 1) * model.hidden_size
    large = model.num_parameters - norms
    tables = 2 * 1024 * (7 * layers + 1)
    expected = 2 * large * (1 + 4 / 256) + tables + 4 * norms
    assert total(priced(job), "states") == pytest.approx(expected, rel=1e-12)


def test_torchao_looks_at_a_gpus_own_part_of_a_tensor() -> None:
    """A norm of 4,096 elements is quantised whole; cut in two it is not."""
    sizes = {}
    for gpus in (1, 2):
        job = job_of("llama-3.1-8b", f"{gpus}xA100", framework="fsdp", optimizer="torchao-adamw8bit", batch=2)
        prices = priced(job, data_parallel=gpus, sharding="fsdp", micro_batch_size=2 // gpus)
        term = next(t for t in prices.layers[1].by_role[Role.OPTIMIZER] if t.name == "norm weights")
        sizes[gpus] = float(term.unit)
    assert sizes == {1: 2 * (1 + 4 / 256 + 1024 / 4096), 2: 2 * 2.0}


def test_within_the_backward_no_gradient_is_kept() -> None:
    kept, freed = (job_of(step=step) for step in ("fused", "in_backward"))
    assert total(priced(kept), "gradients") == 2 * kept.model.num_parameters
    assert total(priced(freed), "gradients") == 0
    # The largest gradient of a step is there while it is used.
    hidden, ffn = freed.model.hidden_size, freed.model.intermediate_size
    passing = [
        t for t in priced(freed).layers[1].by_role[Role.TRANSIENT] if t.name.startswith("gradient, until")
    ]
    assert {t.steps[0]: t.amount for t in passing if t.steps[0] in ("up", "down", "norm1")} == {
        "up": 2 * hidden * ffn,
        "down": 2 * hidden * ffn,
        "norm1": 2 * hidden,
    }


def test_lomo_is_sgd_within_the_backward() -> None:
    lomo, sgd = job_of(optimizer="lomo"), job_of(optimizer="sgd", step="in_backward")
    assert priced(lomo).spread().stages == priced(sgd).spread().stages


@pytest.mark.parametrize(("gpus", "batch"), [("1xA100", 4), ("2xA100", 2)])
def test_a_step_within_the_backward_takes_one_micro_batch_of_one_replica(gpus: str, batch: int) -> None:
    job = job_of(gpus=gpus, step="in_backward", batch=batch)
    replicas = job.cluster.num_gpus
    with pytest.raises(InputError, match="within the backward takes one micro-batch of one replica"):
        check_layout(job, Layout(data_parallel=replicas, grad_accum=batch // replicas))
    space = enumerate_layouts(job, Choices())
    assert sum(count for why, count in space.refused.items() if "within the backward" in why)
    assert space.size == (1 if replicas == 1 else 0)  # the whole batch at once


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_without_known_sizes_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"optimizer={name} is not planned: .*; use adamw or muon"):
        job_of(optimizer=name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adamw-8bit"}, "did you mean adamw8bit"),
        ({"optimizer": "muon", "framework": "fsdp"}, "muon is not planned under fsdp .*whole matrices.*hf"),
        ({"optimizer": "adam8bit", "framework": "deepspeed", "precision": "bf16"}, "use --framework hf"),
        ({"optimizer": "adamw8bit", "step": "foreach"}, "adamw8bit has no foreach step"),
        ({"optimizer": "muon", "step": "in_backward"}, "muon is not planned within the backward"),
        ({"optimizer": "lion", "optimizer_dtype": "bf16"}, "lion has moments of its own type"),
        ({"optimizer_dtype": "fp8"}, "optimizer_dtype=fp8 is not planned under hf: use fp32 or bf16"),
        (
            {"gradient_dtype": "bf16", "framework": "fsdp", "precision": "bf16"},
            "gradients are of the weights",
        ),
        ({"optimizer": "soap"}, "soap takes weights and gradients in fp32.*bf16 or fp32, or .*pytorch"),
        ({"optimizer": "soap", "framework": "fsdp", "precision": "bf16"}, "whole tensors.*--framework hf"),
        ({"optimizer": "shampoo", "framework": "fsdp"}, "its own configurations for DDP and FSDP"),
        ({"optimizer": "soap", "step": "foreach", "precision": "fp32"}, "soap has no foreach step"),
        ({"optimizer": "shampoo", "model": "olmoe-1b-7b"}, "not planned for a mixture of experts"),
        (
            {"optimizer": "shampoo", "model": "vit-large-patch16", "seq_length": 197},
            "not planned for convolutions",
        ),
        ({"optimizer": "shampoo", "adapters": {"rank": 8}}, "shampoo is not planned for adapters"),
        ({"precision": "bf16-kahan", "master_weights": True}, "compensation in place of master weights"),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_fix(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        job_of(**given)


def test_8_bit_moments_are_the_distributed_optimizers_and_are_unpacked_in_the_step() -> None:
    """1 + 1 bytes beside the master copy, cut; both in fp32 while they are updated."""
    job = job_of(
        "llama-3.1-8b", "8xH100", framework="megatron", precision="bf16", optimizer_dtype="fp8", batch=8
    )
    assert list(job.stack.shardings) == ["zero1"]
    prices = priced(job, data_parallel=8, sharding="zero1")
    n = job.model.num_parameters
    assert total(prices, "states") == pytest.approx(n * (4 + 2) / 8, rel=0.01)
    assert total(prices, "room") == pytest.approx(n * 8 / 8, rel=0.01)
    with pytest.raises(InputError, match="optimizer_dtype=fp8 is Adam's"):
        job_of(
            "llama-3.1-8b",
            "8xH100",
            framework="megatron",
            precision="bf16",
            optimizer_dtype="fp8",
            optimizer="sgd",
        )


def test_lion_under_zero_is_cut_like_any_flat_state() -> None:
    job = job_of("llama-3.1-8b", "8xH100", framework="deepspeed", precision="bf16", optimizer="lion", batch=8)
    prices = priced(job, data_parallel=8, sharding="zero1")
    assert total(prices, "states") == pytest.approx(job.model.num_parameters * (4 + 4) / 8)


def test_every_tensor_of_a_model_is_there_once_a_kind() -> None:
    """GPT-2 keeps query, key and value in one tensor: six of a block's weights are two of its tensors."""
    gpt2 = tensors_of(ModelSpec.from_catalog("gpt2"))
    assert Tensor((768, 3 * 768), hidden=True) in gpt2
    assert Tensor((3 * 768,)) in gpt2
    assert Tensor((50257, 768)) in [Tensor(tuple(reversed(t.shape))) for t in gpt2]
