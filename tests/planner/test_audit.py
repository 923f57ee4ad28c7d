"""An audit: files to a verdict, findings, changes that pay, a better layout."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml
from typer.testing import CliRunner

from planner import ClusterSpec, InputError, ModelSpec, estimate
from planner.audit import cluster_text, named_as_known, read_configuration, read_files
from planner.cli import app
from planner.export import Subject, export
from planner.export.imported import Imported

FLAGS = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --seq-length 4096 "
    "--max-position-embeddings 4096 --position-embedding-type rope --swiglu --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--vocab-size 32000 --bf16 --micro-batch-size 1 --global-batch-size 64 --overlap-grad-reduce "
    "--overlap-param-gather --no-create-attention-mask-in-dataloader "
)
GOOD = FLAGS + "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["audit", *words], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def audited(tmp_path: Path, flags: str, *more: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "plan.args"
    path.write_text(flags)
    status, output = run(str(path), "--gpus", "8xA100", *more, "--json")
    return status, json.loads(output)


def test_a_sound_configuration_holds(tmp_path: Path) -> None:
    status, found = audited(tmp_path, GOOD)
    assert status == 0
    assert found["holds"] is True
    assert found["framework"] == "megatron"
    assert not [one for one in found["findings"] if one["severity"] == "error"]
    assert found["document"]["model"]["name"] == "llama-2-7b"


def test_the_plan_is_that_of_the_same_options(tmp_path: Path) -> None:
    _, found = audited(tmp_path, GOOD)
    words = "estimate --model llama-2-7b --gpus 8xA100 -tp 2 -s 4096 -b 64 --sharding zero1 --json"
    told = json.loads(CliRunner().invoke(app, words.split()).output)
    here, there = found["document"]["plans"][0], told["plans"][0]
    assert (here["peak_bytes"], here["step_time_s"]) == (there["peak_bytes"], there["step_time_s"])


def test_changes_that_pay_are_true(tmp_path: Path) -> None:
    """Each is an option of estimate: applied, it gives the step and the peak that were named."""
    _, found = audited(
        tmp_path, GOOD + " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    )
    plan = found["document"]["plans"][0]
    gains = {one["option"]: one for one in found["gains"]}
    assert "--recompute none" in gains
    base = "estimate --model llama-2-7b --gpus 8xA100 -tp 2 -s 4096 -b 64 --sharding zero1 --recompute full"
    for option, gain in gains.items():
        if ", no " in option:
            continue
        words = [*base.split(), *option.split(), "--json"]
        told = json.loads(CliRunner().invoke(app, words).output)["plans"][0]
        assert told["peak_bytes"] == gain["peak_bytes"], option
        assert told["step_time_s"] / plan["step_time_s"] == pytest.approx(gain["step_time_ratio"]), option


def test_what_does_not_fit_is_advised_on(tmp_path: Path) -> None:
    status, found = audited(tmp_path, FLAGS + " --micro-batch-size 8")
    assert status == 1
    assert found["holds"] is False
    assert found["better"]["plan"]["fits"] is True
    assert found["document"]["binding"]
    assert found["document"]["changes"]


def test_a_better_layout_is_the_best_that_can_be_told(tmp_path: Path) -> None:
    _, found = audited(tmp_path, FLAGS + " --tensor-model-parallel-size 8 --sequence-parallel")
    better = found["better"]
    assert better["step_time_ratio"] < 0.9
    assert not any("--launchable" in note for note in better["plan"]["warnings"])


@pytest.mark.parametrize(
    "flags",
    [
        GOOD + " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        FLAGS + "--tensor-model-parallel-size 4 --use-distributed-optimizer",
        FLAGS + "--micro-batch-size 4",
    ],
)
def test_settings_make_the_plan_that_they_are_of(tmp_path: Path, flags: str) -> None:
    """Set in the file and read again, they give the step and the peak that were named."""
    _, found = audited(tmp_path, flags)
    before = found["document"]["plans"][0]
    better = found["better"]
    wanted = {better["option"]: (better["plan"]["peak_bytes"], better["step_time_ratio"])}
    for one in (*found["gains"], *found["document"].get("changes", [])):
        wanted[one["option"]] = one["peak_bytes"], one["step_time_ratio"]
    assert better["option"] in found["settings"]
    for option, settings in found["settings"].items():
        text = flags
        for setting in settings:
            if setting.startswith("without "):
                switch = setting.removeprefix("without ")
                text = re.sub(rf"(?<!\S){switch}(?: (?!--)\S+)*", "", text)
            elif setting.startswith("--"):
                text += f" {setting}"
        _, there = audited(tmp_path, text)
        plan = there["document"]["plans"][0]
        assert plan["peak_bytes"] == wanted[option][0], (option, settings)
        assert plan["step_time_s"] / before["step_time_s"] == pytest.approx(wanted[option][1]), option


def test_settings_of_a_file_are_named_by_their_sections(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }))  # fmt: skip
    _, output = run(str(path), "--gpus", "8xH100", "--model", "llama-3.2-1b", "-s", "4096", "--json")
    settings = json.loads(output)["settings"]
    assert "zero_optimization.stage = 1" in settings["--sharding zero1"]
    _, shown = run(str(path), "--gpus", "8xH100", "--model", "llama-3.2-1b", "-s", "4096")
    assert "zero_optimization.stage = 1" in shown


def test_what_a_framework_cannot_be_told_is_no_gain(tmp_path: Path) -> None:
    """Messages of tensor parallelism are hidden with sequence parallelism only, which is off here."""
    _, found = audited(tmp_path, FLAGS + "--tensor-model-parallel-size 4 --use-distributed-optimizer")
    gains = {one["option"] for one in found["gains"]}
    assert gains <= set(found["settings"])
    assert not any("tp_comm_overlap" in option for option in gains)
    assert len({tuple(found["settings"][option]) for option in gains}) == len(gains)


ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 8, "mixed_precision": "bf16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"distributed_type": "MULTI_GPU"}, "without gradient_checkpointing"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1,
             "fsdp_sharding_strategy": "FULL_SHARD", "fsdp_activation_checkpointing": True}},
            "fsdp_config.fsdp_activation_checkpointing = false",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
            "deepspeed_config.zero_stage = 1",
        ),
    ],
)  # fmt: skip
def test_accelerates_files_are_audited_in_its_words(
    tmp_path: Path, more: dict[str, Any], wanted: str
) -> None:
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "bf16": True}
    if "fsdp_config" not in more:
        arguments["gradient_checkpointing"] = True
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(ACCELERATE | more))
    (tmp_path / "training_args.json").write_text(json.dumps(arguments))
    files = [str(tmp_path / name) for name in ("accelerate.yaml", "training_args.json")]
    status, output = run(*files, "--gpus", "H100", "-m", "llama-3.2-1b", "-s", "4096", "--json")
    assert status == 0
    found = json.loads(output)
    assert wanted in {one for words in found["settings"].values() for one in words}
    assert "no words" not in run(*files, "--gpus", "H100", "-m", "llama-3.2-1b", "-s", "4096")[1]


def test_torchtitans_batch_is_said_where_it_was_left_to_the_degrees(tmp_path: Path) -> None:
    """What is set and read again gives the step and the peak that were named: the batch as well."""
    toml = (
        '[model]\nname = "llama3"\nflavor = "8B"\n[training]\nlocal_batch_size = 4\nseq_len = 4096\n'
        "[parallelism]\ndata_parallel_shard_degree = 2\npipeline_parallel_degree = 4\n"
        'pipeline_parallel_schedule = "1F1B"\n'
        '[activation_checkpoint]\nmode = "selective"\nselective_ac_option = "op"\n'
    )
    path = tmp_path / "a.toml"
    path.write_text(toml)
    found = json.loads(run(str(path), "--gpus", "8xH100", "--json")[1])
    before = found["document"]["plans"][0]
    for gain in found["gains"]:
        document = tomllib.loads(toml)
        for words in found["settings"][gain["option"]]:
            name, equals, value = words.partition(" = ")
            section, _, key = name.removeprefix("without ").partition(".")
            if equals:
                document.setdefault(section, {})[key] = json.loads(value)
            elif words.startswith("without "):
                document[section].pop(key)
        path.write_text(tomli_w.dumps(document))
        plan = json.loads(run(str(path), "--gpus", "8xH100", "--json")[1])["document"]["plans"][0]
        assert plan["peak_bytes"] == gain["peak_bytes"], gain["option"]
        ratio = plan["step_time_s"] / before["step_time_s"]
        assert ratio == pytest.approx(gain["step_time_ratio"]), gain["option"]
    words = {one for own in found["settings"].values() for one in own}
    assert {"training.global_batch_size = 8", "parallelism.pipeline_parallel_degree = 1"} <= words


def test_checkpointing_of_the_trainer_goes_with_that_of_fsdp(tmp_path: Path) -> None:
    fsdp = {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_activation_checkpointing": False}
    files = {
        "accelerate.yaml": yaml.safe_dump(ACCELERATE | {"distributed_type": "FSDP", "fsdp_config": fsdp}),
        "training_args.json": json.dumps(
            {"per_device_train_batch_size": 1, "bf16": True, "gradient_checkpointing": True}
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    words = [str(tmp_path / name) for name in files]
    found = json.loads(run(*words, "--gpus", "H100", "-m", "llama-3.1-8b", "-s", "4096", "--json")[1])
    assert "without gradient_checkpointing" in found["settings"][found["better"]["option"]]


def test_what_a_script_says_in_another_way_is_left_out_by_that_name(tmp_path: Path) -> None:
    """Recomputation by its short flag, chunks by their layers: what is set replaces them."""
    flags = FLAGS + (
        "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --use-distributed-optimizer "
        "--num-layers-per-virtual-pipeline-stage 4 --recompute-activations"
    )
    _, found = audited(tmp_path, flags)
    better = found["settings"][found["better"]["option"]]
    assert "without --recompute-activations" in better
    assert not any(one.startswith("without --recompute-granularity") for one in better)
    for words in found["settings"].values():
        chunked = any(one.startswith("--num-virtual-stages-per-pipeline-rank") for one in words)
        whole = any(one == "--pipeline-model-parallel-size 1" for one in words)
        if chunked or whole:
            assert "without --num-layers-per-virtual-pipeline-stage" in words


def test_a_configuration_that_nothing_betters_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "plan.args").write_text(FLAGS + "--use-distributed-optimizer")
    _, shown = run(str(tmp_path / "plan.args"), "--gpus", "8xA100")
    assert "No layout on the same GPUs that the framework can be told is quicker." in shown
    assert "Read as llama-2-7b: 32 layers of width 4,096, vocabulary 32,000, 6.74 B parameters" in shown


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"a": ', "a.json: not JSON"),
        ("a.yaml", "a: [1", "a.yaml, line 1: not YAML"),
        ("a.toml", "[a", "a.toml: not TOML"),
        ("a.toml", "a = " + "[" * 100_000, "a.toml: not TOML"),
        ("plan.json", '{"schema": "planner.plans/1"}', "a file of planner's own"),
        ("job.yaml", "apiVersion: v1\nkind: Pod", "a manifest of Kubernetes"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    status, output = run(str(tmp_path / name), "--gpus", "8xA100")
    assert status == 2
    assert said in output


def test_variables_that_no_script_has_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text(f"TP=${{TP:-2}}\ntorchrun pretrain_gpt.py {FLAGS} --lr $RATE\n")
    _, output = run(str(tmp_path / "a.sh"), "--gpus", "8xA100", "--set", "tp=4")
    assert "--set tp: no file has $tp: did you mean RATE or TP?" in output
    (tmp_path / "plan.args").write_text(FLAGS)
    _, output = run(str(tmp_path / "plan.args"), "--gpus", "8xA100", "--set", "WORLDSIZE=8")
    assert "--set WORLDSIZE: no file has $WORLDSIZE: did you mean NGPU, NNODES or WORLD_SIZE?" in output


def test_what_cannot_be_planned_says_why(tmp_path: Path) -> None:
    status, found = audited(tmp_path, FLAGS + " --tensor-model-parallel-size 3")
    assert status == 2
    assert "tensor_parallel" in found["problem"]
    assert any(one["severity"] == "error" for one in found["findings"])


def test_the_command_line_wins(tmp_path: Path) -> None:
    _, found = audited(tmp_path, GOOD, "-tp", "4", "--model", "llama-2-13b")
    assert found["document"]["plans"][0]["layout"]["tensor_parallel"] == 4
    assert found["document"]["model"]["name"] == "llama-2-13b"


def test_reading_executes_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = tmp_path / "train.sh"
    command = f"torchrun --nproc-per-node 8 pretrain_gpt.py {GOOD}"
    script.write_text(f"X=$(touch {mark})\n`touch {mark}`\n{command}\n")
    run(str(script), "--gpus", "A100")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("hello: world\n", "no configuration of"), ("\0\0", "not text"), ("", "empty")],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    status, output = run(str(path), "--gpus", "8xA100")
    assert status == 2
    assert message in " ".join(output.split())


def test_unknown_frameworks_are_named() -> None:
    with pytest.raises(InputError, match="did you mean megatron"):
        read_configuration({"x": "y"}, "megatro")


def test_gpus_are_a_kind_or_a_number_of_them() -> None:
    known, unknown = Imported("megatron", {}, world_size=64, per_node=8), Imported("deepspeed", {})
    assert cluster_text("h100", known) == "8x8xh100"
    assert cluster_text("16xh100", known) == "16xh100"
    with pytest.raises(InputError, match="COUNTxKIND"):
        cluster_text("h100", unknown)
    with pytest.raises(InputError, match="KIND, as in H100"):
        cluster_text(None, known)


def test_a_shape_that_is_known_has_its_name() -> None:
    shape = ModelSpec.from_catalog("mixtral-8x7b").model_copy(update={"name": "flags"})
    assert named_as_known(shape).name == "mixtral-8x7b"
    other = shape.model_copy(update={"hidden_size": 4000})
    assert named_as_known(other).name == "flags"


def test_an_export_is_read_back_as_the_plan(tmp_path: Path) -> None:
    """What was exported is audited without a finding that is an error, and fits as planned."""
    from planner import Layout, TrainingSpec

    model, cluster = ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse("8xA100")
    training = TrainingSpec(seq_length=4096, global_batch_size=64)
    layout = Layout(2, 2, 2, grad_accum=32, sharding="zero1", sequence_parallel=True)
    plan = estimate(model, cluster, training, layout, recompute="full:2")
    for name, text in export(Subject(model, cluster, plan), "megatron").files.items():
        (tmp_path / name).write_text(text)
    assert set(read_files([tmp_path / "plan.args"]))
    status, output = run(str(tmp_path / "plan.args"), "--gpus", "8xA100", "--json")
    found = json.loads(output)
    assert status == 0
    assert found["document"]["plans"][0]["peak_bytes"] == plan.peak_bytes
    assert not [one for one in found["findings"] if one["severity"] == "error"]
