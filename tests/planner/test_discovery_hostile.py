"""Captures that are large, deep, contradictory or made to be shown: all of them end in one plain line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from planner.cli import app
from planner.discovery import asked_of, discover
from planner.discovery.kubernetes import LEAVES
from planner.errors import InputError
from tests.helpers import ANYTHING, places, replaced
from tests.planner.test_discovery import HEAD, TREE, json_2205, read, row
from tests.planner.test_discovery_sources import H200, RAY, device, node, pod, queue

SOURCES = ("slurm", "k8s", "ray")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        '{"nodes": ' + "[" * 100_000,
        "null",
        "[1, 2]",
        '{"nodes": 3}',
        '{"nodes": [null, 3, "x", {}]}',
        '{"kind": "List", "items": [{"kind": "Node"}]}',
        '{"nodes": [{"name": 5, "gres": {"a": 1}}]}',
        '{"a": NaN}',
        '{"a": ' + "9" * 5000 + "}",
        "\x00\x01\x02",
        "a|b",
        "a|b|c|d|e|f|g|h|i",
        "NodeName=",
        "NodeName=n1 State",
        "NODELIST|STATE|\nn1|idle|",
        "- topology: &a x\n- *a",
        "- topology: {{{",
        "- topology: x\n  tree: 5",
        "SwitchName=s1 Nodes=n[1-99999999999]",
        "SwitchName=s1 Nodes=n[1-999999999]",
        "SwitchName=s1 Nodes=" + "[1]" * 5000,
        "SwitchName=s1 Nodes=[1-1000][1-1000][1-1000]",
        "Node: x\n Usage:\n  nan/inf GPU",
        "Node: x\n Usage:\n  1.2.3/8.0 GPU",
        "Node: x\n Usage:\n  0.0/99999999999999999999.0 GPU",
    ],
)
def test_what_is_no_capture_is_refused(tmp_path: Path, source: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, text, source=source)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "gres", ["gpu:h100:-8", "gpu:h100:99999999", "gpu:h100:2000", "gpu:h100:1" + "0" * 300]
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, gres: str) -> None:
    with pytest.raises(InputError, match="n1"):
        read(tmp_path, f"{HEAD}\n{row('n1', gres=gres)}\n")


def test_names_are_shown_as_plain_text(tmp_path: Path) -> None:
    evil = "n\x1b1\x07\u202e"
    path = tmp_path / "n.txt"
    lines = [row("n2"), row(evil, "drained", reason="\x1b]0;title\x07 $(reboot) `id`")]
    lines.append(row("n3", gres="gpu:\x1b[5mfast:8", features="\x1b[0m"))
    path.write_text("\n".join([HEAD, *lines]))
    for more in ([], ["--json"]):
        shown = CliRunner().invoke(app, ["cluster", f"from-slurm:{path}", *more]).output
        assert "\x1b" not in shown
        assert "\x07" not in shown
        assert "$(reboot)" in shown


def test_twice_the_same_node_with_differences_is_refused_and_without_is_one(tmp_path: Path) -> None:
    other = row("n1", gres="gpu:h100:4")
    with pytest.raises(InputError, match="twice"):
        read(tmp_path, f"{HEAD}\n{row('n1')}\n{other}\n")
    assert len(read(tmp_path, f"{HEAD}\n{row('n1')}\n{row('n1')}\n").pools[0].nodes) == 1


def test_a_large_capture_is_read_in_seconds_and_a_larger_one_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    found = read(tmp_path, "\n".join([HEAD, *(row(f"n{n}") for n in range(1, 20_001))]))
    assert len(found.pools[0].nodes) == 20_000
    assert time.monotonic() - start < 20
    with pytest.raises(InputError, match="200,000"):
        read(tmp_path, f"{HEAD}\n{row('a[1-150000]')}\n{row('b[1-150000]')}\n")
    monkeypatch.setattr("planner.discovery.captures.MOST_BYTES", 100)
    with pytest.raises(InputError, match="read up to 100"):
        read(tmp_path, f"{HEAD}\n{row('n1')}\n" * 3)


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=200), st.sampled_from(SOURCES))
def test_any_text_is_an_inventory_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, source: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "capture"
    path.write_text(f"{HEAD}\n{text}" if source == "slurm" else text)
    try:
        discover(asked_of(f"from-{source}:{path}"))
    except InputError as error:
        said = str(error)
    else:
        said = ""
    assert said.isprintable()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MANY = {
    "slurm": [
        {"nodes": [json_2205("n1", "mixed", ["CLOUD"], "gpu:h100:3")]},
        {"nodes": [{"name": "n1", "state": ["IDLE", "DRAIN"], "features": ["80g"], "gres": "gpu:h100:8"}]},
        {"sinfo": [{"nodes": {"nodes": ["n1"]}, "node": {"state": ["IDLE"]}, "gres": {"total": "gpu:h100:8"},
                    "features": {"total": "80g"}, "partition": {"name": "a"},
                    "reason": {"description": "b"}}]},
        [{"topology": "main", "cluster_default": True, "block": {"blocks": [{"block": "b", "nodes": "n1"}]},
          "tree": {"switches": [{"switch": "s", "nodes": "n[1-2]"}]}}],
    ],
    "k8s": [
        node("a", labels={LEAVES[0]: "r1"}, taints=[("k", "v", "NoSchedule")]),
        node("a", gpus=0, resources={"nvidia.com/mig-1g.10gb": "7"}),
        {"kind": "List", "items": [node("a"), pod("a", 3, first=(1, (1,)))]},
        {"kind": "List", "items": [node("a"), queue("team", "28", "8")]},
        {"kind": "List", "items": [
            node("a", gpus=0, labels=dict.fromkeys(H200, "")), pod(None, 0),
            {"kind": "ResourceSlice", "spec": {"driver": "gpu.nvidia.com", "nodeName": "a",
                                               "pool": {"name": "a"}, "devices": [device("g")]}},
            {"kind": "ResourceClaim", "status": {"allocation": {
                "devices": {"results": [{"pool": "a", "device": "g", "driver": "gpu.nvidia.com"}]}}}}]},
    ],
    "ray": [*RAY, {"nodes": RAY, "available": {"aa": {"GPU": 3.0}}}],
}  # fmt: skip
"""What the commands of each source print, with every part that is read."""


def understood_or_refused(path: Path, source: str, document: Any) -> None:
    files = [path]
    if isinstance(document, list) and source == "slurm":
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        files.append(path.with_name("nodes"))
        files[1].write_text(f"{HEAD}\n{row('n1')}\n")
    else:
        path.write_text(json.dumps(document))
    try:
        discover(asked_of(f"from-{source}:{','.join(map(str, files))}"))
    except InputError as error:
        said = str(error)
    else:
        said = ""
    assert said.isprintable()


@pytest.mark.parametrize("source", SOURCES)
def test_a_value_of_each_kind_in_each_place_is_an_inventory_or_an_input_error(
    tmp_path: Path, source: str
) -> None:
    for document in MANY[source]:
        for place in places(document):
            for value in ANYTHING:
                understood_or_refused(tmp_path / "capture", source, replaced(document, place, value))


@settings(deadline=None, max_examples=300)
@given(st.data(), VALUES)
def test_any_value_in_any_place_is_an_inventory_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: object
) -> None:
    source = data.draw(st.sampled_from(SOURCES))
    document = data.draw(st.sampled_from(MANY[source]))
    place = data.draw(st.sampled_from(list(places(document))))
    path = tmp_path_factory.mktemp("changed") / "capture"
    understood_or_refused(path, source, replaced(document, place, value))


def test_commands_run_only_where_no_file_is_named_without_a_shell_and_with_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(name: str, text: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    table = f"{HEAD}\n{row('n[1-8]')}\n"
    (tmp_path / "table").write_text(table)
    (tmp_path / "tree").write_text(TREE)
    program("sinfo", f'echo "$*" > {tmp_path}/words; cat {tmp_path}/table')
    program("scontrol", f"cat {tmp_path}/tree")
    found = discover(asked_of("from-slurm"))
    assert found.pools[0].leaves() == {"s1": 4, "s2": 4}
    assert (tmp_path / "words").read_text().startswith("-N -O NodeList:|,")
    program("scontrol", "echo no topology >&2; exit 1")
    assert discover(asked_of("from-slurm")).pools[0].leaves() == {}
    program("sinfo", "exit 0")
    with pytest.raises(InputError, match="says nothing"):
        discover(asked_of("from-slurm"))
    program("sinfo", "echo '\x1b[31mno controller' >&2; exit 3")
    with pytest.raises(
        InputError, match=r"failed with 3: .*no controller; run elsewhere sinfo -N -O .* > 1.txt"
    ):
        discover(asked_of("from-slurm"))
    monkeypatch.setattr("planner.discovery.captures.MOST_BYTES", 1000)
    program("sinfo", "exec yes")
    with pytest.raises(InputError, match="no end within"):
        discover(asked_of("from-slurm"))
    monkeypatch.setattr("planner.discovery.captures.LONGEST", 0.2)
    program("sinfo", "exec sleep 60")
    with pytest.raises(InputError, match="no end within"):
        discover(asked_of("from-slurm"))
    with pytest.raises(InputError, match=r"ray cannot be run here .*from-ray:1.txt"):
        discover(asked_of("from-ray"))
