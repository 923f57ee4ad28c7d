"""Batch scripts in front of a real Slurm: the controller accepts them, and they run where the plan says."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.export import export as launch
from planner.export.base import Export, Subject
from planner.export.writing import write_folder
from planner.placement import block_nodes, place_on
from planner.schedulers.slurm import SCRIPT, export, leaf_switches, segment_nodes
from tests.contract import JUDGES, WANTED, python_of
from tests.contract.slurm_cluster import Pool, SlurmCluster, free_ports
from tests.plans import subject_of

pytestmark = pytest.mark.contract

HOSTILE = [
    "it's $(touch pwned) `touch pwned`",
    "-x",
    "two\nlines",
    'a"b\\',
    "ü",
    "",
    "#SBATCH --nodes=9",
    "*",
]
MADE = Export("stand-in", "1", {"plan.args": "# planner\n"}, {"SOME_SETTING": HOSTILE[0]}, ("train.py",))


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two kinds of nodes, 16 of them under two leaf switches, and nobody running anything."""
    pools = [Pool("h100", 16, leaf=8, features="h100,ib400"), Pool("a100", 8, cpus=128, leaf=(3, 5))]
    with SlurmCluster(tmp_path_factory.mktemp("books"), pools) as cluster:
        yield cluster


def emitted(subject: Subject, **settings: str) -> str:
    return export(subject, MADE, {name.replace("_", "-"): value for name, value in settings.items()}).files[
        SCRIPT
    ]


def starts_on(said: str) -> list[str]:
    """The nodes of ``sbatch --test-only``'s answer."""
    found = re.search(r"on nodes (\S+) in partition", said)
    assert found, said
    from planner.hostlist import names_of

    return names_of(found[1])


def test_slurm_accepts_what_is_written_for_many_plans(books: SlurmCluster) -> None:
    draw = random.Random(11)
    for _ in range(WANTED):
        nodes = draw.choice([1, 2, 4, 6, 8, 12, 16])
        pp = draw.choice([p for p in (1, 2, 4, 8, 16) if nodes % p == 0 or nodes * 8 % p == 0])
        tp = draw.choice([t for t in (1, 2, 4, 8) if nodes * 8 // pp % t == 0])
        leaf = draw.choice([None, 8])
        subject = subject_of(f"{nodes}x8xH100", tp=tp, pp=pp, leaf=leaf)
        settings = {"partition": "h100", "gpu_type": "h100", "time": "1-00:00:00"}
        settings |= draw.choice([{}, {"gres": "yes"}, {"constraint": "h100&ib400"}, {"requeue": "yes"}])
        settings |= draw.choice(
            [{}, {"signal": "TERM@300"}, {"cpus_per_task": "96"}, {"exclude": "a100-[1-2]"}]
        )
        script = emitted(subject, **settings)
        done = books.fits(script=script)
        assert done.returncode == 0, (subject.layout.describe(), done.stderr, script)
        chosen = starts_on(done.stderr)
        assert len(chosen) == nodes
        if leaf and block_nodes(subject) <= leaf:
            leaves = {(int(node.split("-")[1]) - 1) // leaf for node in chosen}
            assert len(leaves) <= (leaf_switches(subject) or 0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"partition": "h200"}, "invalid partition"),
        ({"gpu_type": "b200"}, "Requested node configuration is not available"),
        ({"constraint": "h300"}, "Invalid feature"),
        ({"time": "24-00:00:00"}, "time limit"),
        ({"account": "nobody", "mem": "9999G"}, "Requested node configuration is not available"),
        ({"nodes": "h100-[1-7],a100-1"}, "Requested nodes not in this partition"),
        ({"nodes": "h100-[91-98]"}, "Invalid node name"),
        ({"switches": "1", "exclude": "h100-[1,16]"}, "Requested node configuration is not available"),
    ],
)
def test_slurm_hears_what_cannot_be(books: SlurmCluster, settings: dict[str, str], why: str) -> None:
    given = {"partition": "h100", "gpu_type": "h100"} | settings
    done = books.fits(script=emitted(subject_of("8x8xH100", tp=8, pp=4), **given))
    assert done.returncode != 0
    assert why in done.stderr


def test_a_job_is_accepted_with_what_a_framework_is_given(books: SlurmCluster) -> None:
    subject = subject_of("8x8xH100", tp=8, pp=4, leaf=4)
    made = launch(subject, "megatron,slurm", None, {"partition": "h100", "gpu-type": "h100"})
    assert set(made.files) == {SCRIPT}
    assert made.target == "megatron,slurm"
    assert "--pipeline-model-parallel-size 4" in made.files[SCRIPT]
    assert len(starts_on(books.fits(script=made.files[SCRIPT]).stderr)) == 8


def test_slurm_reads_back_what_was_set(books: SlurmCluster, tmp_path: Path) -> None:
    settings = {
        "partition": "h100",
        "name": "a.b:c@d+e=f/g,h",
        "constraint": "h100&ib400",
        "time": "1-02:03:00",
        "exclude": "h100-[3,7]",
        "gpu_type": "h100",
        "switches": "2",
        "max_switch_wait": "00:10:00",
        "requeue": "no",
        "chdir": str(tmp_path),
        "signal": "TERM@300",
        "cpus_per_task": "96",
    }
    script = emitted(subject_of("8x8xH100", tp=8, pp=4), **settings)
    sent = books.run("sbatch", "--parsable", "--hold", given=script)
    job = books.job(int(sent.stdout))
    books.run("scancel", sent.stdout.strip())
    expected = {
        "Partition": "h100",
        "JobName": settings["name"],
        "Features": "h100&ib400",
        "TimeLimit": "1-02:03:00",
        "ExcNodeList": "h100-[3,7]",
        "NumNodes": "8-8",
        "TresPerNode": "gres:gpu:h100:8",
        "Requeue": "0",
        "WorkDir": str(tmp_path),
        "CPUs/Task": "96",
        "OverSubscribe": "NO",
    }
    job["TresPerNode"] = job["TresPerNode"].replace("gres/", "gres:")  # since 24.05
    assert {name: job.get(name) for name in expected} == expected
    assert job["Switches"] == "2@00:10:00"


def test_a_plan_starts_later_while_nodes_are_busy_and_never_while_they_are_down(
    tmp_path: Path,
) -> None:
    with SlurmCluster(tmp_path, [Pool("h100", 8, leaf=4)]) as cluster:
        script = emitted(subject_of("7x8xH100", tp=8, pp=1))
        now = cluster.fits(script=script).stderr
        cluster.occupy("h100-[1-2]", time="4:00:00")
        later = cluster.fits(script=script).stderr
        assert starts_on(now)
        assert re.findall(r"start at (\S+)", now)[0] < re.findall(r"start at (\S+)", later)[0]
        cluster.drain("h100-8")
        cluster.down("h100-7")
        assert cluster.states()["h100-8"].startswith("drain")
        assert "not available" in cluster.fits(script=script).stderr


def test_named_nodes_are_asked_for_in_full(books: SlurmCluster) -> None:
    subject = subject_of("8x8xH100", tp=8, pp=4)
    made = export(subject, MADE, {"nodes": "h100-[1-3]/h100-[9-12]/a100-[1-2]", "partition": "h100,a100"})
    placed = place_on(subject, "h100-[1-3]/h100-[9-12]/a100-[1-2]")
    assert placed.parted == 0
    assert set(placed.leaves) == {"leaf-1", "leaf-2", "leaf-3"}
    options = [line for line in made.files[SCRIPT].splitlines() if line.startswith("#SBATCH --nodelist=")]
    assert options == [f"#SBATCH --nodelist={','.join(placed.nodes)}"]
    one_leaf = emitted(subject_of("4x8xH100", tp=8, pp=4), partition="h100", nodes="h100-[12,9,2-3]")
    assert starts_on(books.fits(script=one_leaf).stderr) == ["h100-2", "h100-3", "h100-9", "h100-12"]


def test_segments_of_the_block_topology(tmp_path: Path) -> None:
    if SlurmCluster.installed() < (24, 5):
        pytest.skip("--segment is of Slurm 24.05 and later")
    with SlurmCluster(tmp_path, [Pool("gb200", 16, gpus=4, leaf=4)], topology="block") as cluster:
        subject = subject_of("16x4xH100", tp=4, pp=4)
        assert segment_nodes(subject) == 4
        assert cluster.fits(script=emitted(subject, topology="block")).returncode == 0
        wrong = cluster.fits(script=emitted(subject, segment="16"))
        assert "not available" in wrong.stderr


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three nodes with a slurmd each, whose jobs run on this machine."""
    python_of("frameworks")
    pool = Pool("n", 3, gpu_type="h100", gpus=2, cpus=4, memory=4000, leaf=(1, 2))
    with SlurmCluster(tmp_path_factory.mktemp("running"), [pool], running=True) as cluster:
        yield cluster


@pytest.fixture
def torchrun(running: SlurmCluster, tmp_path: Path) -> Path:
    """A folder for PATH with a torchrun for which all nodes of the books are this machine."""
    python = python_of("frameworks")
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "torchrun"
    script.write_text(
        f"#!{python}\n"
        "import os, sys\n"
        "at = sys.argv.index('--master-addr') + 1\n"
        "print('master', sys.argv[at], flush=True)\n"
        "sys.argv[at] = '127.0.0.1'\n"
        f"os.execv({str(python)!r}, [{str(python)!r}, '-m', 'torch.distributed.run', *sys.argv[1:]])\n"
    )
    script.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("degrees", "nodes"),
    [
        ({"tp": 2, "pp": 2}, ""),
        ({"tp": 1, "pp": 2, "cp": 2}, ""),
        ({"tp": 2, "pp": 2}, "n-3/n-1"),
        ({"tp": 1, "pp": 2}, "n-1/n-[2-3]"),
    ],
)
def test_every_rank_is_where_the_plan_has_it(
    running: SlurmCluster, torchrun: Path, tmp_path: Path, degrees: dict[str, int], nodes: str
) -> None:
    subject = subject_of("2x2xH100", **degrees)
    layout = subject.layout
    shape = (layout.pipeline_parallel, layout.data_parallel, layout.context_parallel, layout.tensor_parallel)
    program = (str(JUDGES / "coordinates.py"), *map(str, shape), *HOSTILE)
    env = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **MADE.env}
    made = Export("stand-in", "1", {"plan.args": "# planner\n"}, env, program)
    settings = {"port": str(free_ports(1)[0]), "gpu-type": "h100"}
    settings |= {"nodes": nodes, "gres": "yes"} if nodes else {}
    folder = tmp_path / "launch"
    write_folder(folder, export(subject, made, settings).files)
    sent = running.run("sbatch", "--parsable", SCRIPT, cwd=folder, PATH=f"{torchrun}:{running.env['PATH']}")
    job = running.wait(int(sent.stdout))
    text = "".join(path.read_text() for path in folder.glob("*.out"))
    assert job["JobState"] == "COMPLETED", text
    placed = place_on(subject, nodes or job["NodeList"])
    lines = text.splitlines()
    assert {line for line in lines if line.startswith("master")} == {f"master {placed.nodes[0]}"}
    said = sorted((json.loads(line) for line in lines if line.startswith("{")), key=lambda one: one["rank"])
    axes = ("rank", "node", "gpu", "tp", "cp", "dp", "pp")
    assert [tuple(one[name] for name in axes) for one in said] == [tuple(one)[:7] for one in placed.ranks()]
    firsts = [one["rank"] - one["tp"] for one in said]
    tp = layout.tensor_parallel
    assert [one["sum"] for one in said] == [tp * first + tp * (tp - 1) // 2 for first in firsts]
    assert all(one["world"] == 4 and one["arguments"] == HOSTILE and one["env"] == HOSTILE[0] for one in said)
    assert {one["visible"] for one in said} == {"0,1"}
    assert not list(tmp_path.rglob("pwned"))


def test_an_allocation_of_another_size_or_folder_ends_at_once(running: SlurmCluster, tmp_path: Path) -> None:
    folder = tmp_path / "launch"
    shared = {"exclusive": "no", "cpus-per-task": "1", "mem": "500M"}
    write_folder(folder, export(subject_of("2x2xH100", tp=2, pp=2), MADE, shared).files)

    def output(*options: str, cwd: Path) -> tuple[str, str]:
        sent = running.run("sbatch", "--parsable", "--output=out", *options, cwd=cwd)
        job = running.wait(int(sent.stdout))
        return job["ExitCode"], (cwd / "out").read_text()

    (folder / "train.py").touch()
    code, said = output("--nodes=1", SCRIPT, cwd=folder)
    assert code == "3:0"
    assert "the plan takes 2 nodes with 2 GPUs, this allocation has 1" in said
    code, said = output("--gpus-per-node=1", SCRIPT, cwd=folder)
    assert code == "3:0"
    assert "the plan takes 2 GPUs of a node, this allocation has 1" in said
    code, said = output(str(folder / SCRIPT), cwd=tmp_path)
    assert code == "3:0"
    assert "train.py is not in" in said


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here: apt-get install shellcheck")
def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    subject = subject_of("8x8xH100", tp=8, pp=4, leaf=4)
    made = Export("stand-in", "1", {"a b.args": "# planner\n"}, {"A": HOSTILE[0]}, ("train.py", *HOSTILE))
    for number, settings in enumerate(
        [
            {},
            {"nodes": "h-[1-4]/h-[5-8]"},
            {"container": "a b$(c)'", "container-mounts": '/d:/d,"$(c)'},
            {"host-suffix": "-ib0", "requeue": "yes", "setup": "my $(c)'s.sh"},
        ]
    ):
        path = tmp_path / f"{number}.sbatch"
        path.write_text(export(subject, made, settings).files[SCRIPT])
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_deepspeed_reads_the_hostfile(tmp_path: Path) -> None:
    from planner.schedulers import hostfile

    subject = subject_of("4x8xH100", tp=8, pp=2)
    (tmp_path / "hostfile").write_text(
        hostfile.export(subject, MADE, {"nodes": "h-[9-10]/h-[1-2]"}).files["hostfile"]
    )
    code = (
        "import json; from deepspeed.launcher.runner import fetch_hostfile;"
        f"print(json.dumps(list(fetch_hostfile({str(tmp_path / 'hostfile')!r}).items())))"
    )
    done = subprocess.run(
        [str(python_of("frameworks")), "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    read = json.loads(done.stdout.splitlines()[-1])
    assert read == [["h-9", 8], ["h-10", 8], ["h-1", 8], ["h-2", 8]]
