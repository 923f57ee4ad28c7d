"""Batch scripts for Slurm: what is asked for, and that nothing in them is anybody's but the planner's."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from planner.errors import InputError
from planner.export.base import Export, NotExpressible, Subject
from planner.schedulers import hostfile
from planner.schedulers.slurm import KNOWN, SCRIPT, SETTINGS, export, leaf_switches, segment_nodes
from tests.plans import subject_of

HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "it's",
    'a"b',
    "two\nlines",
    "-x",
    "ü",
    "",
    "#SBATCH --nodes=9",
    "a;b",
    "\\",
]
MADE = Export("stand-in", "1", {"plan.args": "# planner\n"}, {"SOME": HOSTILE[0]}, ("train.py", *HOSTILE))


def script_of(subject: Subject, made: Export = MADE, **settings: str) -> str:
    return export(subject, made, {name.replace("_", "-"): one for name, one in settings.items()}).files[
        SCRIPT
    ]


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def subject(**more: object) -> Subject:
    return subject_of("8x8xH100", tp=8, pp=4, **more)  # type: ignore[arg-type]


def test_what_is_asked_of_slurm() -> None:
    own = subject(leaf=4)
    script = script_of(own, partition="h100", gpu_type="h100", time="2-00:00:00")
    assert options_of(script) == [
        "--partition=h100",
        "--time=2-00:00:00",
        f"--job-name=llama-65b-{own.digest[:8]}",
        "--nodes=8",
        "--ntasks-per-node=1",
        "--gpus-per-node=h100:8",
        "--exclusive",
        "--mem=0",
        "--output=%x-%j.out",
        "--switches=2",
    ]
    assert script.startswith(f"#!/bin/bash\n# planner 0.1.0, plan {own.digest}: llama-65b on 64 x H100")
    assert '--node-rank "$SLURM_PROCID" --master-addr "$MASTER_ADDR"' in script
    assert "--nnodes 8 --nproc-per-node 8" in script
    assert 'NODEID"' not in script


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"gres": "yes", "gpu_type": "h100"}, "--gres=gpu:h100:8"),
        ({"gres": "yes"}, "--gres=gpu:8"),
        ({}, "--gpus-per-node=8"),
        ({"requeue": "yes"}, "--requeue"),
        ({"requeue": "no"}, "--no-requeue"),
        ({"signal": "TERM@300"}, "--signal=TERM@300"),
        ({"constraint": "[leaf1|leaf2]&h100"}, "--constraint=[leaf1|leaf2]&h100"),
        ({"topology": "block"}, "--segment=2"),
        ({"segment": "4"}, "--segment=4"),
        ({"switches": "1", "max_switch_wait": "12:00:00"}, "--switches=1@12:00:00"),
        ({"mem": "900G"}, "--mem=900G"),
        ({"exclude": "h100-[3,7]"}, "--exclude=h100-[3,7]"),
        ({"chdir": "/scratch/run"}, "--chdir=/scratch/run"),
        ({"nodes": "b-[1-5]/a-[1-4]"}, "--nodelist=a-1,a-2,a-3,a-4,b-1,b-2,b-3,b-4"),
    ],
)
def test_settings(settings: dict[str, str], written: str) -> None:
    script = script_of(subject(), **settings)
    assert written in options_of(script)
    if "mem" in settings:
        assert "--mem=0" not in options_of(script)


def test_switches_and_segments_come_from_the_blocks_of_the_plan() -> None:
    assert leaf_switches(subject()) is None
    assert [leaf_switches(subject(leaf=leaf)) for leaf in (8, 5, 4, 3, 2, 1)] == [1, 2, 2, 4, 4, 8]
    assert segment_nodes(subject()) == 2
    wide = subject_of("576xGB200-NVL72", tp=8, pp=2)
    assert segment_nodes(wide) == 18  # of a stage's 72 nodes: one NVLink domain
    with pytest.raises(InputError, match="how many leaf switches"):
        script_of(subject(), topology="tree")


def test_named_nodes_are_numbered_as_placed() -> None:
    made = export(subject(), MADE, {"nodes": "b-[1-5]/a-[1-4]", "host-suffix": "-ib0"})
    script = made.files[SCRIPT]
    assert "printf '%s\\n' a-1 a-2 a-3 a-4 b-1 b-2 b-3 b-4 > \"$SLURM_HOSTFILE\"" in script
    assert "MASTER_ADDR=a-1-ib0\n" in script
    assert "--ntasks=8 --distribution=arbitrary" in script
    assert "scontrol" not in script
    assert set(made.files) == {"plan.args", SCRIPT, "placement.json"}


@pytest.mark.parametrize("name", sorted(KNOWN))
@pytest.mark.parametrize(
    "value", ["a b", "x#y", "a'b", 'a"b', "$(x)", "`x`", "a\nb", "-x", "--wrap=x", "a\\b", "é", "a;b", ""]
)
def test_a_setting_stays_one_word_or_is_refused(name: str, value: str) -> None:
    given = {"gpu-type": "h100"} | {name: value}
    free = name in ("container", "container-mounts", "setup") and value.isprintable()
    if not free or value.startswith("-") or not value:
        if (name, value) == ("host-suffix", "-x"):
            return
        with pytest.raises(InputError, match=name):
            export(subject(), MADE, given)
        return
    script = export(subject(), MADE, given).files[SCRIPT]
    if name == "setup":
        (line,) = [one for one in script.splitlines() if one.startswith("source ")]
        assert shlex.split(line) == ["source", value]
        return
    srun = script[script.index("\nsrun ") :]
    words = shlex.split(srun.replace("\\\n", " ").replace("$PWD", "HERE"))
    assert "srun" in words
    if name == "container":
        assert f"--container-image={value}" in words
    assert options_of(script) == options_of(script_of(subject(), gpu_type="h100"))


def test_words_of_a_program_arrive_as_they_are(tmp_path: Path) -> None:
    script = script_of(subject())
    path = tmp_path / SCRIPT
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)
    # The same command with the programs that it starts in place of Slurm and torchrun.
    (tmp_path / "srun").write_text('#!/bin/sh\nshift 2\nSLURM_PROCID=5 exec "$@"\n')
    (tmp_path / "torchrun").write_text(
        "#!/usr/bin/env python3\nimport os, sys; print(repr((sys.argv[1:], os.environ['SOME'])))\n"
    )
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n-1; echo n-2\n")
    for name in ("srun", "torchrun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.py").touch()
    (tmp_path / "my setup.sh").write_text('echo "$NOBODY"; SOME_SETUP=1\n')
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NUM_NODES": "8",
        "SLURM_JOB_NODELIST": "n-[1-8]",
        "SLURM_CPUS_ON_NODE": "8",
    }
    done = subprocess.run(
        ["bash", str(path)], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    said, some = eval(done.stdout)
    assert said[:10] == [
        *("--nnodes", "8", "--nproc-per-node", "8", "--node-rank", "5"),
        *("--master-addr", "n-1", "--master-port", "29500"),
    ]
    assert said[10:] == ["train.py", *HOSTILE]
    assert some == HOSTILE[0]
    assert not (tmp_path / "pwned").exists()
    path.write_text(script_of(subject(), setup="./my setup.sh"))
    done = subprocess.run(
        ["bash", str(path)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for change in ({"SLURM_JOB_NUM_NODES": "4"}, {"SLURM_GPUS_ON_NODE": "4"}):
        done = subprocess.run(
            ["bash", str(path)], cwd=tmp_path, env=env | change, capture_output=True, check=False
        )
        assert done.returncode == 3
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(["bash", str(path)], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 3
    (tmp_path / "train.py").unlink()
    done = subprocess.run(
        ["bash", str(path)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert "train.py is not in" in done.stderr


def test_accelerate_is_started_the_same_way() -> None:
    options = ("--config_file", "accelerate.yaml")
    files = {"accelerate.yaml": "# planner\n"}
    made = Export("accelerate", "1", files, {}, ("train.py",), "accelerate", options)
    script = script_of(subject(), made)
    start = '\'exec accelerate launch --config_file accelerate.yaml --machine_rank "$SLURM_PROCID" '
    assert f"  sh -c {start}" in script
    assert "files=(accelerate.yaml train.py)" in script


def test_a_models_name_stays_in_its_comment() -> None:
    own = subject()
    model = own.model.model_copy(update={"name": 'x\n#SBATCH --nodes=99\n$(touch pwned)"'})
    script = script_of(Subject(model, own.cluster, own.plan))
    assert "--nodes=99" not in " ".join(options_of(script))
    (name,) = [one for one in options_of(script) if one.startswith("--job-name")]
    assert re.fullmatch(r"--job-name=[A-Za-z0-9_.-]+", name)


def test_what_cannot_be_told_is_refused() -> None:
    part = subject_of("12xH100", pp=2, accum=6)
    with pytest.raises(NotExpressible, match=r"12 GPUs are not whole nodes of 8.*plan for 8 GPUs") as refused:
        export(part, MADE, {})
    assert refused.value.instead == {"gpus": "1x8xH100-SXM-80GB"}
    with pytest.raises(NotExpressible, match="no program"):
        export(subject(), Export("stand-in", "1", {}), {})
    with pytest.raises(InputError, match="not whole segments"):
        script_of(subject(), segment="3")
    with pytest.raises(InputError, match="leave out topology"):
        script_of(subject(), nodes="a-[1-8]", topology="tree")
    with pytest.raises(InputError, match="is of topology=tree"):
        script_of(subject(), topology="block", switches="1")
    with pytest.raises(InputError, match="environment variable"):
        script_of(subject(), Export("stand-in", "1", {}, {"A;B": "1"}, ("train.py",)))
    with pytest.raises(InputError, match="1 to 65535"):
        script_of(subject(), port="70000")


def test_notes_say_what_is_left_to_others() -> None:
    notes = export(subject(), MADE, {}).notes
    assert any("any kind of GPU is taken" in note for note in notes)
    assert any("NCCL_SOCKET_IFNAME" in note for note in notes)
    assert any("looks there for train.py" in note for note in notes)
    assert all(len(words) > 10 for words in SETTINGS.values())


def test_hostfile_has_the_command_for_open_mpi() -> None:
    made = hostfile.export(subject(), MADE, {"nodes": "b-[1-5]/a-[1-4]"})
    assert made.files["hostfile"].splitlines()[2:4] == ["a-1 slots=8", "a-2 slots=8"]
    (command,) = [note for note in made.notes if "mpirun" in note]
    words = shlex.split(command.removeprefix("with Open MPI: "))
    inner = shlex.split(words[-1])
    assert inner[inner.index("--master-addr") + 1] == "a-1"
    assert inner[-len(HOSTILE) :] == HOSTILE
    unnamed = hostfile.export(subject(), MADE, {})
    assert any("no names yet" in note for note in unnamed.notes)
