"""What would fit: every change that is suggested is true, and what its options give is what was said."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from planner import ClusterSpec, InputError, Layout, ModelSpec, Plan, TrainingSpec, api, reading
from planner.advice import ORDER, Advice, Binding, Change, advise, changes_that_fit
from planner.asked import Asked, applied, options_between, options_text
from planner.cli import cluster_of, one_layout, way_of
from planner.layouts import Choices
from planner.options import CHOICES, JOB, LAYOUT, TRAINING
from planner.sources import BUFFERS, ROWS, SHARES
from planner.stacks import STACKS
from tests.planner.test_cli import run

ROOT = Path(__file__).parents[2]

GIB = 2**30
Given = dict[str, Any]
EXAMPLES = int(os.environ.get("WHYNOT_EXAMPLES", "5"))
"""An example tries dozens of changes: a few in every run, the same ones, and none is made smaller. With
WHYNOT_EXAMPLES as many others are drawn."""
PROPERTY = settings(
    deadline=None,
    derandomize="WHYNOT_EXAMPLES" not in os.environ,
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def defaults(*groups: Any) -> Given:
    return {name: rest[0] for group in groups for name, (_, *rest) in group.items() if rest}


@st.composite
def shapes(draw: st.DrawFn) -> str:
    """A model as the command line has it."""
    heads = draw(st.sampled_from([8, 16, 32]))
    numbers = {"layers": draw(st.sampled_from([4, 6, 8, 16])), "hidden": 128 * heads, "heads": heads}
    numbers["kv_heads"] = draw(st.sampled_from([8, heads]))
    numbers["vocab"] = draw(st.sampled_from([32000, 50257]))
    numbers["ffn"] = 384 * heads
    return ",".join(f"{name}={value}" for name, value in numbers.items())


FRAMEWORKS = ("megatron", "torchtitan", "fsdp", "deepspeed", "hf")


@st.composite
def commands(draw: st.DrawFn) -> Given:
    """Options of an estimate, before there is a budget."""
    gpus = draw(st.sampled_from(["8xA100", "4xH100", "2x4xA100", "16xA100", "3x4xH100"]))
    framework = draw(st.sampled_from(FRAMEWORKS))
    tensor = pipeline = 1
    if framework in ("megatron", "torchtitan"):
        tensor, pipeline = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    shardings = {"megatron": ["ddp", "zero1", None], "deepspeed": ["ddp", "zero1", "zero2", "zero3"]}
    schedules = {"megatron": [None, "interleaved"], "torchtitan": [None, "gpipe", "interleaved"]}
    schedule = draw(st.sampled_from(schedules.get(framework, [None]))) if pipeline > 1 else None
    return defaults(JOB, TRAINING, LAYOUT) | {
        "model": draw(shapes()),
        "gpus": gpus,
        "framework": framework,
        "seq_length": draw(st.sampled_from([512, 2048, 4096])),
        "global_batch_size": draw(st.sampled_from([None, 48, 96])),
        "micro_batch_size": draw(st.sampled_from([1, 2, 4])),
        "tensor_parallel": tensor,
        "sequence_parallel": draw(st.sampled_from([None, False])),
        "pipeline_parallel": pipeline,
        "schedule": schedule,
        "chunks": 2 if schedule == "interleaved" else 1,
        "sharding": draw(st.sampled_from(shardings.get(framework, [None]))),
        "recompute": draw(st.sampled_from(["none", "none", "full", "auto"])),
        "option": draw(st.sampled_from([None, ["overlap=off"]])) if framework == "megatron" else None,
        "headroom": draw(st.sampled_from([None, "10%"])),
        "memory_budget": None,
    }


def estimated(given: Given) -> Plan:
    return api.estimate(*one_layout(given), **way_of(given))


def asked_of(given: Given) -> Asked:
    model, cluster, training, layout = one_layout(given)
    way = way_of(given)
    return Asked(model, cluster, training, layout, way["recompute"], way["layers"])


def same(plan: Plan, change: Change) -> None:
    assert plan.verdict == "fits", change
    assert plan.peak_bytes == change.peak_bytes, change
    assert plan.step_time_s == pytest.approx(change.step_time_s, rel=1e-9), change
    assert plan.num_gpus == change.num_gpus


def test_fewer_shards_than_replicas_are_said_though_there_were_as_many_before() -> None:
    asked = defaults(JOB, TRAINING, LAYOUT) | {
        "model": "llama-3.2-1b",
        "gpus": "8xA100",
        "framework": "torchtitan",
    }
    given = asked | {"tensor_parallel": 2, "pipeline_parallel": 2}
    before = asked_of(given)
    layout = asked_of(asked | {"data_shards": 2}).layout
    assert before.layout is not None
    assert layout is not None
    assert (before.layout.data_shards, layout.data_shards, layout.data_parallel) == (2, 2, 8)
    options = options_between(before, replace(before, layout=layout))
    assert options["data_shards"] == 2
    assert asked_of(applied(given, options)).layout == layout


@given(st.data())
@PROPERTY
def test_a_change_of_a_given_layout_fits_as_said(data: st.DataObject) -> None:
    """Applied in Python, and as options in place of those of the command; a budget that is missed by
    little or by much."""
    given = data.draw(commands())
    try:
        whole = estimated(given)
    except InputError:
        assume(False)
    part = data.draw(st.sampled_from([0.4, 0.6, 0.8, 0.95]))
    budget = min(whole.most_bytes, whole.capacity_bytes) * part
    assume(budget > 2 * GIB)
    given["memory_budget"] = f"{budget / GIB:.3f}GiB"
    asked = asked_of(given)
    plan = api.estimate_of(asked)
    assume(not plan.fits)  # auto recomputes what it must
    advice = advise(asked, plan, api.estimate_of, limit=2.0)
    assert advice.binding.surely_over_bytes > 0
    assert [change.of for change in advice.changes] == sorted(
        (change.of for change in advice.changes), key=ORDER.index
    )
    for change in advice.changes:
        same(api.estimate_of(change.asked), change)
        same(estimated(applied(given, change.options)), change)
        assert change.step_time_ratio == pytest.approx(change.step_time_s / plan.step_time_s)
    for tried in advice.tried:
        still = tried.surely_over_bytes
        assert still is None or 0 < still < advice.binding.surely_over_bytes


def searched(given: Given) -> Plan:
    asked = search_of(given)
    return api.search(asked.model, asked.cluster, asked.training, choices=asked.choices, top=1)[0]


def search_of(given: Given) -> Asked:
    choices = Choices(**reading.read_choices(given))
    model, cluster, training = (
        reading.read_model(given["model"]),
        cluster_of(given),
        reading.read_training(given),
    )
    if choices.micro_batch_size and len(choices.micro_batch_size) == 1:
        training = reading.with_batch(
            model, cluster, training, cluster.num_gpus * choices.micro_batch_size[0]
        )
    return Asked(model, cluster, training, choices=choices)


@given(st.data())
@PROPERTY
def test_a_change_of_a_search_fits_as_said(data: st.DataObject) -> None:
    given = defaults(JOB, TRAINING, CHOICES) | {
        "model": data.draw(shapes()),
        "gpus": data.draw(st.sampled_from(["2xA100", "4xA100", "2x2xH100"])),
        "framework": data.draw(st.sampled_from(FRAMEWORKS)),
        "seq_length": data.draw(st.sampled_from([1024, 4096])),
        "global_batch_size": data.draw(st.sampled_from([None, 16])),
        "memory_budget": data.draw(st.sampled_from(["4GiB", "6GiB", "10GiB"])),
        "recompute": data.draw(st.sampled_from([None, "none"])),
        "pipeline_parallel": data.draw(st.sampled_from([None, "1"])),
        "micro_batch_size": data.draw(st.sampled_from([None, "2", "1,4"])),
    }
    asked = search_of(given)
    try:
        from planner.best_first import find

        assume(not find(asked.job, asked.choices, top=1).answers)
    except InputError:
        assume(False)
    changes, _ = changes_that_fit(asked, limit=2.0)
    for change in changes:
        same(searched(applied(given, change.options)), change)


# --- Examples --------------------------------------------------------------------------------------

LARGE = ["-m", "llama-65b", "-g", "64x80G", "-tp", "8", "-b", "512", "-mb", "8", "--sharding", "ddp"]


def advice_of(*arguments: str) -> Any:
    result = run("estimate", *arguments, "--json")
    assert result.exit_code == 1, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def large() -> Any:
    return advice_of(*LARGE)


def test_what_binds_has_its_name(large: Any) -> None:
    """A stage, its moment, the component that takes most of it, and by how much it is over."""
    (stage,) = large["plans"][0]["stages"]
    binding = large["binding"]
    largest = max(stage["components"], key=stage["components"].get)
    assert (binding["stage"], binding["moment"], binding["place"]) == (0, stage["moment"], "GPU")
    assert (binding["component"], binding["component_bytes"]) == (largest, stage["components"][largest])
    assert binding["over_bytes"] == stage["peak_bytes"] - stage["capacity_bytes"]
    assert binding["surely_over_bytes"] == stage["most_bytes"] - stage["capacity_bytes"]


def test_options_appended_to_the_command_give_the_change(large: Any) -> None:
    """As somebody types them; a later option takes the place of an earlier one."""
    found = 0
    for change in large["changes"]:
        if "no --" in change["option"]:
            continue
        result = run("estimate", *LARGE, *shlex.split(change["option"]), "--json")
        assert result.exit_code == 0, change
        (plan,) = json.loads(result.stdout)["plans"]
        assert plan["peak_bytes"] == change["peak_bytes"]
        assert plan["step_time_s"] == pytest.approx(change["step_time_s"])
        found += 1
    assert found >= 3


def test_sharing_states_out_further_is_the_mildest_of_its_sort() -> None:
    """ZeRO-1 does for DDP's optimizer states; ZeRO-2 is not suggested beside it."""
    arguments = ["-m", "llama-2-7b", "-g", "8x80G", "--framework", "deepspeed", "-b", "64", "-s", "1024"]
    document = advice_of(*arguments, "--sharding", "ddp")
    (found,) = [one["options"] for one in document["changes"] if set(one["options"]) == {"sharding"}]
    assert found == {"sharding": "zero1"}


def test_a_plan_at_risk_does_not_fit_for_sure_and_says_so() -> None:
    model, training = ModelSpec.from_catalog("llama-2-7b"), TrainingSpec(global_batch_size=8)
    layout = Layout(data_parallel=8, sharding="zero1")
    plan = api.estimate(model, ClusterSpec.parse("8xA100"), training, layout)
    budget = (plan.least_bytes + plan.most_bytes) // 2
    cluster = ClusterSpec.parse("8xA100").model_copy(update={"budget_bytes": budget})
    advice = api.whynot(model, cluster, training, layout)
    assert advice is not None
    assert advice.binding.surely_over_bytes == plan.most_bytes - budget
    assert "use the whole GPU" in [change.what for change in advice.changes]
    assert api.whynot(model, ClusterSpec.parse("8xA100"), training, layout) is None


def test_a_host_that_is_too_small_binds() -> None:
    model = ModelSpec.from_catalog("llama-2-7b")
    cluster = ClusterSpec.parse("8xA100").model_copy(update={"host_memory_bytes": 64 * GIB})
    training = TrainingSpec(global_batch_size=8, framework="deepspeed")
    layout = Layout(data_parallel=8, sharding="zero2", offload="optimizer")
    advice = api.whynot(model, cluster, training, layout)
    assert isinstance(advice, Advice)
    assert advice.binding.place == "host"
    assert "--host-memory" in advice.binding.describe()


def test_differences_are_said_as_options() -> None:
    model, cluster = ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse("2x4xA100")
    training = TrainingSpec(global_batch_size=64, options={"loss": "fused"})
    one = Asked(model, cluster, training, Layout(data_parallel=8, grad_accum=8))
    assert options_between(one, one) == {}
    wider = one.with_layout(data_parallel=4, tensor_parallel=2, sequence_parallel=True)
    assert options_text(options_between(one, wider)) == "-tp 2 -dp 4 --sequence-parallel"
    assert wider.layout == Layout(4, 2, grad_accum=16, sequence_parallel=True)
    other = replace(one, training=training.model_copy(update={"options": {}}))
    assert options_text(options_between(one, other)) == "no --option loss"
    with pytest.raises(InputError, match="multiple"):
        one.with_layout(micro_batch_size=3)
    given = {"option": ["loss=fused", "norm=kept"], "headroom": "10%"}
    change = {"option": {"loss": "parallel"}, "headroom": None}
    assert applied(given, change) == {"option": ["norm=kept", "loss=parallel"], "headroom": None}


def test_binding_is_the_worst_of_all_places() -> None:
    plan = api.estimate(
        ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse("1x24G"), TrainingSpec(global_batch_size=1)
    )
    assert Binding.of(plan) == Binding.all_of(plan)[0]
    assert Binding.of(plan).describe().startswith("at ")


# --- explain -----------------------------------------------------------------------------------------

EXPLAINED = ["explain", "-m", "llama-65b", "-g", "64x80G", "-tp", "8", "-pp", "2", "-b", "512"]


def test_explain_is_folded_by_component() -> None:
    output = run(*EXPLAINED).output
    assert "gate weight" not in output
    row = next(line for line in output.splitlines() if line.startswith("optimizer states"))
    assert row.split()[2:] == ["8", "364.88", "GiB", "1/4", "1/8", "11.40", "GiB", "27.2%"]


def test_a_term_is_taken_apart_with_formula_numbers_and_source() -> None:
    output = run(*EXPLAINED, "--term", "gate weight").output
    assert "bytes x hidden x ffn x layers x ZeRO-1 x TP" in output
    assert f"= 12 x 8,192 x 22,016 x 40 x 1/4 x 1/8 = {12 * 8192 * 22016 * 40 // 32:,} bytes" in output
    assert "TP 1/8: Shoeybi et al. 2019" in output
    entries = json.loads(run(*EXPLAINED, "--term", "Gate Weight", "--json").stdout)["entries"]
    assert {entry["component"] for entry in entries} == {"parameters", "gradients", "optimizer_states"}


def test_a_term_that_is_not_there_names_the_nearest() -> None:
    result = run(*EXPLAINED, "--term", "gatewait")
    assert result.exit_code == 2
    assert "did you mean gate weight" in result.output


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_term_has_a_source(framework: str) -> None:
    model, cluster = ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse("8xA100")
    training = TrainingSpec(global_batch_size=16, framework=framework)
    layout = Layout(data_parallel=8, grad_accum=2, sharding="fsdp" if "fsdp" in framework else "ddp")
    layout = replace(layout, sharding="fsdp") if framework == "torchtitan" else layout
    found = api.explain(model, cluster, training, layout)
    assert all(entry.source for entry in found.entries)


def test_every_strategy_and_framework_has_a_source() -> None:
    """Papers are those that the strategies' own pages name."""
    modules = [import_module(f"strategies.{path.stem}") for path in (ROOT / "strategies").glob("*.py")]
    labels = {vars(one)["label"] for module in modules for one in vars(module).values() if has_label(one)}
    assert labels <= set(SHARES)
    assert set(STACKS) <= set(ROWS)
    pages = "".join(path.read_text() for path in (ROOT / "strategies").glob("*.py"))
    for paper in re.findall(r"arXiv:[\d.]+\d", " ".join(SHARES.values())):
        assert paper in pages, paper
    for page in {one for one in [*SHARES.values(), *BUFFERS.values()] if one.startswith("docs/")}:
        assert (ROOT / page.partition("#")[0]).exists(), page


def has_label(one: object) -> bool:
    return isinstance(one, type) and isinstance(vars(one).get("label"), str)


def test_a_plan_of_a_search_is_explained_with_its_own_rows() -> None:
    """Uneven layers and recompute; of every stage and moment, as the plan has them."""
    model, cluster = ModelSpec.from_catalog("llama-2-13b"), ClusterSpec.parse("4xA100")
    choices = Choices(pipeline_parallel=(4,), schedule=("1f1b",), micro_batch_size=(2,))
    training = TrainingSpec(global_batch_size=16, framework="torchtitan")
    plan = api.search(model, cluster, training, choices=choices, top=1)[0]
    plan = Plan.model_validate_json(plan.model_dump_json())
    assert len({tuple(stage.recompute.items()) for stage in plan.stages}) > 1
    for index, stage in enumerate(plan.stages):
        found = api.explain_plan(model, cluster, plan, stage=index)
        assert sum(entry.held for entry in found.entries) == pytest.approx(stage.peak_bytes, abs=2)


def test_explain_says_what_would_fit_where_a_layout_does_not() -> None:
    result = run("explain", "-m", "llama-2-7b", "-g", "8x80G", "-b", "64", "--sharding", "ddp")
    assert result.exit_code == 1
    assert "What binds: at " in result.output
    assert "--sharding zero1" in result.output


def test_a_kept_plan_is_explained(tmp_path: Path) -> None:
    """As the layout that it was made of; options beside it contradict it."""
    kept = tmp_path / "plan.json"
    layout = ["-m", "llama-2-7b", "-g", "8x80G", "-b", "64", "--recompute", "auto", "-mb", "4"]
    kept.write_text(run("estimate", *layout, "--json").stdout)
    again = json.loads(run("explain", str(kept), "--json").stdout)
    assert again["entries"] == json.loads(run("explain", *layout, "--json").stdout)["entries"]
    assert "--tensor-parallel beside a plan" in run("explain", str(kept), "-tp", "2").output
    assert "takes --model and --gpus" in run("explain").output
