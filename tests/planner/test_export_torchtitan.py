"""torchtitan's files: what they say and refuse, that they read back, and that text in them is inert."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from random import Random
from typing import Any

import pytest

from planner import audit, reading
from planner.errors import InputError
from planner.export import NotExpressible, Subject
from planner.export.read_torchtitan import read, recognises
from planner.export.torchtitan import SETTINGS, export
from planner.export.torchtitan_flavors import flavor_named, flavors
from planner.export.torchtitan_limits import stage_layers
from planner.export.torchtitan_shards import local_parameters
from planner.specs import ModelSpec
from tests.contract.torchtitan_plans import OLDER, planned, plans

DEBUG = flavor_named("llama3", "debugmodel").spec
SMALL = ModelSpec.from_catalog("llama-3.1-8b")
USUAL: dict[str, Any] = {"option": OLDER, "seq_length": 512, "global_batch_size": 64}


def subject(
    model: ModelSpec = DEBUG,
    gpus: int = 8,
    recompute: str = "none",
    layers: tuple[int, ...] | None = None,
    **given: Any,
) -> Subject:
    return planned(model, f"{gpus}xh100", USUAL | given, recompute, layers)


def told(one: Subject, **settings: str) -> dict[str, Any]:
    return tomllib.loads(export(one, "0.2", settings).files["plan.toml"])


def back(text: str, env: dict[str, str] | None = None) -> Subject:
    imported = read({"plan.toml": text}, env)
    options = dict(imported.options)
    layers = reading.numbers("layers", options.pop("layers_per_stage", None))
    assert imported.model is not None
    gpus = f"{imported.world_size}xh100"
    return planned(imported.model, gpus, options, options.pop("recompute"), layers)


def findings(text: str, **env: str) -> dict[str, str]:
    return {one.setting: f"{one.severity}: {one.text}: {one.fix}" for one in read({"a": text}, env).findings}


def test_the_batch_of_a_pipeline_is_one_flush():
    file = told(subject(SMALL, 16, pipeline_parallel=2, tensor_parallel=2, micro_batch_size=2))
    assert file["training"]["local_batch_size"] == 16
    assert file["training"]["global_batch_size"] == 64
    parallelism = file["parallelism"]
    assert parallelism["pipeline_parallel_microbatch_size"] == 2
    assert parallelism["pipeline_parallel_schedule"] == "1F1B"
    assert parallelism["data_parallel_shard_degree"] == 4
    assert told(subject())["training"]["local_batch_size"] == 1


def test_layers_are_said_by_numbers_where_they_are_torchtitans_own_and_else_by_modules():
    even = told(subject(SMALL, pipeline_parallel=4))["parallelism"]
    assert even["pipeline_parallel_layers_per_stage"] == 8
    assert even["pipeline_parallel_first_stage_less_layers"] == 0
    own = told(subject(SMALL, pipeline_parallel=4, layers=(8, 9, 8, 7)))["parallelism"]
    assert own["pipeline_parallel_layers_per_stage"] == 9
    assert own["pipeline_parallel_first_stage_less_layers"] == 1
    other = told(subject(DEBUG, pipeline_parallel=2, layers=(1, 5)))["parallelism"]
    assert other["module_fqns_per_model_part"] == [
        ["tok_embeddings", "layers.0"],
        ["layers.1", "layers.2", "layers.3", "layers.4", "layers.5", "norm", "output"],
    ]
    assert "pipeline_parallel_layers_per_stage" not in other


def test_a_folded_schedule_brings_the_last_layers_to_the_first_stage():
    one = subject(SMALL, pipeline_parallel=2, schedule="zb-v")
    assert [len(part) for part in stage_layers(one)] == [8, 8, 8, 8]
    assert stage_layers(one)[3] == list(range(24, 32))
    assert told(one)["parallelism"]["pipeline_parallel_schedule"] == "ZBVZeroBubble"


def test_some_layers_recomputed_are_every_kth():
    file = told(subject(SMALL, recompute="full:16"))
    assert file["activation_checkpoint"] == {"mode": "selective", "selective_ac_option": "2"}
    assert told(subject(SMALL, recompute="full"))["activation_checkpoint"] == {"mode": "full"}
    with pytest.raises(NotExpressible, match="every k-th"):
        export(subject(SMALL, recompute="full:17"), "0.2", {})
    with pytest.raises(NotExpressible, match="all layers or none"):
        export(subject(SMALL, recompute="full:16", option=[]), "0.3", {})


@pytest.mark.parametrize(
    ("version", "given", "reason"),
    [
        ("0.2", {"option": []}, "qkv=separate, rotary_table=model"),
        ("0.2", {"option": [*OLDER, "loss=chunked"]}, "loss=eager"),
        ("0.2", {"option": [*OLDER, "reduce_dtype=bf16"]}, "reduced in fp32"),
        ("0.2", {"tensor_parallel": 2, "sequence_parallel": False}, "sequence parallelism"),
        ("0.2", {"tensor_parallel": 8, "sharding": "ddp"}, "run in fp32"),
        ("0.2", {"data_shards": 1}, "DDP"),
        ("0.2", {"optimizer": "momentum"}, "optimizer momentum"),
        ("0.2", {"optimizer_dtype": "bf16"}, "moments"),
        ("0.2", {"seq_length": 513}, "multiple of 2: use 512"),
        (
            "0.2",
            {"pipeline_parallel": 2, "model": ModelSpec.from_catalog("qwen3-8b")},
            "no pipeline for qwen3",
        ),
        ("0.2", {"model": ModelSpec.from_catalog("llama-2-7b")}, "vocab_size 128256 there, 32000 here"),
        ("0.3", {}, "qkv=fused"),
        ("0.3", {"option": [], "precision": "fp8-tensorwise"}, "fp8-rowwise"),
        ("0.3", {"option": [], "context_parallel": 2, "context_comm": "ring"}, "context_comm all-gather"),
        ("0.3", {"option": ["loss=chunked"], "seq_length": 516}, "multiple of 8: use 512"),
        (
            "0.3",
            {"option": [], "pipeline_parallel": 2, "model": ModelSpec.from_catalog("llama-3.2-1b")},
            "tied embeddings",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_can(version, given, reason):
    one = subject(**given)
    with pytest.raises(NotExpressible, match=reason) as error:
        export(one, version, {})
    assert any(word in str(error.value) for word in (": use ", "leave", "the nearest"))


def test_what_is_proposed_instead_can_be_told():
    with pytest.raises(NotExpressible) as error:
        export(subject(option=[]), "0.2", {})
    options = [f"{name}={value}" for name, value in error.value.instead["option"].items()]
    assert export(subject(option=options), "0.2", {}).files


def test_a_shape_of_nobody_else_is_built_in_the_recipe():
    model = ModelSpec.from_catalog("llama-2-7b")
    made = export(subject(model, option=[]), "0.3", {"rope_theta": "10000"})
    assert "theta=10000.0" in made.files["planner_recipes.py"]
    assert any("10000" in note for note in made.notes)
    compile(made.files["planner_recipes.py"], "planner_recipes.py", "exec")
    with pytest.raises(NotExpressible, match="other shapes of Llama"):
        export(subject(ModelSpec.from_catalog("qwen2-7b"), option=[]), "0.3", {})


def test_moments_in_half_precision_are_the_newer_releases():
    text = export(subject(option=[], optimizer_dtype="bf16"), "0.3", {}).files["planner_recipes.py"]
    assert "implementation='fused_opt_states_bf16'" in text


def test_tf32_is_a_variable():
    made = export(subject(precision="tf32"), "0.2", {})
    assert made.env["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "1"
    assert read(made.files, made.env).options["precision"] == "tf32"
    assert read(made.files).options["precision"] == "fp32"


def test_plans_read_back_as_they_were():
    for _, one in plans("0.2", 70):
        try:
            made = export(one, "0.2", {})
        except NotExpressible:
            continue
        again = back(made.files["plan.toml"], dict(made.env))
        assert again.plan.layout == one.plan.layout
        assert again.plan.peak_bytes == one.plan.peak_bytes
        assert again.plan.step_time_s == one.plan.step_time_s
        assert dict(again.job.training) == dict(one.job.training)
        assert [stage.rows for stage in again.plan.stages] == [stage.rows for stage in one.plan.stages]


HOSTILE = [
    "a'b\"c",
    "$(touch /tmp/x)`id`",
    "'''\"\"\"\\",
    "]]\\n[x]",
    "--flag",
    "\N{SNOWMAN}\N{GRINNING FACE}",
    "{{ 7 * 7 }} {% raw %}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_somebody_wrote_comes_back_as_that_text(text):
    name = (text + "\n[training]\nsteps = 1\n#")[:100]
    given = {"hf_assets_path": text, "dataset": text, "dataset_path": text, "dump_folder": text}
    file = told(subject(DEBUG.model_copy(update={"name": name})), **given)
    assert file["model"]["hf_assets_path"] == text
    assert file["training"]["dataset"] == file["training"]["dataset_path"] == text
    assert file["job"]["dump_folder"] == text
    assert file["training"]["steps"] == 1000
    one = subject(DEBUG.model_copy(update={"name": name}), option=[])
    code = export(one, "0.3", given).files["planner_recipes.py"]
    literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert literals.count(text) == 4
    assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Lambda, ast.JoinedStr))]
    compile(code, "planner_recipes.py", "exec")


def test_settings_are_checked():
    for name, value in {"steps": "many", "lr": "fast", "dataset": "a\nb"}.items():
        with pytest.raises(InputError, match=name):
            export(subject(), "0.2", {name: value})
    assert told(subject(), steps="7", lr="3e-4")["optimizer"]["lr"] == 3e-4
    assert told(subject(tokens="1B"))["training"]["steps"] == 10**9 // (512 * 64) + 1
    assert set(SETTINGS) >= {"hf_assets_path", "dataset", "steps", "lr"}


def test_flavors_are_what_they_are_called():
    assert flavor_named("llama3", "8B_flex").spec.num_parameters == 8030261248
    assert flavor_named("deepseek_v3", "16B").spec.num_parameters == 15706484224
    assert len({(one.model, one.name) for one in flavors()}) == len(flavors())
    with pytest.raises(InputError, match="llama3"):
        flavor_named("lama3", "8B")


def test_a_ranks_parameters_are_cut_by_rows():
    counts = [local_parameters(subject(DEBUG, 6, global_batch_size=12), rank) for rank in range(6)]
    assert counts == [1031215] * 5 + [1007637]
    assert sum(counts) > DEBUG.num_parameters - 10**5


BASE = """
[model]
name = "llama3"
flavor = "8B"
[training]
local_batch_size = 4
seq_len = 4096
[parallelism]
pipeline_parallel_degree = 2
"""


def test_torchtitans_own_values_stand_for_what_is_not_said():
    imported = read({"a.toml": BASE}, {"NGPU": "8", "NNODES": "2"})
    assert (imported.world_size, imported.per_node) == (16, 8)
    assert imported.model is not None
    assert imported.model.name == "llama-3.1-8b"
    options = imported.options
    assert (options["data_parallel"], options["data_shards"]) == (8, 8)
    assert (options["micro_batch_size"], options["global_batch_size"]) == (1, 32)
    assert options["reshard_after_forward"] is False
    assert options["recompute"] == "full:8"
    assert "compile=off" in options["option"]
    found = findings(BASE, NGPU="8")
    assert "ZeRO-2" in found["parallelism.fsdp_reshard_after_forward"]


def test_how_many_processes_there_are():
    assert "not said" in findings(BASE)["parallelism.data_parallel_shard_degree"]
    whole = BASE + "data_parallel_shard_degree = 4\n"
    assert read({"a": whole}).world_size == 8
    assert "16 processes" in findings(whole, WORLD_SIZE="16")["parallelism"]
    counted = audit.read_configuration({"a.toml": BASE}, "torchtitan", gpus="4x8xH100")
    assert (counted.world_size, counted.options["global_batch_size"]) == (32, 64)
    with pytest.raises(InputError, match="NGPU"):
        read({"a": whole}, {"NGPU": "all"})


@pytest.mark.parametrize(
    ("line", "setting", "what"),
    [
        ("[training]\nlocal_batch = 4", "training.local_batch", "local_batch_size"),
        ("[training]\nbatch_size = 4", "training.batch_size", "training.local_batch_size now"),
        ("[compile]\nenable = 1", "compile.enable", "true or false"),
        ("[activation_checkpoint]\nmode = 'half'", "activation_checkpoint.mode", "selective, full"),
        ("[optimizer]\nname = 'SGD'", "optimizer.name", "use AdamW"),
        ("[model]\nconverters = ['float8']", "model.converters", "quantize.linear.float8"),
        ("[parallelism]\ncontext_parallel_degree = 0", "parallelism.context_parallel_degree", "1 or more"),
        (
            "[parallelism]\nenable_async_tensor_parallel = true",
            "parallelism.enable_async_tensor_parallel",
            "",
        ),
        ("[training]\nglobal_batch_size = 33", "training.global_batch_size", "use 32"),
        ("[training]\nseq_len = 4095", "training.seq_len", "use 4094"),
        ("[fault_tolerance]\nenable = true", "fault_tolerance.enable", "torchft"),
        ("[training]\nmodel = 1", "training.model", ""),
        ("job = 3", "job", "in place of a table"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_write(line, setting, what):
    document = tomllib.loads(BASE)
    for section, values in tomllib.loads(line).items():
        document[section] = {**document.get(section, {}), **values} if isinstance(values, dict) else values
    import tomli_w

    found = findings(tomli_w.dumps(document), NGPU="8")
    assert what in found[setting]


def test_pipelines_that_torchtitan_refuses_are_named():
    where = "parallelism.pipeline_parallel_layers_per_stage"
    assert "one on each" in findings(BASE + "pipeline_parallel_layers_per_stage = 4", NGPU="8")[where]
    looped = BASE + "pipeline_parallel_schedule = 'Interleaved1F1B'\n"
    assert "as long" in findings(looped, NGPU="8")[where]
    imported = read({"a": looped + "pipeline_parallel_layers_per_stage = 5\n"}, {"NGPU": "8"})
    assert where in {one.setting for one in imported.findings}
    parts = "module_fqns_per_model_part = [['tok_embeddings'], ['norm', 'output']]"
    assert "layers.0 is missing" in findings(BASE + parts, NGPU="8")["parallelism.module_fqns_per_model_part"]
    unknown = BASE + "pipeline_parallel_schedule = 'Zigzag'"
    assert "use 1F1B" in findings(unknown, NGPU="8")["parallelism.pipeline_parallel_schedule"]


def test_mixed_precision_without_fsdp_is_none():
    text = "[model]\nflavor = '8B'\n[training]\n[parallelism]\ntensor_parallel_degree = 8\n"
    assert read({"a": text}, {"NGPU": "8"}).options["precision"] == "fp32"
    assert "no effect" in findings(text, NGPU="8")["training.mixed_precision_param"]
    assert read({"a": text.replace("= 8\n", "= 1\n")}, {"NGPU": "1"}).options["precision"] == "bf16"


def test_only_torchtitans_files_are_recognised():
    assert recognises({"a": BASE})
    for text in ("", "[tool.ruff]\nx = 1", "a: 1", "{}", "[model]\nx = " + "[" * 3000):
        assert not recognises({"a": text})
    deep = "[model]\nx = " + "[" * 12 + "]" * 12 + "\n[training]\n"
    assert not recognises({"a": deep})
    with pytest.raises(InputError, match="one TOML file"):
        read({"a": "x"})
    with pytest.raises(InputError, match="2 of them"):
        read({"a": BASE, "b": BASE})


RECIPES = {
    "8b": ("flavor = '8B'", "local_batch_size = 1\nseq_len = 8192", "", "selective", "op", 8),
    "70b": (
        "flavor = '70B'",
        "local_batch_size = 8\nseq_len = 8192",
        "tensor_parallel_degree = 8",
        "full",
        "2",
        256,
    ),
    "405b": (
        "flavor = '405B'",
        "local_batch_size = 2\nseq_len = 8192",
        "tensor_parallel_degree = 8\nenable_async_tensor_parallel = true",
        "full",
        "2",
        512,
    ),
    "qwen3": (
        "name = 'qwen3'\nflavor = '1.7B'",
        "local_batch_size = 4\nseq_len = 4096",
        "",
        "selective",
        "op",
        8,
    ),
    "deepseek": (
        "name = 'deepseek_v3'\nflavor = '16B'",
        "local_batch_size = 4\nseq_len = 4096",
        "expert_parallel_degree = 8",
        "selective",
        "op",
        64,
    ),
}
"""What torchtitan 0.2.2's train_configs set, on as many H100 as its benchmarks have; of 405B with compiled
blocks, which its asynchronous tensor parallelism needs."""


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_known_to_run_is_not_said_not_to_fit(name):
    model, training, parallelism, mode, option, world = RECIPES[name]
    text = (
        f"[model]\n{model}\n[training]\n{training}\n[parallelism]\n{parallelism}\n"
        f"[activation_checkpoint]\nmode = '{mode}'\nselective_ac_option = '{option}'\n"
        "[compile]\nenable = true\n"
    )
    imported = audit.read_configuration({"a.toml": text}, "torchtitan", {"WORLD_SIZE": str(world)})
    assert not [one for one in imported.findings if one.severity == "error"]
    assert back(text, {"WORLD_SIZE": str(world)}).plan.verdict in ("fits", "at risk")


def test_any_file_is_read_without_a_crash():
    """Values of every type in every setting: findings, or an error of the planner's own."""
    from planner.export.torchtitan_schema import keys

    random = Random(3)
    values = [0, -1, 1, 3, 10**12, 0.5, "", "x", "2", "op", True, [], ["a"], [["layers.0"]], {}, {"a": 1}]
    import tomli_w

    for _ in range(400):
        document = tomllib.loads(BASE)
        for path in random.sample(sorted(keys()), 4):
            place: Any = document
            *sections, last = path.split(".")
            for section in sections:
                place = place.setdefault(section, {}) if isinstance(place, dict) else {}
            if isinstance(place, dict):
                place[last] = random.choice(values)
        read({"a": tomli_w.dumps(document)}, {"NGPU": "8"})


def test_neither_side_imports_torch():
    code = (
        "import sys, planner.export.torchtitan, planner.export.read_torchtitan; "
        "sys.exit(bool({'torch', 'tomli_w', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
