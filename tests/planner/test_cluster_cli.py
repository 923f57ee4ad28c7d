"""`planner cluster` and `--gpus from-...`: what is shown, where a plan fits, and exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import api
from planner.cli import app
from planner.discovery import asked_of, discover
from planner.discovery.inventory import Node, Pool
from planner.discovery.verdicts import short, verdicts
from planner.errors import InputError
from planner.export import Subject
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout

ROOT = Path(__file__).parents[2]
NODES = "examples/cluster/nodes.txt"
SLURM = f"from-slurm:{NODES},examples/cluster/topology.txt"
K8S = "from-k8s:examples/cluster/nodes.json,examples/cluster/pods.json"


def run(*words: str, data: str | None = None) -> Any:
    return CliRunner().invoke(app, words, input=data, env={"COLUMNS": "140"})


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_of(gpus: str, layout: Layout) -> Subject:
    model, cluster = ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse(gpus)
    training = TrainingSpec(global_batch_size=layout.global_batch_size, seq_length=2048)
    return Subject(model, cluster, api.estimate(model, cluster, training, layout, recompute="full"))


def replicas(count: int) -> Layout:
    return Layout(data_parallel=count, data_shards=count, sharding="zero1")


def stages(count: int, each: int) -> Layout:
    return Layout(
        data_parallel=each, data_shards=each, pipeline_parallel=count, grad_accum=count, sharding="zero1"
    )


def pool_with(free: dict[str, int], broken: int = 0, **more: Any) -> Pool:
    """A pool of H100 with so many free nodes under each leaf, and some that are drained."""
    nodes = [
        Node(f"{leaf}-{n}", 8, 8, 8, "idle", leaf=leaf)
        for leaf, count in free.items()
        for n in range(1, count + 1)
    ]
    nodes += [Node(f"x{n}", 8, 0, 0, "drained", leaf="x") for n in range(broken)]
    return Pool(ClusterSpec.parse("8xH100").gpu, 8, tuple(nodes), **more)


def test_an_inventory_is_shown_with_what_is_away_and_what_is_left_out() -> None:
    result = run("cluster", SLURM)
    assert result.exit_code == 0
    for part in (
        "8xH100-SXM-80GB",
        "leaf1 8, leaf2 8",
        "92 of 128",
        "drained, xid 79 on gpu 3",
        "MIG",
        "hgx-011",
    ):
        assert part in result.output


def test_its_json_says_the_same() -> None:
    found = json.loads(run("cluster", SLURM, "--json").output)
    assert (found["schema"], found["source"]) == ("planner.cluster/1", "Slurm")
    (pool,) = found["pools"]
    assert pool["whole_nodes"] == {"total": 16, "healthy": 14, "now": 11}
    assert pool["nodes"][8] == {
        "name": "hgx-009",
        "gpus": 8,
        "healthy": 8,
        "free": 0,
        "state": "planned for another job",
        "busy": False,
        "why": "planned for another job",
        "leaf": "leaf2",
        "domain": "",
        "partitions": ["train"],
    }
    assert {one["label"] for one in found["refused"]} == {"a100", "a100_3g.20gb"}


def kept(tmp_path: Path, gpus: str, *more: str) -> str:
    path = tmp_path / "plan.json"
    path.write_text(
        run("search", "--model", "llama-2-7b", "--gpus", gpus, "--json", "--top", "1", *more).output
    )
    return str(path)


def test_a_plan_has_three_verdicts_and_status_1_where_it_does_not_fit_today(tmp_path: Path) -> None:
    fits = run("cluster", SLURM, kept(tmp_path, "64xH100"))
    assert fits.exit_code == 0
    assert "fits today (8 of 11 free)" in fits.output
    plan = kept(tmp_path, SLURM)
    later = run("cluster", SLURM, plan)
    assert later.exit_code == 1
    assert (
        "Fits the cluster (14 of 16 nodes), fits when healthy (14 of 14 in service), does not fit today"
        in (later.output)
    )
    assert "free: 7 under leaf1, 4 under leaf2" in later.output
    found = json.loads(run("cluster", SLURM, plan, "--json").output)
    assert [one["holds"] for one in found["verdict"]["verdicts"]] == [True, True, False]
    assert found["verdict"]["fits_today"] is False
    assert sum(len(place["nodes"]) for place in found["verdict"]["verdicts"][1]["where"]) == 14


def test_a_search_plans_on_what_is_in_service_and_says_whether_that_is_free() -> None:
    result = run("search", "--model", "llama-2-7b", "--gpus", SLURM, "--top", "1")
    assert result.exit_code == 0
    assert "112 x H100-SXM-80GB" in result.output
    assert "does not fit today (14 needed, 11 free)" in result.output
    assert "16 nodes, 14 in service, 11 free" in " ".join(result.output.split())
    now = run("search", "--model", "llama-2-7b", "--gpus", SLURM, "--fits", "now", "--top", "1", "-q")
    assert "88 x H100-SXM-80GB" in now.output
    few = run("search", "--model", "llama-2-7b", "--gpus", f"64@{SLURM}", "--top", "1", "--json")
    assert json.loads(few.output)["cluster"]["num_gpus"] == 64
    assert f"64@{SLURM}" in json.loads(few.output)["command"]


@pytest.mark.parametrize("command", ["estimate", "explain", "compare"])
def test_other_commands_read_it_too(command: str) -> None:
    more = ["-tp", "8"] if command != "compare" else []
    result = run(command, "--model", "llama-2-7b", "--gpus", f"32@{SLURM}", *more)
    assert result.exit_code == 0, result.output


def test_standard_input_is_read(tmp_path: Path) -> None:
    result = run("cluster", "from-slurm:-", data=Path(NODES).read_text())
    assert "8xH100-SXM-80GB" in result.output
    both = Path("examples/cluster/nodes.json").read_text() + Path("examples/cluster/pods.json").read_text()
    assert run("cluster", "from-k8s:-", data=both).output == run("cluster", K8S).output


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["cluster", "64xH100"], "write from-slurm"),
        (["cluster", f"64@{SLURM}"], "leave 64@ out"),
        (["cluster", SLURM, "--plan", "1"], "name that too"),
        (["cluster", SLURM, "--pool", "older"], "a100 cannot be planned on: a100 may be"),
        (
            ["search", "--model", "llama-2-7b", "--gpus", "64xH100", "--pool", "x"],
            "--pool is of --gpus from-slurm",
        ),
        (["search", "--model", "llama-2-7b", "--gpus", SLURM, "--fits", "soon"], "use total, healthy, now"),
        (["search", "--model", "llama-2-7b", "--gpus", f"129@{SLURM}"], "use 128 at most"),
        (["infer", "--model", "llama-2-7b", "--gpus", SLURM], "a scheduler is asked by search"),
        (["sweep", "--model", "llama-2-7b", "--gpus", "from-slurm"], "write count x kind"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], why: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert why in " ".join(result.output.split())


def test_a_page_in_the_browser_never_asks_a_scheduler_or_reads_a_file() -> None:
    from planner.web.answers import answer
    from planner.web.fields import from_json
    from planner.web.fields import read as asked_by

    for gpus in (SLURM, "from-slurm"):
        found = answer(
            "search", asked_by(from_json(json.dumps({"model": "llama-2-7b", "gpus": gpus}).encode()))
        )
        assert (found.status, "a scheduler is asked by" in found.text) == (422, True)


def test_blocks_of_a_plan_stay_under_one_leaf() -> None:
    (*_, now) = verdicts(pool_with({"a": 3, "b": 5, "c": 2}, broken=2), plan_of("48xH100", stages(3, 16)))
    assert (now.holds, now.block, now.blocks, now.together) == (True, 2, 3, 3)
    assert sum(len(place.nodes) for place in now.where) == 6
    (*_, torn) = verdicts(pool_with({"a": 3, "b": 3}), plan_of("48xH100", stages(3, 16)))
    assert (torn.holds, torn.blocks, torn.together) == (True, 3, 2)
    (*_, one) = verdicts(pool_with({"a": 3, "b": 6, "c": 4}), plan_of("32xH100", replicas(32)))
    assert [place.leaf for place in one.where] == ["c"]


def test_what_is_not_free_is_counted_and_a_queue_may_say_no() -> None:
    pool = pool_with({"a": 3}, broken=2)
    assert [one.holds for one in verdicts(pool, plan_of("40xH100", replicas(40)))] == [True, False, False]
    assert [one.holds for one in verdicts(pool, plan_of("24xH100", replicas(24)))] == [True, True, True]
    limited = pool_with({"a": 3}, quota=16)
    found = verdicts(limited, plan_of("24xH100", replicas(24)))[-1]
    assert (found.holds, found.why) == (False, "the queue still gives 16 of 24 GPUs")
    unknown = Pool(pool.gpu, 8, tuple(Node(f"n{n}", 8, 8, None, "ready") for n in range(4)))
    assert [one.holds for one in verdicts(unknown, plan_of("24xH100", replicas(24)))] == [True, True, None]


def test_part_of_a_node_is_enough_for_a_plan_that_takes_no_more() -> None:
    gpu = ClusterSpec.parse("8xH100").gpu
    pool = Pool(
        gpu, 8, (Node("n1", 8, 8, 3, "mixed", busy=True), Node("n2", 8, 8, 0, "allocated", busy=True))
    )
    assert verdicts(pool, plan_of("2xH100", replicas(2)))[-1].holds
    assert not verdicts(pool, plan_of("4xH100", replicas(4)))[-1].holds
    assert not verdicts(pool, plan_of("8xH100", replicas(8)))[-1].holds


def test_a_plan_of_other_gpus_or_fuller_nodes_is_refused() -> None:
    pool = pool_with({"a": 3})
    with pytest.raises(InputError, match="the plan is of A100-SXM-80GB"):
        verdicts(pool, plan_of("8xA100", replicas(8)))
    with pytest.raises(InputError, match="has 4"):
        verdicts(Pool(pool.gpu, 4, pool.nodes), plan_of("8xH100", replicas(8)))


def test_names_are_listed_as_slurm_reads_them() -> None:
    from planner.hostlist import names_of

    names = ["n09", "n10", "n11", "n1", "a7", "login", "r2-3"]
    assert sorted(names_of(short(names))) == sorted(names)


def test_importing_the_command_line_loads_nothing_of_it() -> None:
    code = "import sys, planner.cli; print([m for m in sys.modules if 'discovery' in m or 'cluster' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_captures_of_the_examples_agree_with_themselves() -> None:
    assert discover(asked_of(SLURM)).pool().partitions == {"train": 16}
