"""Inventories of Slurm: text and JSON of sinfo and scontrol, topologies, states, and what is refused.

The captures are written here by the fields of sinfo(1), scontrol(1), gres.conf(5) and topology.yaml(5); the
JSON by what `sinfo --json` of 22.05 and `scontrol show nodes --json` of 24.11 give.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.discovery import Pool, asked_of, discover, kinds_said
from planner.discovery.clusters import cluster_from, cluster_of
from planner.discovery.inventory import Inventory
from planner.discovery.kinds import Unresolved, kind_of
from planner.discovery.slurm import gres_of
from planner.errors import InputError

HEAD = "NODELIST|PARTITION|STATE|GRES|GRES_USED|AVAIL_FEATURES|REASON|"
TREE = (
    "SwitchName=s1 Level=0 LinkSpeed=1 Nodes=n[1-4]\n"
    "SwitchName=s2 Level=0 LinkSpeed=1 Nodes=n[5-8]\n"
    "SwitchName=top Level=1 LinkSpeed=1 Nodes=n[1-8] Switches=s[1-2]\n"
)


def read(tmp_path: Path, *texts: str, source: str = "slurm", **said: str) -> Inventory:
    names = []
    for number, text in enumerate(texts):
        path = tmp_path / f"capture{number}"
        path.write_text(text)
        names.append(str(path))
    return discover(asked_of(f"from-{source}:{','.join(names)}"), said)


def row(
    name: str, state: str = "idle", gres: str = "gpu:h100:8", used: str | None = None, **more: str
) -> str:
    used = "gpu:h100:0" if used is None else used
    partition, features = more.get("partition", "train*"), more.get("features", "h100,sxm,80g")
    return f"{name}|{partition}|{state}|{gres}|{used}|{features}|{more.get('reason', 'none')}|"


def one(tmp_path: Path, **given: str) -> Any:
    found = read(tmp_path, f"{HEAD}\n{row('n1', **given)}\n")
    (pool,) = found.pools
    (node,) = pool.nodes
    return pool, node


def counts(pool: Pool) -> tuple[int, int, int]:
    return len(pool.nodes), len(pool.whole("healthy")), len(pool.whole("now"))


def test_nodes_are_counted_in_all_in_service_and_free(tmp_path: Path) -> None:
    lines = [
        row("n1"),
        row("n2", "mixed", used="gpu:h100:4(IDX:0-3)"),
        row("n3", "allocated", used="gpu:h100:8"),
    ]
    lines += [
        row("n4", "down*", reason="no | answer"),
        row("n5", "drained", reason="xid 79"),
        row("n6", "idle~"),
    ]
    (pool,) = read(tmp_path, "\n".join([HEAD, *lines]), TREE).pools
    assert (pool.name, counts(pool)) == ("8xH100-SXM-80GB", (6, 4, 2))
    assert [pool.gpus(fits) for fits in ("total", "healthy", "now")] == [48, 32, 20]
    assert pool.leaves() == {"s1": 4, "s2": 2}
    assert [node.why for node in pool.nodes][1:5] == [
        "in use",
        "in use",
        "down, no | answer",
        "drained, xid 79",
    ]
    assert pool.partitions == {"train": 6}


@pytest.mark.parametrize(
    ("state", "in_service", "free"),
    [
        *[(state, True, True) for state in ("idle", "idle~", "IDLE+CLOUD+POWERED_DOWN")],
        *[(state, True, False) for state in ("idle#", "IDLE+CLOUD+NOT_RESPONDING+POWERING_UP")],
        *[
            (state, True, False)
            for state in ("allocated", "allocated#", "allocated+", "completing", "planned")
        ],
        *[(state, True, False) for state in ("idle-", "reserved", "idle%", "idle!", "idle@", "blocked")],
        *[
            (state, False, False)
            for state in ("down", "down~", "drained", "draining", "drng", "fail", "failing")
        ],
        *[
            (state, False, False)
            for state in ("idle*", "idle$", "maint", "inval", "unknown", "future", "idle^")
        ],
        *[
            (state, False, False)
            for state in ("IDLE+DRAIN", "MIXED+DRAIN", "IDLE+NOT_RESPONDING", "", "new one")
        ],
    ],
)
def test_states_say_what_is_in_service_and_what_is_free(
    tmp_path: Path, state: str, in_service: bool, free: bool
) -> None:
    pool, node = one(tmp_path, state=state)
    assert (bool(pool.whole("healthy")), bool(pool.whole("now"))) == (in_service, free), node.state
    assert node.free == (8 if free else 0)


def test_a_node_with_jobs_on_its_cpus_alone_is_not_whole(tmp_path: Path) -> None:
    pool, node = one(tmp_path, state="mixed")
    assert (node.free, pool.whole("now")) == (8, ())


def json_2205(name: str, state: str, flags: list[str], used: str, reason: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "state_flags": flags,
        "features": "h100,sxm,80g",
        "gres": "gpu:h100:8",
        "gres_drained": "N/A",
        "gres_used": used,
        "partitions": ["train"],
        "reason": reason,
        "weight": 1,
    }


STATES = [
    ("n1", "idle~", "idle", ["CLOUD", "POWERED_DOWN"], "gpu:h100:0", ""),
    ("n2", "allocated#", "allocated", ["CLOUD", "NOT_RESPONDING", "POWERING_UP"], "gpu:h100:8", ""),
    ("n3", "mixed", "mixed", ["CLOUD"], "gpu:h100:3(IDX:0-2)", ""),
    ("n4", "down~", "down", ["CLOUD", "POWERED_DOWN"], "gpu:h100:0", "ib flap"),
    ("n5", "drained", "idle", ["DRAIN"], "gpu:h100:0", "xid 79"),
    ("n6", "draining", "allocated", ["DRAIN"], "gpu:h100:8", "firmware"),
]


def test_text_and_json_of_every_version_give_the_same_inventory(tmp_path: Path) -> None:
    text = "\n".join([HEAD, *(row(n, s, used=u, reason=why or "none") for n, s, _, _, u, why in STATES)])
    old = {"meta": {}, "errors": [], "nodes": [json_2205(n, b, f, u, why) for n, _, b, f, u, why in STATES]}
    new = {
        "nodes": [
            {
                **json_2205(n, b, f, u, why),
                "state": [b.upper(), *f],
                "state_flags": None,
                "features": ["h100", "sxm", "80g"],
                "weight": {"set": True, "infinite": False, "number": 1},
            }
            for n, _, b, f, u, why in STATES
        ]
    }
    rows = {
        "sinfo": [
            {
                "nodes": {"total": 1, "nodes": [n]},
                "node": {"state": [b.upper(), *f]},
                "gres": {"total": "gpu:h100:8", "used": u},
                "features": {"total": "h100,sxm,80g"},
                "partition": {"name": "train"},
                "reason": {"description": why},
            }
            for n, _, b, f, u, why in STATES
        ]
    }
    records = "".join(
        f"NodeName={n} Arch=x86_64 CoresPerSocket=48 AvailableFeatures=h100,sxm,80g Gres=gpu:h100:8 "
        f"GresDrain=N/A GresUsed={u} State={'+'.join([b.upper(), *f])} Partitions=train  CfgTRES=cpu=192"
        + (f" Reason={why} [root@2026-01-05T10:00:00]\n" if why else "\n")
        for n, _, b, f, u, why in STATES
    )
    blocks = records.replace(" Gres=", "\n   Gres=").replace(" Partitions", "\n   Partitions")
    blocks = blocks.replace("NodeName", "\nNodeName")
    first = read(tmp_path, text, TREE).pools
    for other in (json.dumps(old), json.dumps(new), json.dumps(rows), records, blocks):
        assert read(tmp_path, other, TREE).pools[0].nodes == first[0].nodes
        assert read(tmp_path, other, TREE).pools == first


def test_six_columns_without_headings_and_what_is_piped_together_are_read(tmp_path: Path) -> None:
    line = "n1|mixed|gpu:h100:8|gpu:h100:4|h100,sxm,80g|none|\n"
    assert read(tmp_path, line).pools[0].nodes[0].free == 4
    found = read(tmp_path, f"{HEAD}\n{row('n[1-8]')}\n{TREE}")
    assert found.pools[0].leaves() == {"s1": 4, "s2": 4}
    assert found.notes == ()


def test_memory_of_the_gpus_used_comes_from_tres_where_gres_are_not_said(tmp_path: Path) -> None:
    record = (
        "NodeName=n1 Gres=gpu:h100:8 State=MIXED AvailableFeatures=sxm,80g Partitions=train "
        "CfgTRES=cpu=192,gres/gpu=8 AllocTRES=cpu=4,gres/gpu=3\n"
    )
    assert read(tmp_path, record).pools[0].nodes[0].free == 5
    assert read(tmp_path, record.split(" CfgTRES")[0]).pools[0].nodes[0].free == 0


def test_blocks_and_topology_yaml_are_leaves_too(tmp_path: Path) -> None:
    nodes = f"{HEAD}\n{row('n[1-8]')}\n"
    block = (
        "BlockName=b1 BlockIndex=0 Nodes=n[1-4] BlockSize=4\n"
        "BlockName=b2 BlockIndex=1 Nodes=n[5-8] BlockSize=4\n"
        "AggregatedBlock=b[1-2] BlockIndex=2 Nodes=n[1-8] BlockSize=8\n"
    )
    tree = """
- topology: other
  tree: {switches: [{switch: x, nodes: "n[1-8]"}]}
- topology: main
  cluster_default: true
  tree:
    switches:
      - {switch: top, children: "b[1-2]"}
      - {switch: b1, nodes: "n[1-4]"}
      - {switch: b2, nodes: "n[5-8]"}
"""
    blocks = "---\n- topology: main\n  block:\n    block_sizes: [4]\n    blocks:\n" + "".join(
        f"      - block: b{n}\n        nodes: n[{a}]\n" for n, a in ((1, "1-4"), (2, "5-8"))
    )
    for topology in (block, tree, blocks):
        assert read(tmp_path, nodes, topology).pools[0].leaves() == {"b1": 4, "b2": 4}


def test_blocks_are_nvlink_domains_of_gpus_whose_domains_span_nodes(tmp_path: Path) -> None:
    block = "".join(
        f"BlockName=b{n} BlockIndex={n} Nodes=n[{18 * n}-{18 * n + 17}] BlockSize=18\n" for n in (0, 1)
    )
    nodes = f"{HEAD}\n{row('n[0-35]', gres='gpu:gb200:4', used='gpu:gb200:0', features='')}\n"
    found = read(tmp_path, nodes, block)
    assert {node.domain for node in found.pool().nodes} == {"b0", "b1"}
    made = cluster_of(found, found.pool(), None)
    assert (made.num_gpus, made.domain, made.nodes_per_leaf) == (144, 72, 18)
    assert "2 NVLink domains of 18 nodes" in made.assumptions
    tree = block.replace("BlockName", "SwitchName").replace("BlockIndex", "Level")[:60].split("Level=1")[0]
    assert {node.domain for node in read(tmp_path, nodes, tree).pool().nodes} == {""}
    assert {node.domain for node in read(tmp_path, f"{HEAD}\n{row('n[0-35]')}\n", block).pool().nodes} == {""}


@pytest.mark.parametrize(
    ("name", "memory", "features", "kind"),
    [
        ("NVIDIA-H100-80GB-HBM3", 81559, "", "H100-SXM-80GB"),
        ("NVIDIA-H100-PCIe", 81559, "", "H100-PCIe-80GB"),
        ("NVIDIA-H100-NVL", 95830, "", "H100-NVL-94GB"),
        ("NVIDIA H200", 143771, "", "H200-SXM-141GB"),
        ("NVIDIA-A100-SXM4-40GB", 40960, "", "A100-SXM-40GB"),
        ("NVIDIA-A100-80GB-PCIe", 81920, "", "A100-PCIe-80GB"),
        ("NVIDIA-A100-PCIE-40GB", 40960, "", "A100-PCIe-40GB"),
        ("Tesla-V100-SXM2-32GB", 32768, "", "V100-SXM2-32GB"),
        ("NVIDIA-GB200", 189471, "", "GB200-NVL72-186GB"),
        ("NVIDIA-GeForce-RTX-4090", 24564, "", "RTX-4090-24GB"),
        ("AMD_Instinct_MI300X_OAM", None, "", "MI300X-192GB"),
        ("nvidia_a100-sxm4-80gb", None, "", "A100-SXM-80GB"),
        ("h100_nvl", None, "", "H100-NVL-94GB"),
        ("h100", None, "", "H100-SXM-80GB"),
        ("h100", None, "pcie", "H100-PCIe-80GB"),
        ("a100", None, "ib200,80g", "A100-SXM-80GB"),
        ("a100", 40960, "pcie", "A100-PCIe-40GB"),
        ("a100", None, "", "may be"),
        ("v100", None, "ib400", "may be"),
        ("NVIDIA-H100-80GB-HBM3", 95830, "", "no kind of the catalog"),
        ("NVIDIA-H200-NVL", 143771, "", "no kind of the catalog"),
        ("NVIDIA-GH200-480GB", 97871, "", "no kind of the catalog"),
    ],
)
def test_names_of_drivers_and_schedulers_are_kinds_of_the_catalog(
    name: str, memory: int | None, features: str, kind: str
) -> None:
    words = tuple(features.split(",")) if features else ()
    if kind.startswith(("may", "no")):
        with pytest.raises(Unresolved, match=kind):
            kind_of(name, memory, words, {})
    else:
        assert kind_of(name, memory, words, {})[0].name == kind


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("gpu:h100:8", {"h100": 8}),
        ("gpu:nvidia_h200:4(S:0-1)", {"nvidia_h200": 4}),
        ("gpu:8", {"gpu": 8}),
        ("gpu", {"gpu": 1}),
        ("gres/gpu:h100:8", {"h100": 8}),
        ("gpu:h100:4(IDX:0-1,4-5)", {"h100": 4}),
        ("gpu:(null):4(IDX:0-3)", {"gpu": 4}),
        ("gpu:a100:4,gpu:v100:2", {"a100": 4, "v100": 2}),
        ("nic:2,gpu:h100:8(S:0-1),mps:800", {"h100": 8}),
        ("(null)", {}),
        ("", {}),
    ],
)
def test_generic_resources_are_read(text: str, kinds: dict[str, int]) -> None:
    assert gres_of(text, "n1") == kinds


@pytest.mark.parametrize(
    ("gres", "reason"),
    [
        ("gpu:a100_3g.20gb:2", "MIG"),
        ("gpu:nvidia_a100_1g.5gb:7", "MIG"),
        ("gpu:a100:4,gpu:v100:2", "several kinds"),
        ("shard:32", "shard, MPS"),
        ("mps:800", "shard, MPS"),
        ("gpu:t4:4", "no kind of the catalog"),
    ],
)
def test_what_is_no_whole_gpu_of_a_known_kind_is_left_out_with_the_reason(
    tmp_path: Path, gres: str, reason: str
) -> None:
    found = read(tmp_path, f"{HEAD}\n{row('n1')}\n{row('x1', gres=gres, used='', features='')}\n")
    assert len(found.pools) == 1
    assert reason in found.refused[0].reason
    with pytest.raises(InputError, match="cannot be planned on"):
        found.pool(found.refused[0].label)
    assert any(reason in note for note in cluster_of(found, found.pools[0], None).assumptions)


def test_a_name_that_may_be_of_more_memory_than_there_is_is_asked_about(tmp_path: Path) -> None:
    line = row("n1", gres="gpu:a100:8", used="gpu:a100:0", features="ib200")
    with pytest.raises(InputError, match=r"may be .*A100-SXM-40GB.*--gpu-type a100=a100-sxm-40gb"):
        read(tmp_path, f"{HEAD}\n{line}\n")
    assert read(tmp_path, f"{HEAD}\n{line}\n", a100="A100-SXM-80GB").pools[0].gpu.name == "A100-SXM-80GB"
    with_feature = line.replace("ib200", "nvlink,40g")
    assert read(tmp_path, f"{HEAD}\n{with_feature}\n").pools[0].gpu.name == "A100-SXM-40GB"
    untyped = row("n1", gres="gpu:8", used="gpu:0", features="v100,32g")
    assert read(tmp_path, f"{HEAD}\n{untyped}\n").pools[0].gpu.name == "V100-SXM2-32GB"
    with pytest.raises(InputError, match=r"nobody says which kind.*--gpu-type gpu="):
        read(tmp_path, f"{HEAD}\n{row('n1', gres='gpu:8', features='fast')}\n")
    with pytest.raises(InputError, match="no GPUs are called so here"):
        read(tmp_path, f"{HEAD}\n{row('n1')}\n", b200="B200-SXM-180GB")


def test_kinds_are_said_by_name() -> None:
    assert kinds_said(["A100=a100-80gb"]) == {"a100": "A100-SXM-80GB"}
    for wrong in (["a100"], ["a100=x100"], ["a100=a100", "A100=a100"]):
        with pytest.raises(InputError):
            kinds_said(wrong)


def test_one_pool_is_planned_at_a_time(tmp_path: Path) -> None:
    other = {"gres": "gpu:l40s:4", "used": "gpu:l40s:0", "features": ""}
    text = "\n".join(
        [HEAD, row("n[1-4]"), row("n[5-8]", partition="night"), row("v[1-2]", partition="viz", **other)]
    )
    found = read(tmp_path, text, TREE)
    with pytest.raises(InputError, match=r"2 pools.*8xH100-SXM-80GB \(8 nodes\); 4xL40S-48GB \(2 nodes\)"):
        found.pool()
    with pytest.raises(InputError, match=r"partitions night \(4 nodes\), train \(4 nodes\)"):
        found.pool("h100")
    assert len(found.pool("train").nodes) == 4
    assert (
        found.pool("l40s").name == found.pool("viz").name == found.pool("4xl40s-48gb").name == "4xL40S-48GB"
    )
    with pytest.raises(InputError, match="did you mean"):
        found.pool("trian")


def test_a_node_of_several_partitions_is_one_node(tmp_path: Path) -> None:
    text = "\n".join([HEAD, row("n1"), row("n2"), row("n1", partition="all"), row("n2", partition="all")])
    assert read(tmp_path, text).pool().partitions == {"all": 2, "train": 2}
    with pytest.raises(InputError, match="listed twice, with differences"):
        read(tmp_path, "\n".join([HEAD, row("n1"), row("n1", "drained", partition="all")]))


def test_a_pool_becomes_a_cluster(tmp_path: Path) -> None:
    lines = [row("n[1-6]"), row("n7", "mixed", used="gpu:h100:1"), row("n8", "drained")]
    found = read(tmp_path, "\n".join([HEAD, *lines]), TREE)
    pool = found.pool()
    assert [cluster_of(found, pool, None, fits).num_gpus for fits in ("total", "healthy", "now")] == [
        64,
        56,
        48,
    ]
    made = cluster_of(found, pool, None)
    assert (made.num_gpus, made.gpus_per_node, made.nodes_per_leaf) == (56, 8, 4)
    assert (
        "56 GPUs, those in service, of 8xH100-SXM-80GB as Slurm lists it: 8 nodes, 7 in service, 6 free"
        in (made.assumptions)
    )
    assert cluster_of(found, pool, 64).num_gpus == 64
    assert cluster_of(found, pool, 4).gpus_per_node == 4
    with pytest.raises(InputError, match="use 48 at most"):
        cluster_of(found, pool, 64, "now")
    with pytest.raises(InputError, match="use 64 at most"):
        cluster_of(found, pool, 65)


def test_of_uneven_leaves_the_smallest_counts_and_one_leaf_is_none(tmp_path: Path) -> None:
    nodes = f"{HEAD}\n{row('n[1-8]')}\n"
    uneven = TREE.replace("n[1-4]", "n[1-5]").replace("n[5-8]", "n[6-8]")
    found = read(tmp_path, nodes, uneven)
    made = cluster_of(found, found.pool(), None)
    assert made.nodes_per_leaf == 3
    assert any("as the smallest: they join 3 to 5" in note for note in made.assumptions)
    found = read(tmp_path, nodes, "SwitchName=s1 Level=0 Nodes=n[1-8]\n")
    assert cluster_of(found, found.pool(), None).nodes_per_leaf is None


def test_what_is_asked_for_is_read_from_one_word(tmp_path: Path) -> None:
    path = tmp_path / "n.txt"
    path.write_text(f"{HEAD}\n{row('n[1-8]')}\n")
    cluster, pool = cluster_from(f"32@from-slurm:{path}", fits="now")
    assert (cluster.num_gpus, pool.name) == (32, "8xH100-SXM-80GB")
    for wrong, why in [
        ("from-slrum", "did you mean from-slurm"),
        ("from-slurm:", "write from-slurm"),
        ("0@from-slurm", "at least 1 GPU"),
        ("from-slurm:a,,b", "a file has no name"),
        ("from-slurm:-,-", "read once"),
        ("from-slurm:/no/such/file", "no such file"),
        ("8x8@from-slurm", "write from-slurm"),
    ]:
        with pytest.raises(InputError, match=why):
            cluster_from(wrong)
    with pytest.raises(InputError, match="use total, healthy, now"):
        cluster_from(f"from-slurm:{path}", fits="today")
