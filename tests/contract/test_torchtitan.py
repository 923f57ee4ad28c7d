"""torchtitan's own code takes what is exported, and has the same degrees, batch, split and parameters."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import tomli_w

from planner.export import NotExpressible, Subject
from planner.export.read_torchtitan import read
from planner.export.torchtitan import export
from planner.export.torchtitan_flavors import flavor_named, flavors
from planner.export.torchtitan_limits import stage_layers
from planner.export.torchtitan_schema import keys
from planner.export.torchtitan_shards import local_parameters
from planner.export.torchtitan_words import CONTEXT, PRECISIONS, SCHEDULES
from planner.specs import ModelSpec
from tests.contract import WANTED, judged
from tests.contract.torchtitan_plans import OLDER, planned, plans

pytestmark = pytest.mark.contract
HOSTILE = "a'b\"c`id`$(id)\\ \u2028\N{SNOWMAN} --x"
SETTINGS = {"hf_assets_path": HOSTILE.replace("\u2028", ""), "dataset": "c4_test", "dump_folder": "--out"}
COUNT = {"0.2": 310, "0.3": 270}
"""Plans that are drawn, so that 200 of them can be told."""


def expressible(version: str) -> list[Subject]:
    found, refused = list[Subject](), list[str]()
    for _, subject in plans(version, COUNT[version]):
        if len(found) == WANTED:
            break
        try:
            export(subject, version, SETTINGS)
        except NotExpressible as error:
            refused.append(str(error))
        else:
            found.append(subject)
    assert len(found) >= WANTED
    assert not [reason for reason in refused if not re.search(": use |: leave |the nearest", reason)]
    return found[:WANTED]


def agree(subject: Subject, told: dict[str, Any]) -> None:
    """What torchtitan resolved is what was planned."""
    assert told["ok"], told["error"]
    layout, job = subject.layout, subject.job
    shards = layout.data_shards if layout.sharding == "fsdp" else 1
    expected = {
        "dp_replicate": layout.data_parallel // shards,
        "dp_shard": shards,
        "cp": layout.context_parallel,
        "tp": layout.tensor_parallel,
        "pp": layout.pipeline_parallel,
        "ep": layout.expert_parallel,
    }
    assert {name: told["dims"][name] for name in expected} == expected
    assert told["batch"] == job.global_batch_size
    assert (told["micro"], told["accumulated"]) == (layout.micro_batch_size, layout.grad_accum)
    assert told["seq"] == job.seq_length
    precision = PRECISIONS[str(job.training.precision)]
    assert (told["dtype"], told["param"]) == (precision.dtype, precision.param)
    assert told["offload"] is bool(layout.offload)
    assert told["reshard"] == ("always" if layout.reshard_after_forward else "never")
    assert told["optimizer"][0].lower() == job.training.optimizer
    assert told["optimizer"][1] == subject.options()["optimizer_step"]
    assert ("model" in told["compiled"]) is (subject.options()["compile"] == "on")
    assert ("loss" in told["compiled"]) is (subject.options()["loss"] == "compiled")
    assert told["async_tp"] is (subject.options()["async_tp"] == "on")
    assert told["shape"][:2] == [subject.model.num_hidden_layers, subject.model.hidden_size]
    assert told["texts"] == [SETTINGS["hf_assets_path"], SETTINGS["dataset"], SETTINGS["dump_folder"]]
    if layout.pipeline_parallel > 1:
        assert told["flushes"] == 1
        assert told["schedule"] == SCHEDULES[layout.schedule]
        assert told["stages"] == [len(own) for own in stage_layers(subject)]


def test_toml_is_accepted_and_says_what_was_planned():
    subjects = expressible("0.2")
    cases = [
        {"toml": export(one, "0.2", SETTINGS).files["plan.toml"], "world": one.plan.num_gpus}
        for one in subjects
    ]
    for subject, told in zip(subjects, judged("titan02", "torchtitan02.py", cases), strict=True):
        agree(subject, told)
        ways = {way for stage in subject.plan.stages for way, own in stage.rows.items() if sum(own)}
        every = {"none": ["none"], "full": ["full"], "selective": ["selective", "op"]}
        if len(ways) == 1:
            assert told["checkpoint"][: len(every[min(ways)])] == every[min(ways)]
        else:
            counts = [
                (sum(stage.rows.get("full", ())), sum(map(sum, stage.rows.values())))
                for stage in subject.plan.stages
            ]
            assert [n for n, _ in counts] == [whole // int(told["checkpoint"][1]) for _, whole in counts]
        if subject.layout.context_parallel > 1:
            assert told["rotate"] == CONTEXT[subject.layout.context_comm]
        precision = PRECISIONS[str(subject.job.training.precision)]
        assert told["converters"] == [precision.converter] * bool(precision.converter)
        assert (told["recipe"] or "") == precision.recipe


def test_recipes_are_accepted_and_say_what_was_planned():
    subjects = expressible("0.3")
    cases = [
        {"recipe": export(one, "0.3", SETTINGS).files["planner_recipes.py"], "world": one.plan.num_gpus}
        for one in subjects
    ]
    for subject, told in zip(subjects, judged("titan03", "torchtitan03.py", cases), strict=True):
        agree(subject, told)
        assert not told["graphs"]
        assert told["sequence_parallel"] is subject.layout.sequence_parallel
        ways = {way for stage in subject.plan.stages for way, own in stage.rows.items() if sum(own)}
        kinds = {"none": "NoneType", "full": "FullAC.Config", "selective": "SelectiveAC.Config"}
        assert told["checkpoint"] == kinds[ways.pop()]
        chunked = subject.options()["loss"] == "chunked"
        assert told["loss"] == ("ChunkedLossWrapper.Config" if chunked else "CrossEntropyLoss.Config")
        quantized = bool(PRECISIONS[str(subject.job.training.precision)].converter)
        assert ("Float8Linear.Config" in told["linears"]) is quantized


def test_shapes_of_nobody_else_are_built_in_the_recipe():
    names = (
        "llama-2-7b",
        "llama-2-70b",
        "mistral-7b-v0.3",
        "tinyllama-1.1b",
        "codellama-34b",
        "mistral-nemo-12b",
    )
    models = [ModelSpec.from_catalog(name) for name in names]
    models.append(models[0].model_copy(update={"tie_word_embeddings": True}))
    given = {"seq_length": 2048, "global_batch_size": 32, "precision": "fp8-rowwise"}
    subjects = [planned(model, "8xh100", given, "full") for model in models]
    made = [export(one, "0.3", SETTINGS) for one in subjects]
    cases = [{"recipe": one.files["planner_recipes.py"], "world": 8, "count": True} for one in made]
    for subject, told in zip(subjects, judged("titan03", "torchtitan03.py", cases), strict=True):
        agree(subject, told)
        assert told["parameters"] == subject.model.num_parameters
        assert "Float8Linear.Config" in told["linears"]


def sharded(
    model: ModelSpec, gpus: int, ranks: list[int], layers: tuple[int, ...] | None = None, **given: Any
) -> tuple[Subject, list[int]]:
    recompute = "none" if given.get("schedule") == "zb-v" else "full"
    options = [*OLDER, *(["router=half"] if model.experts else [])]
    usual = {"option": options, "seq_length": 512, "global_batch_size": 96}
    return planned(model, f"{gpus}xh100", usual | given, recompute, layers), ranks


def test_every_rank_has_the_parameters_that_are_planned():
    """torchtitan 0.2.2's own parallelize and pipeline code on tensors without storage."""
    small, dense = ModelSpec.from_catalog("llama-3.1-8b"), ModelSpec.from_catalog("llama-3-70b")
    lite, mixture = ModelSpec.from_catalog("deepseek-v2-lite"), ModelSpec.from_catalog("qwen3-30b-a3b")
    debug = flavor_named("llama3", "debugmodel").spec
    drawn = [
        sharded(dense, 64, [0, 32], tensor_parallel=4, pipeline_parallel=2, global_batch_size=64),
        sharded(dense, 64, [0], data_shards=4, tensor_parallel=4),
        sharded(lite, 32, [0], tensor_parallel=2, expert_parallel=8),
        sharded(lite, 16, [15], pipeline_parallel=2, expert_parallel=4),
        sharded(small, 16, [5], context_parallel=2, tensor_parallel=2, data_shards=2),
        sharded(small, 24, [1, 23], (9, 8, 8, 7), pipeline_parallel=4),
        sharded(small, 8, [3, 5], pipeline_parallel=2, schedule="interleaved", chunks=2),
        sharded(small, 8, [3, 5], pipeline_parallel=2, schedule="zb-v"),
        sharded(debug, 6, [0, 5]),
        sharded(ModelSpec.from_catalog("qwen3-8b"), 12, [11]),
        sharded(mixture, 16, [15], expert_parallel=8, tensor_parallel=2),
        sharded(ModelSpec.from_catalog("gpt-oss-20b"), 64, [0, 63], expert_parallel=8, global_batch_size=64),
    ]
    cases = [
        {
            "toml": export(subject, "0.2", {}).files["plan.toml"],
            "world": subject.plan.num_gpus,
            "ranks": ranks,
        }
        for subject, ranks in drawn
    ]
    found = []
    for (subject, ranks), told in zip(drawn, judged("titan02", "torchtitan_shards.py", cases), strict=True):
        assert told["ok"], told["error"]
        assert told["local"] == [local_parameters(subject, rank) for rank in ranks], subject.layout
        found += told["local"]
    assert found[:4] == [1102462976, 1102464000, 4409853952, 491933408]


MUTATED: dict[str, tuple[str, Any]] = {
    "text for a number": ("training.local_batch_size", "8"),
    "a fraction for a number": ("training.seq_len", 512.5),
    "no choice": ("activation_checkpoint.mode", "everything"),
    "text for a switch": ("compile.enable", "yes"),
    "a number for a switch": ("training.enable_cpu_offload", 1),
    "text for a list": ("compile.components", "model"),
    "a number for an option": ("activation_checkpoint.selective_ac_option", 2),
    "a type that is none": ("training.mixed_precision_param", "float16"),
    "a policy that is none": ("parallelism.fsdp_reshard_after_forward", True),
    "a converter that is none": ("model.converters", ["float8"]),
    "an option that is none": ("activation_checkpoint.selective_ac_option", "ops"),
    "no such optimizer": ("optimizer.name", "Lion"),
    "no such implementation": ("optimizer.implementation", "fast"),
}
REFUSED: dict[str, tuple[str, Any]] = {
    "a misspelt key": ("parallelism.tensor_parallel_degre", 2),
    "a misspelt section": ("paralelism.tensor_parallel_degree", 2),
    "a degree that is too much": ("parallelism.tensor_parallel_degree", 16),
    "no degree": ("parallelism.context_parallel_degree", 0),
    "a batch that does not divide": ("training.global_batch_size", 33),
    "a sequence that does not divide": ("training.seq_len", 511),
    "no such schedule": ("parallelism.pipeline_parallel_schedule", "2F2B"),
    "micro-batches that do not divide": ("parallelism.pipeline_parallel_microbatch_size", 3),
    "too few layers on a stage": ("parallelism.pipeline_parallel_layers_per_stage", 1),
    "no such flavor": ("model.flavor", "9B"),
}


def mutated(text: str, path: str, value: Any) -> str:
    document = tomllib.loads(text)
    place = document
    *sections, name = path.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
    return tomli_w.dumps(document)


def test_what_torchtitan_takes_silently_is_found_here():
    given = {"option": OLDER, "seq_length": 512, "global_batch_size": 32, "pipeline_parallel": 2}
    model, given = flavor_named("llama3", "debugmodel").spec, given | {"tensor_parallel": 2}
    subject = planned(model, "8xh100", given, "selective")
    text = export(subject, "0.2", {}).files["plan.toml"]
    assert not read({"plan.toml": text}, {"NGPU": "8"}).findings
    cases = [
        {"toml": mutated(text, *change), "world": 8} for change in (*MUTATED.values(), *REFUSED.values())
    ]
    answers = dict(zip([*MUTATED, *REFUSED], judged("titan02", "torchtitan02.py", cases), strict=True))
    for name, (path, value) in (MUTATED | REFUSED).items():
        wrong = [
            one
            for one in read({"plan.toml": mutated(text, path, value)}, {"NGPU": "8"}).findings
            if one.severity == "error"
        ]
        assert wrong, name
        if name in REFUSED:
            assert not answers[name]["ok"], name
    silent = [name for name in MUTATED if answers[name]["ok"]]
    assert len(silent) >= 9, answers


def test_the_table_of_settings_is_torchtitans():
    [told] = judged("titan02", "torchtitan_tables.py", [{"version": "0.2"}])
    assert {name: tuple(own) for name, own in told["keys"].items()} == dict(keys())


@pytest.mark.parametrize("version", ["0.2", "0.3"])
def test_flavors_have_the_shapes_that_are_planned(version):
    known = [
        (one.model, name, one.spec)
        for one in flavors()
        if version in one.versions
        for name in (one.name, *(one.alike if version == "0.2" else ()))
    ]
    case = {"version": version, "flavors": [own[:2] for own in known]}
    [told] = judged(f"titan{version.replace('.', '')}", "torchtitan_tables.py", [case])
    for (model, name, spec), count in zip(known, told["parameters"], strict=True):
        assert count == spec.num_parameters, (model, name)
    assert set(told["known"]) <= {f"{model} {name}" for model, name, _ in known} | set(told["unplanned"])
