"""Plans of Megatron's kernels in nanotron's words: bits that must be there, refusals, injection."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from planner.errors import InputError
from planner.export import NotExpressible, export
from planner.export.nanotron import CONFIG, split_of
from planner.specs import ModelSpec
from tests.planner.exported import SPEC, planned

ZERO1: dict[str, Any] = {"sharding": "zero1", "context_comm": "ring"}


def written(**given: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(export(planned("megatron", **given), "nanotron").files[CONFIG])
    return found


def test_degrees_batch_and_states_are_there() -> None:
    layers = split_of(SPEC, 2)
    found = written(**ZERO1, tensor_parallel=2, sequence_parallel=True, pipeline_parallel=2, layers=layers)
    assert {name: found["parallelism"][name] for name in ("dp", "pp", "tp")} == {"dp": 4, "pp": 2, "tp": 2}
    assert found["parallelism"]["tp_mode"] == "REDUCE_SCATTER"
    assert found["tokens"]["batch_accumulation_per_replica"] == 4
    assert found["optimizer"]["zero_stage"] == 1
    assert found["model"]["model_config"]["is_llama_config"] is True
    assert written(**ZERO1, recompute="full")["parallelism"]["recompute_layer"] is True


def test_what_llamas_configuration_has_no_word_for_is_qwens() -> None:
    biased = SPEC.model_copy(update={"model_type": "qwen2", "qkv_bias": True})
    found = written(**ZERO1, model=biased)["model"]["model_config"]
    assert found["is_qwen2_config"] is True
    assert found["attention_bias"] is True
    ring = written(**ZERO1, context_parallel=2)["model"]["model_config"]
    assert ring["_attn_implementation"] == "ring"
    gathered = {"sharding": "zero1", "context_comm": "all-gather"}
    assert written(**gathered, context_parallel=2)["model"]["model_config"]["ring_attn_heads_k_stride"] == 1


def test_layers_are_split_as_nanotron_does() -> None:
    assert split_of(ModelSpec.from_catalog("llama-2-7b"), 2) == (17, 15)
    assert sum(split_of(ModelSpec.from_catalog("qwen2-7b"), 4)) == 28


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sharding": "zero2"}, "zero_stage"),
    ({**ZERO1, "recompute": "selective"}, "recompute"),
    ({**ZERO1, "recompute": "full:2"}, "recompute"),
    ({**ZERO1, "chunks": 2, "pipeline_parallel": 2, "schedule": "interleaved"}, "virtual"),
    ({**ZERO1, "pipeline_parallel": 2, "layers": (8, 8)}, "layers on the stages"),
    ({**ZERO1, "rank_order": "tp-pp-dp"}, "rank_order"),
    ({**ZERO1, "precision": "fp16"}, "precision"),
    ({**ZERO1, "optimizer": "adam"}, "optimizer"),
    ({**ZERO1, "options": {"norm": "recomputed"}}, "norm"),
    ({**ZERO1, "offload": "optimizer"}, "offload"),
    ({**ZERO1, "adapters": {"rank": 4}}, "adapters"),
    ({"sharding": "zero1", "context_comm": "ulysses", "context_parallel": 2}, "context_comm"),
    ({**ZERO1, "model": SPEC.model_copy(update={"qk_norm": True})}, "qk_norm"),
    ({**ZERO1, "model": SPEC.model_copy(update={"head_dim": 32})}, "head_dim"),
]


@pytest.mark.parametrize(("given", "word"), REFUSED, ids=lambda one: str(one)[:50])
def test_what_cannot_be_told_is_refused(given: dict[str, Any], word: str) -> None:
    with pytest.raises(NotExpressible, match=word):
        export(planned("megatron", **given), "nanotron")


def test_more_tensor_parallelism_than_key_value_heads_is_refused() -> None:
    few = SPEC.model_copy(update={"num_key_value_heads": 2})
    with pytest.raises(NotExpressible, match="num_key_value_heads=2"):
        export(planned("megatron", **ZERO1, model=few, tensor_parallel=4), "nanotron")


def test_settings_come_out_inert() -> None:
    evil = "a: [b] # $(touch /tmp/x) `id` '\"\u00e9"
    subject = planned("megatron", **ZERO1, name=evil + "\nb: 1")
    settings = {"project": evil, "tokenizer": "-x", "train_steps": "12", "lr": "1e-4"}
    made = export(subject, "nanotron", settings=settings)
    found = yaml.safe_load(made.files[CONFIG])
    assert (found["general"]["project"], found["tokens"]["train_steps"]) == (evil, 12)
    assert found["tokenizer"]["tokenizer_name_or_path"] == "-x"
    assert made.files[CONFIG].isascii() or found
    for name, value in (("train_steps", "many"), ("lr", "fast"), ("project", "a\nb")):
        with pytest.raises(InputError, match=name):
            export(subject, "nanotron", settings={name: value})
