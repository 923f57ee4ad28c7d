"""Times of messages and of what happens once a step, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import InfeasibleError, Layout, api
from planner.best_first import find
from planner.layouts import Choices
from planner.network import Network
from planner.plan import make_plan
from planner.program import Solution, solve
from planner.stages import price
from strategies.base import Collective
from strategies.pipeline_parallel import PipelineParallel
from tests.helpers import job_of, llama

GIB = 2**30
PLAIN = Network(gpus=64, domain=8, intra=200e9, inter=20e9, intra_latency=2e-6, inter_latency=10e-6)


def test_a_ring_within_a_node_runs_at_its_speed_and_one_across_at_its_members_networks() -> None:
    """1 GB all-reduced: 2 (n-1)/n of it round the ring, and 2 (n-1) hops."""
    message = Collective("all_reduce", "data", 1e9)
    inside = PLAIN.seconds(message, Layout(data_parallel=8))
    assert inside == pytest.approx(2 * (7 / 8 * 1e9 / 200e9 + 7 * 2e-6))
    # 16 replicas, 8 in each node: eight networks side by side, 160 GB/s; one hop between nodes, 7 within.
    across = PLAIN.seconds(message, Layout(data_parallel=16))
    assert across == pytest.approx(2 * (15 / 16 * 1e9 / 160e9 + 10e-6 + 7 * 2e-6))
    # With tensor parallelism 8 each replica has one member in a node: one network.
    sparse = PLAIN.seconds(message, Layout(data_parallel=8, tensor_parallel=8))
    assert sparse == pytest.approx(2 * (7 / 8 * 1e9 / 20e9 + 7 * 10e-6))


def test_a_group_that_straddles_two_nodes_is_not_within_one() -> None:
    """Six neighbouring ranks of 24: the second group is ranks 6 to 11, across the first node's end."""
    network = replace(PLAIN, gpus=24)
    message = Collective("all_gather", "data", 1e9)
    seconds = network.seconds(message, Layout(data_parallel=6, pipeline_parallel=4))
    assert seconds > 5 / 6 * 1e9 / 200e9 * 1.5
    alone = replace(PLAIN, gpus=6).seconds(message, Layout(data_parallel=6))
    assert alone == pytest.approx(5 / 6 * 1e9 / 200e9 + 5 * 2e-6)


def test_a_pipeline_that_leaves_a_node_sends_over_the_network() -> None:
    """TP4 PP4 on two nodes: stages 1 and 2 lie on different nodes."""
    spread = PLAIN.send_seconds(64e6, Layout(tensor_parallel=4, pipeline_parallel=4))
    assert spread == pytest.approx(64e6 / 20e9 + 10e-6)
    inside = PLAIN.send_seconds(64e6, Layout(tensor_parallel=2, pipeline_parallel=4))
    assert inside == pytest.approx(64e6 / 200e9 + 2e-6)


def test_the_update_moves_states_twice_gradients_and_weights_once() -> None:
    """Megatron bf16: 2 x 12 + 4 + 2 bytes of each parameter, through 2.039 TB/s x 0.834."""
    model = llama(4, 1024, 8, 8, vocab_size=32000)
    job = job_of(model, "1xA100", seq_length=1024, global_batch_size=4)
    prices = price(job, Layout(grad_accum=4))
    assert prices.step_seconds == pytest.approx(30 * model.num_parameters / (2.039e12 * 0.834), rel=1e-3)


def test_messages_hide_behind_the_pass_that_has_room_for_them() -> None:
    """Two GPUs of one node: what an all-reduce takes beyond two thirds of the blocks' time is exposed."""
    model = llama(4, 1024, 8, 8, vocab_size=32000)
    for batch, exposed in ((2, True), (512, False)):
        job = job_of(model, "2xA100", seq_length=256, global_batch_size=batch)
        layout = Layout(data_parallel=2, micro_batch_size=batch // 2)
        prices = price(job, layout)
        update = 30 * model.num_parameters / (2.039e12 * 0.834)
        assert (float(prices.step_seconds) > update * 1.01) is exposed


def test_forward_is_a_third_of_plain_work_on_the_schedule_graph() -> None:
    """One micro-batch through two equal stages: the path is both stages' whole time."""
    job = job_of(llama(4, 1024, 8, 8, vocab_size=32000), "2xA100", seq_length=1024, global_batch_size=1)
    candidate = price(job, Layout(pipeline_parallel=2), ("full",)).spread()
    solution = solve([candidate])
    assert solution is not None
    plan = make_plan(job, solution, {})
    work = sum(stage.seconds for stage in plan.stages)
    assert plan.critical_path_s == pytest.approx(work + candidate.step_seconds)
    # With many micro-batches the recomputed backward, not the forward, carries the recompute.
    longer = job_of(llama(4, 1024, 8, 8, vocab_size=32000), "2xA100", seq_length=1024, global_batch_size=64)
    many = price(longer, Layout(pipeline_parallel=2, grad_accum=64), ("full",)).spread()
    split = Solution(many, ((3,), (1,)), many.cost(((3,), (1,))), True)
    assert make_plan(longer, split, {}).critical_path_s == pytest.approx(split.cost, rel=0.02)


def test_pipedream_updates_after_every_micro_batch() -> None:
    job = job_of(llama(4, 256), "2xA100", seq_length=256, global_batch_size=8)
    times = {
        schedule: float(price(job, Layout(pipeline_parallel=2, grad_accum=8, schedule=schedule)).step_seconds)
        for schedule in ("1f1b", "pipedream")
    }
    assert times["pipedream"] == pytest.approx(8 * times["1f1b"])


@pytest.mark.parametrize(("p", "v", "held"), [(4, 2, 8), (8, 4, 16), (8, 2, 16)])
def test_the_first_chunk_of_the_first_stage_holds_two_rounds(p: int, v: int, held: int) -> None:
    """Counted on the order itself: passes of chunk 0 that are forward done, backward not."""
    from planner.schedule import order

    now = most = 0
    for one in order("interleaved", 0, p, 64, v):
        if one.chunk == 0:
            now += 1 if one.forward else -1
            most = max(most, now)
    assert most == held == PipelineParallel(p, 0, 64, v, "interleaved").first_chunk_in_flight


def test_fsdp_within_a_pipeline_keeps_gradients_whole_and_parameters_gathered() -> None:
    """LLaMA shapes on TP2 PP4 DP8: 4 bytes of gradient and 2 gathered on top of the shard, per parameter."""
    job = job_of(
        llama(8, 1024, 8, 8, vocab_size=32000),
        "64xA100",
        framework="torchtitan",
        seq_length=512,
        global_batch_size=64,
    )
    layout = Layout(
        data_parallel=8,
        tensor_parallel=2,
        pipeline_parallel=4,
        grad_accum=8,
        sharding="fsdp",
        sequence_parallel=True,
    )
    block = (4 * 1024**2 + 3 * 1024 * 3072) / 2 + 2 * 1024

    def held(moment: str, component: str, name: str = "") -> float:
        found = api.explain(job.model, job.cluster, job.training, layout, stage=1, moment=moment).entries
        return sum(one.held for one in found if one.component == component and name in one.name)

    assert held("optimizer step", "gradients") == 2 * block * 4
    for moment in ("backward", "optimizer step"):
        assert held(moment, "parameters") == 2 * block * 4 / 8
    assert held("backward", "communication_buffers", "gathered layers") == 2 * block * 2
    assert held("optimizer step", "communication_buffers", "gathered layers") == 0
    messages = api.explain(job.model, job.cluster, job.training, layout).messages
    sharded = {(m.kind, m.per) for m in messages if m.axis == "data_shard"}
    assert sharded == {("all_gather", "step"), ("reduce_scatter", "step")}


def test_ddp_buckets_are_there_before_any_gradient() -> None:
    """One micro-batch, DDP: at the loss no gradient exists, but buckets for all of them do."""
    model = llama(4, 1024, 8, 8, vocab_size=32000)
    job = job_of(model, "8xA100", framework="hf", seq_length=1024, global_batch_size=8)
    plan = api.estimate(model, job.cluster, job.training, Layout(data_parallel=8))
    assert plan.stages[0].moment == "loss"
    assert plan.stages[0].components["gradients"] == pytest.approx(4 * model.num_parameters, rel=1e-6)


def test_a_gap_counts_what_the_solver_left_unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split three times too slow, not proved: the gap says that two thirds may be won."""
    import planner.best_first as module

    job = job_of(llama(8, 1024, 8, 8, vocab_size=32000), "8xA100", seq_length=1024, global_batch_size=64)
    best = find(job, Choices(), "time", top=1).answers[0].cost

    def careless(candidates: object, objective: str, left: float) -> Solution | None:
        found = solve(candidates, objective, left)  # type: ignore[arg-type]
        return found and replace(found, cost=3 * found.cost, optimal=False)

    monkeypatch.setattr(module, "solve", careless)
    found = find(job, Choices(), "time", top=1)
    assert not found.optimal
    assert found.gap == pytest.approx(1 - best / found.answers[0].cost, rel=0.01)
    assert found.enumerated == found.unfitting + found.pruned + found.solved


def test_changes_keep_the_headroom_that_was_asked_for() -> None:
    job = job_of(llama(80, 8192, 64, 64, intermediate_size=22016, vocab_size=32000), "8x80G", seq_length=2048)
    cluster = job.cluster.model_copy(update={"headroom": 0.1})
    with pytest.raises(InfeasibleError) as error:
        api.search(job.model, cluster, job.training)
    assert len(error.value.changes) >= 3
    for change in error.value.changes:
        usable = {"A100": 79.25, "H200": 139.8, "B200": 178.4, "MI300X": 191.7}
        limit = next(size for name, size in usable.items() if name in change.what)
        assert change.peak_bytes <= 0.9 * limit * GIB * 1.001, change
