"""Inventories beside what the schedulers do themselves: Slurm's controller and Ray, each on loopback."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from planner import api
from planner.discovery import Pool as Found
from planner.discovery import asked_of, discover
from planner.discovery.slurm import COMMANDS
from planner.discovery.verdicts import short, verdicts
from planner.export import Subject
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout
from tests.contract import WANTED, judged
from tests.contract.slurm_cluster import Pool, SlurmCluster

pytestmark = pytest.mark.contract

PATTERNS, WALKS, NODES = WANTED, max(1, WANTED // 10), 16
SOON_S = 120
"""A job that starts within as many seconds starts now: others here run for hours."""


@cache
def subject(nodes: int, gpus: int = 8) -> Subject:
    """A plan on so many whole nodes, its replicas all of its parallelism."""
    each = gpus if nodes == 1 else 8
    kind = f"{nodes}x{each}xH100"
    model, cluster = ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse(kind)
    count = nodes * each
    training = TrainingSpec(global_batch_size=count, seq_length=2048)
    layout = Layout(data_parallel=count, data_shards=count, sharding="zero1", grad_accum=1)
    return Subject(model, cluster, api.estimate(model, cluster, training, layout, recompute="full"))


def starts_now(cluster: SlurmCluster, *options: str) -> bool:
    """Does the controller say that such a job would start at once?"""
    done = cluster.fits(*options)
    when = re.search(r"to start at (\S+)", done.stderr)
    if done.returncode or not when:
        assert re.search("not available|not be satisfied|Unable|available now", done.stderr), done.stderr
        return False
    return (datetime.fromisoformat(when[1]) - datetime.now()).total_seconds() < SOON_S


def shaken(cluster: SlurmCluster, chance: random.Random, pool: str) -> None:
    """One more thing that happens to some nodes that nothing has happened to.

    Nodes with jobs are left alone: without a slurmd they never finish to power up, and draining one has its
    job queued again, which others then wait for.
    """
    idle = [name for name, state in cluster.states().items() if state == "idle" and name.startswith(pool)]
    several = short(chance.sample(idle, min(len(idle), chance.randint(1, 3)))) if idle else ""
    act = chance.choice(["whole", "whole", "part", "cpus", "drain", "down"])
    if not idle:
        return
    elif act == "whole":
        cluster.occupy(several)
    elif act == "part":
        cluster.occupy(several, gpus=chance.randint(1, 7))
    elif act == "cpus":
        cluster.occupy(several, gpus=0)
    elif act == "drain":
        cluster.drain(several, "xid 79 | gpu 3")
    else:
        cluster.down(several, "no [answer]")


def captures_of(cluster: SlurmCluster, folder: Path) -> dict[str, Callable[[], list[Path]]]:
    """The ways in which a cluster may be captured."""

    def kept(name: str, *commands: tuple[str, ...]) -> list[Path]:
        paths = []
        for number, words in enumerate(commands):
            paths.append(folder / f"{name}{number}")
            paths[-1].write_text(cluster.run(*words).stdout)
        return paths

    topology = ("scontrol", "show", "topology")
    return {
        "sinfo": lambda: kept("sinfo", COMMANDS[0].words, topology),
        "sinfo --json": lambda: kept("json", ("sinfo", "--json"), topology),
        "scontrol": lambda: kept("scontrol", ("scontrol", "-d", "show", "node"), topology),
        "scontrol -o": lambda: kept("oneliner", ("scontrol", "-d", "-o", "show", "node"), topology),
    }


def pool_of(paths: list[Path], name: str) -> Found:
    return discover(asked_of("from-slurm:" + ",".join(map(str, paths)))).pool(name)


def test_what_fits_today_is_what_slurm_would_start_now(tmp_path: Path) -> None:
    """Over random patterns of busy, drained and broken nodes, for whole nodes and parts of one; what is said
    of where is good too; and every capture gives the same inventory."""
    chance = random.Random(8)
    asked = agreed_whole = agreed_part = yes = 0
    for walk in range(WALKS):
        leaf = chance.choice([0, 8, 4, (3, 7, 6)])
        pools = [Pool("h100", NODES, features="h100,nvlink,80g", leaf=leaf), Pool("a100", 2, features="40g")]
        (tmp_path / f"walk{walk}").mkdir()
        with SlurmCluster(tmp_path / f"walk{walk}", pools) as cluster:
            ways = captures_of(cluster, tmp_path)
            for _ in range(PATTERNS // WALKS):
                shaken(cluster, chance, "h100-")
                pool = pool_of(ways["sinfo"](), "h100")
                if asked % 5 == 0:
                    for name, way in ways.items():
                        assert by_name(pool_of(way(), "h100")) == by_name(pool), name
                asked += 1
                free = len(pool.whole("now"))
                for nodes in {min(NODES, max(1, free + chance.choice([0, 1]))), chance.randint(1, NODES)}:
                    verdict = verdicts(pool, subject(nodes))[-1]
                    job = ("-p", "h100", f"-N{nodes}", "--exclusive", "--gpus-per-node=h100:8", "-t", "60")
                    assert starts_now(cluster, *job) is verdict.holds, (nodes, pool.nodes)
                    agreed_whole += 1
                    yes += verdict.holds is True
                    if verdict.holds:
                        where = ",".join(name for place in verdict.where for name in place.nodes)
                        assert starts_now(cluster, *job, f"--nodelist={where}")
                gpus = chance.randint(1, 7)
                part = ("-p", "h100", "-N1", "--mem=1000", "-t", "60", f"--gpus-per-node=h100:{gpus}")
                assert starts_now(cluster, *part) is verdicts(pool, subject(1, gpus))[-1].holds
                agreed_part += 1
    assert (asked, agreed_part) == (PATTERNS, PATTERNS)
    assert agreed_whole > 1.5 * PATTERNS
    assert 0.2 * agreed_whole < yes < 0.8 * agreed_whole


def by_name(pool: Found) -> tuple[Any, ...]:
    nodes = sorted(pool.nodes, key=lambda node: node.name)
    return pool.name, tuple((n.name, n.gpus, n.healthy, n.free, n.busy, n.why, n.leaf) for n in nodes)


def test_what_fits_today_is_what_ray_would_place_now(tmp_path: Path) -> None:
    """A placement group of whole nodes is ready at once where the inventory says so, JSON or text."""
    cases = [{"nodes": 4, "busy": busy, "sizes": [1, 2, 3, 4]} for busy in ([], [8], [3, 8], [1, 1, 1, 1])]
    for case, found in zip(cases, judged("ray", "ray_inventory.py", cases, timeout=400), strict=True):
        captures = {"json": json.dumps(found["capture"]), "text": found["status"]}
        pools = {}
        for name, text in captures.items():
            path = tmp_path / name
            path.write_text(text)
            pools[name] = discover(asked_of(f"from-ray:{path}")).pool()
        for name, pool in pools.items():
            assert len(pool.nodes) == case["nodes"], name
            assert pool.gpus("now") == 32 - sum(case["busy"]), (name, case)
            for size, ready in found["ready"].items():
                assert verdicts(pool, subject(int(size)))[-1].holds is ready, (name, case, size)


def test_a_controller_is_asked_where_no_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SlurmCluster(tmp_path, [Pool("h100", 4, features="h100,nvlink,80g", leaf=2)]) as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        cluster.down("h100-4")
        time.sleep(0.1)
        pool = discover(asked_of("from-slurm")).pool()
        assert (len(pool.nodes), len(pool.whole("now")), pool.leaves()) == (4, 3, {"leaf1": 2, "leaf2": 2})
