"""Which ranks are neighbours, from the command line to the plan; and the switches above the nodes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from planner import ClusterSpec, InputError, Layout, Plan, api
from planner.best_first import exhaustive, find
from planner.cli import app
from planner.defaults import Job
from planner.layouts import Choices, enumerate_layouts
from planner.stacks import STACKS
from planner.stages import price
from strategies.layout import RANK_ORDERS
from tests.helpers import job_of, llama

OUTSIDE = Layout(
    data_parallel=8, tensor_parallel=2, pipeline_parallel=4, grad_accum=8, sharding="zero1", data_shards=8
)


def some_job(gpus: str = "64xA100", **more: Any) -> Job:
    settings = {"seq_length": 2048, "global_batch_size": 64} | more
    return job_of(llama(24, 4096, 32, 8, intermediate_size=14336, vocab_size=32000), gpus, **settings)


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_order_changes_times_and_no_memory() -> None:
    job = some_job()
    plans = [
        api.estimate(job.model, job.cluster, job.training, replace(OUTSIDE, rank_order=order))
        for order in ("tp-dp-pp", "tp-pp-dp")
    ]
    assert plans[0].peak_bytes == plans[1].peak_bytes
    # Stages within a node: they send over NVLink, the replicas one adapter each over the network.
    assert plans[0].stages[1].seconds > plans[1].stages[1].seconds
    assert plans[0].step_time_s != plans[1].step_time_s
    assert plans[1].layout.rank_order == "tp-pp-dp"
    assert "TP2 PP4 DP8 zero1 mb1 tp-pp-dp" in plans[1].layout.to_layout().describe()
    assert "tp-dp-pp" not in plans[0].layout.to_layout().describe()
    assert any("--use-tp-pp-dp-mapping" in note for note in plans[1].assumptions)
    older = json.loads(plans[0].model_dump_json())
    del older["layout"]["rank_order"]
    assert Plan.model_validate(older) == plans[0]


def test_the_search_finds_the_best_order_of_each_layout() -> None:
    """All six orders and two levels of switches, against one program per layout."""
    cluster = ClusterSpec(**{**dict(some_job().cluster), "nodes_per_leaf": 2, "oversubscription": 4})
    job = replace(some_job(), cluster=cluster)
    choices = Choices(
        tensor_parallel=(2, 4), pipeline_parallel=(2, 4), micro_batch_size=(1,), rank_order=RANK_ORDERS
    )
    ours, theirs = find(job, choices, top=40), exhaustive(job, choices, "time", 40)
    assert [one.cost for one in ours.answers] == pytest.approx([one.cost for one in theirs], rel=1e-5)
    assert len({one.candidate.layout for one in theirs}) == len(theirs) > 1
    assert ours.optimal
    # Each layout once, in its best order: no order alone has a quicker one.
    for order in RANK_ORDERS:
        for other in exhaustive(job, replace(choices, rank_order=(order,)), "time", 40):
            own = replace(other.candidate.layout, rank_order=RANK_ORDERS[0])
            best = [one for one in theirs if replace(one.candidate.layout, rank_order=RANK_ORDERS[0]) == own]
            assert not best or best[0].cost <= other.cost * (1 + 1e-6)


def test_orders_under_which_no_group_lies_elsewhere_are_one_layout() -> None:
    both, one = Choices(), Choices(rank_order=("tp-dp-pp",))
    for restricted in ({"tensor_parallel": (8,)}, {"pipeline_parallel": (1,)}, {"data_parallel": (1,)}):
        sizes = [enumerate_layouts(some_job(), replace(c, **restricted)).size for c in (both, one)]
        assert sizes[0] == sizes[1], restricted
    inside = replace(both, tensor_parallel=(2,), pipeline_parallel=(4,))
    (family, *_) = enumerate_layouts(some_job(), inside).families
    assert set(family.rank_order) == {"tp-dp-pp", "tp-pp-dp"}
    # On a single node all that counts is which groups there are.
    assert enumerate_layouts(some_job("8xA100"), both).size == enumerate_layouts(some_job("8xA100"), one).size


def test_a_family_of_both_orders_costs_what_its_layouts_do_one_by_one() -> None:
    job = some_job()
    (family, *_) = enumerate_layouts(job, Choices(tensor_parallel=(2,), pipeline_parallel=(4,))).families
    prices = price(job, family, ("none",))
    for index in range(0, len(family.data_parallel), 3):
        part = prices.take(index).spread()
        alone = price(job, part.layout, ("none",)).spread()
        assert part.step_seconds == pytest.approx(alone.step_seconds)
        assert part.stages[1].fixed_seconds == pytest.approx(alone.stages[1].fixed_seconds)
        assert type(part.layout.rank_order) is str


def test_headroom_is_searched_in_one_order() -> None:
    choices = Choices(tensor_parallel=(2,), pipeline_parallel=(4,))
    answers = find(some_job(), choices, "headroom", top=3).answers
    assert {one.candidate.layout.rank_order for one in answers} == {"tp-dp-pp"}


def test_tensor_parallel_groups_stay_in_their_node_whatever_the_order() -> None:
    """Eight replicas innermost: two ranks of tensor parallelism lie on different nodes."""
    choices = Choices(tensor_parallel=(2,), pipeline_parallel=(4,), rank_order=("dp-tp-pp",))
    space = enumerate_layouts(some_job(), choices)
    assert space.size == 0
    reason = "rank order dp-tp-pp: a tensor-parallel group would leave its node of 8 GPUs"
    assert space.refused[reason] > 0
    assert enumerate_layouts(some_job(), replace(choices, across_nodes=True)).size > 0
    job = some_job()
    plan = api.estimate(job.model, job.cluster, job.training, replace(OUTSIDE, rank_order="dp-tp-pp"))
    assert any("leaves its node" in note for note in plan.warnings)
    assert any("megatron is not known to run rank order dp-tp-pp" in note for note in plan.warnings)


def test_every_stack_runs_the_default_order_and_known_ones_only() -> None:
    for stack in STACKS.values():
        assert next(iter(stack.rank_orders)) == RANK_ORDERS[0]
        assert set(stack.rank_orders) <= set(RANK_ORDERS)


def test_strides_multiply_to_the_gpus() -> None:
    for order in RANK_ORDERS:
        layout = replace(OUTSIDE, rank_order=order)
        outermost = order.rpartition("-")[2]
        degree = {"tp": 2, "dp": 8, "pp": 4}[outermost]
        assert layout.stride(outermost) * degree == layout.world_size
        assert layout.stride(order[:2]) == 1
    family = replace(OUTSIDE, rank_order=np.array(RANK_ORDERS), data_parallel=np.full(6, 8))
    strides = [replace(OUTSIDE, rank_order=order).stride("dp") for order in RANK_ORDERS]
    assert list(family.stride("dp")) == strides


@pytest.mark.parametrize("order", ["tp-dp", "pp-dp-tp-cp", "xp", ""])
def test_what_is_no_order_is_refused_with_those_that_are(order: str) -> None:
    job = some_job()
    with pytest.raises(InputError, match="use one of tp-dp-pp, tp-pp-dp"):
        api.estimate(job.model, job.cluster, job.training, replace(OUTSIDE, rank_order=order))
    with pytest.raises(InputError, match="use tp-dp-pp, tp-pp-dp"):
        api.search(job.model, job.cluster, job.training, choices=Choices(rank_order=(order,)))


JOB = ["--model", "llama-2-7b", "--gpus", "64xA100", "-b", "64"]


def test_the_command_line_takes_orders_and_switches() -> None:
    switches = ["--nodes-per-leaf", "2", "--oversubscription", "4"]
    degrees = ["-tp", "2", "-pp", "4"]
    given = json.loads(
        run("estimate", *JOB, *degrees, *switches, "--rank-order", "TP-PP-DP", "--json").stdout
    )
    assert given["cluster"]["nodes_per_leaf"] == 2
    assert given["cluster"]["oversubscription"] == 4
    assert given["plans"][0]["layout"]["rank_order"] == "tp-pp-dp"
    assert "leaf switches of 2 nodes, oversubscribed 4 : 1" in given["assumptions"]
    flat = json.loads(run("estimate", *JOB, *degrees, "--rank-order", "tp-pp-dp", "--json").stdout)
    assert flat["cluster"]["nodes_per_leaf"] is None
    assert "one non-blocking switch joins all nodes" in flat["assumptions"]
    assert flat["plans"][0]["step_time_s"] < given["plans"][0]["step_time_s"]
    found = run("search", *JOB, *degrees, *switches, "--rank-order", "tp-pp-dp", "-n", "1")
    assert found.exit_code == 0
    assert "tp-pp-dp" in found.output.splitlines()[0]
    assert " order " in found.output
    for command in ("explain", "compare"):
        assert run(command, *JOB, *switches).exit_code == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--oversubscription", "2"], "give --nodes-per-leaf too"),
        (["--oversubscription", "0.5", "--nodes-per-leaf", "4"], "--oversubscription 0.5"),
        (["--nodes-per-leaf", "0"], "--nodes-per-leaf 0"),
        (["--rank-order", "tp-pp"], "use one of tp-dp-pp"),
    ],
)
def test_bad_switches_and_orders_exit_2_with_the_fix(given: list[str], said: str) -> None:
    result = run("estimate", *JOB, *given)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
