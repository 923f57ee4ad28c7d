"""Times of messages and of what happens once a step, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import ClusterSpec, InfeasibleError, InputError, Layout, api
from planner.best_first import find
from planner.collectives import Messages
from planner.layouts import Choices
from planner.network import Level, Network
from planner.plan import make_plan
from planner.program import Solution, solve
from planner.reading import read_cluster
from planner.stages import price
from strategies.base import Collective
from strategies.pipeline_parallel import PipelineParallel
from tests.helpers import job_of, llama

GIB = 2**30
PLAIN = Network(
    64, (Level(1, 200e9, 2e-6, "NVLink"), Level(8, 20e9, 10e-6, "network")), generation=8
)  # an A100's tuning, without its in-switch reductions
LARGE = 1e12
"""Bytes beside which no latency counts."""


def seconds(network: Network, kind: str, axis: str, layout: Layout, size: float = LARGE) -> float:
    return float(Messages(network, layout).seconds(Collective(kind, axis, size)))


def test_a_ring_within_a_node_runs_at_its_speed_and_one_across_at_its_members_networks() -> None:
    """1 TB gathered: (n-1)/n of it round the ring."""
    inside = seconds(PLAIN, "all_gather", "data", Layout(data_parallel=8))
    assert inside == pytest.approx(7 / 8 * LARGE / 200e9, rel=1e-3)
    # 16 replicas, 8 in each node: eight networks side by side, 160 GB/s.
    across = seconds(PLAIN, "all_gather", "data", Layout(data_parallel=16))
    assert across == pytest.approx(15 / 16 * LARGE / 160e9, rel=1e-3)
    # With tensor parallelism 8 each replica has one member in a node: one network.
    sparse = seconds(PLAIN, "all_gather", "data", Layout(data_parallel=8, tensor_parallel=8))
    assert sparse == pytest.approx(7 / 8 * LARGE / 20e9, rel=1e-3)


def test_an_oversubscribed_leaf_switch_slows_those_that_leave_it_alone() -> None:
    """Two nodes a leaf, 8 : 1: a group of one member a node has two in a leaf, 2 x 2.5 GB/s of 20."""
    network = replace(PLAIN, levels=(*PLAIN.levels, Level(16, 2.5e9, 10e-6, "network")))
    tensor = Layout(data_parallel=8, tensor_parallel=8)
    assert network.bandwidth(network.place(8, 8)) == 2 * 2.5e9
    assert network.bandwidth(network.place(2, 8)) == 20e9  # one leaf's own nodes
    assert network.bandwidth(network.place(64, 1)) == 16 * 2.5e9
    assert seconds(network, "all_gather", "data", tensor) == pytest.approx(7 / 8 * LARGE / 5e9, rel=1e-3)


def test_a_cluster_has_the_levels_that_it_names() -> None:
    flat = ClusterSpec.parse("16x8xH100")
    assert [level.gpus for level in Network.of(flat).levels] == [1, 8]
    leaves = ClusterSpec(**{**dict(flat), "nodes_per_leaf": 4, "oversubscription": 2})
    inside, out, up = Network.of(leaves).levels
    assert (inside.gpus, out.gpus, up.gpus) == (1, 8, 32)
    assert up.bytes_per_s == out.bytes_per_s / 2
    assert Network.of(ClusterSpec.parse("144xGB200")).levels[1].gpus == 72


def test_switches_that_cannot_be_are_refused_with_the_nearest_that_can() -> None:
    cluster = dict(ClusterSpec.parse("144xGB200"))
    with pytest.raises(
        ValueError, match="nodes_per_leaf=16 of 4 GPUs are 64, not whole NVLink domains of 72: use 18"
    ):
        ClusterSpec(**{**cluster, "nodes_per_leaf": 16})
    with pytest.raises(ValueError, match="give nodes_per_leaf too"):
        ClusterSpec(**{**cluster, "oversubscription": 3})
    with pytest.raises(InputError, match=r"--oversubscription 0\.5"):
        read_cluster("64xH100", nodes_per_leaf=4, oversubscription=0.5)


def test_a_group_that_straddles_two_nodes_is_not_within_one() -> None:
    """Six neighbouring ranks of 24: the second group is ranks 6 to 11, across the first node's end."""
    network = replace(PLAIN, gpus=24)
    layout = Layout(data_parallel=6, pipeline_parallel=4)
    assert seconds(network, "all_gather", "data", layout) > 5 / 6 * LARGE / 200e9 * 1.5
    alone = seconds(replace(PLAIN, gpus=6), "all_gather", "data", Layout(data_parallel=6))
    assert alone == pytest.approx(5 / 6 * LARGE / 200e9, rel=1e-3)


def test_a_pipeline_that_leaves_a_node_sends_over_the_network() -> None:
    """TP4 PP4 on two nodes: stages 1 and 2 lie on different nodes."""
    spread = Messages(PLAIN, Layout(tensor_parallel=4, pipeline_parallel=4)).send_seconds(64e6)
    assert spread == pytest.approx(64e6 / 20e9 + 8.4e-6 + 10e-6 + 11.3e-6)
    inside = Messages(PLAIN, Layout(tensor_parallel=2, pipeline_parallel=4)).send_seconds(64e6)
    assert inside == pytest.approx(64e6 / 200e9 + 8.4e-6 + 2e-6 + 2.8e-6)


def test_the_rank_order_says_whose_neighbours_share_a_node() -> None:
    """TP2 PP4 DP8 on nodes of eight: stages within a node, or four replicas."""
    outside = Layout(data_parallel=8, tensor_parallel=2, pipeline_parallel=4)
    inside = replace(outside, rank_order="tp-pp-dp")
    assert (outside.stride("pp"), inside.stride("pp")) == (16, 2)
    assert (outside.stride("dp"), inside.stride("dp")) == (2, 8)
    sends = [Messages(PLAIN, one).send_seconds(1e9) for one in (outside, inside)]
    assert sends[0] == pytest.approx(10 * sends[1], rel=0.01)
    reductions = [seconds(PLAIN, "reduce_scatter", "data", one) for one in (outside, inside)]
    assert reductions[1] == pytest.approx(4 * reductions[0], rel=0.01)
    # With eight ranks of tensor parallelism neither has two of its own in a node.
    wide = Layout(data_parallel=4, tensor_parallel=8, pipeline_parallel=2)
    assert PLAIN.same(wide, replace(wide, rank_order="tp-pp-dp"))
    assert not PLAIN.same(outside, inside)


def test_the_update_moves_states_twice_gradients_and_weights_once() -> None:
    """Megatron bf16: 2 x 12 + 4 + 2 bytes of each parameter, through 2.039 TB/s x 0.834."""
    model = llama(4, 1024, 8, 8, vocab_size=32000)
    job = job_of(model, "1xA100", seq_length=1024, global_batch_size=4)
    prices = price(job, Layout(grad_accum=4))
    assert prices.step_seconds == pytest.approx(30 * model.num_parameters / (2.039e12 * 0.834), rel=1e-3)


def test_messages_hide_behind_the_pass_that_has_room_for_them() -> None:
    """Two GPUs of one node: what an all-reduce takes beyond two thirds of the blocks' time is exposed."""
    model = llama(4, 4096, 32, 32, vocab_size=32000)
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
