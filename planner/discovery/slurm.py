"""Nodes of Slurm, from what sinfo and scontrol print: as text or JSON, of 22.05 and later.

Fields and states are those of sinfo(1) and scontrol(1); GPUs are its generic resource ``gpu`` (gres.conf(5)).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.discovery.captures import Capture, Command, count_of, documents, inner, items, word
from planner.discovery.inventory import Collected, Found
from planner.discovery.kinds import slice_of
from planner.discovery.slurm_topology import expand, leaves_of_line, leaves_of_yaml
from planner.errors import InputError
from planner.files import plain

COLUMNS = "NodeList:|,Partition:|,StateLong:|,Gres:|,GresUsed:|,Features:|,Reason:|"
COMMANDS = (
    Command(("sinfo", "-N", "-O", COLUMNS)),
    Command(("scontrol", "show", "topology"), optional=True),
)
HEADINGS = {
    "NODELIST": "name",
    "PARTITION": "partition",
    "STATE": "state",
    "GRES": "gres",
    "GRES_USED": "used",
    "AVAIL_FEATURES": "features",
    "ACTIVE_FEATURES": "features",
    "REASON": "reason",
}
"""Columns of ``sinfo -O`` by their headings."""
WITHOUT_HEADINGS = ("name", "state", "gres", "used", "features", "reason")
SUFFIXES = {
    "*": "NOT_RESPONDING",
    "~": "POWERED_DOWN",
    "#": "POWERING_UP",
    "!": "POWER_DOWN",
    "%": "POWERING_DOWN",
    "$": "MAINT",
    "@": "REBOOT_REQUESTED",
    "^": "REBOOT_ISSUED",
    "-": "PLANNED",
    "+": "COMPLETING",
}
"""What sinfo appends to a state: sinfo(1), NODE STATE CODES."""
OUT = {
    "DOWN": "down",
    "ERROR": "error",
    "FAIL": "fail",
    "FAILING": "failing",
    "INVAL": "invalid registration",
    "INVALID_REG": "invalid registration",
    "NOT_RESPONDING": "not responding",
    "NO_RESPOND": "not responding",
    "UNKNOWN": "unknown",
    "FUTURE": "future",
    "MAINT": "maintenance",
    "MAINTENANCE": "maintenance",
    "REBOOT_ISSUED": "rebooting",
}
"""States of nodes that are out of service."""
HELD = {
    "RESERVED": "reserved",
    "PLANNED": "planned for another job",
    "BLOCKED": "blocked",
    "COMPLETING": "completing",
    "POWERING_DOWN": "powering down",
    "POWER_DOWN": "powering down",
    "REBOOT_REQUESTED": "to be rebooted",
    "PERFCTRS": "counters in use",
}
"""States of nodes that are in service and yet take no job now."""
DRAIN = {"DRAIN", "DRAINED", "DRAINING"}
BUSY = {"ALLOCATED": "allocated", "MIXED": "mixed"}
FINE = {"IDLE", *BUSY, *DRAIN, "CLOUD", "POWERED_DOWN", "POWERING_UP", "POWER_UP", "DYNAMIC_NORM"}
FINE |= {"DYNAMIC_FUTURE", "RES", "EXTERNAL", "RUN"}


@dataclass(frozen=True)
class Row:
    """A node in Slurm's words. ``used`` is None where nobody said."""

    name: str
    states: frozenset[str]
    gres: str
    used: str | None
    features: tuple[str, ...]
    reason: str
    partitions: frozenset[str]
    drained: str = ""


def collect(captures: Sequence[Capture]) -> Collected:
    """Nodes of the captures, with the switches or blocks that they lie under. Raises InputError."""
    rows: dict[str, Row] = {}
    leaves: dict[str, str] = {}
    blocks = False
    for capture in captures:
        found, above = _read(capture)
        blocks = blocks or bool(above and re.search(r"^BlockName=|^\s*block\s*:", capture.text, re.M))
        leaves |= above
        for row in found:
            rows[row.name] = _same_node(rows[row.name], row) if row.name in rows else row
    if not rows:
        raise InputError(f"{captures[0].name}: no nodes: give what this prints: {COMMANDS[0].shown}")
    notes = [] if leaves else ["nothing is said of switches: give scontrol show topology too"]
    if any("MIXED" in row.states and row.used is None for row in rows.values()):
        notes.append(f"whose GPUs are used is not said, none counts as free: {COMMANDS[0].shown} says it")
    return Collected("Slurm", [_found(row) for row in rows.values()], leaves, None, tuple(notes), blocks)


def _same_node(before: Row, row: Row) -> Row:
    """A node that is listed again, as it is for each of its partitions."""
    if (before.states, before.gres, before.used) != (row.states, row.gres, row.used):
        raise InputError(f"node {row.name} is listed twice, with differences: give one capture of each node")
    return replace(before, partitions=before.partitions | row.partitions)


def _read(capture: Capture) -> tuple[list[Row], dict[str, str]]:
    start = capture.text.lstrip()
    if start.startswith(("{", "[")):
        return [row for one in documents(capture) for row in _of_json(one, capture.name)], {}
    if re.match(r"(?:#.*\n|---\s*\n|\s)*-?\s*topology:", start):
        return [], leaves_of_yaml(capture)
    return _of_text(capture)


def _of_text(capture: Capture) -> tuple[list[Row], dict[str, str]]:
    """Rows and leaves of the lines of sinfo, scontrol show node and scontrol show topology."""
    rows: list[Row] = []
    leaves: dict[str, str] = {}
    columns: Sequence[str] = WITHOUT_HEADINGS
    record: list[str] = []
    for number, line in enumerate(capture.text.splitlines(), 1):
        where = f"{capture.name}, line {number}"
        if record and (not line.strip() or line.startswith("NodeName=")):
            rows.append(_of_record("\n".join(record), where))
            record = []
        if not line.strip() or line.startswith(("#", "AggregatedBlock=", "BlockSizes=")):
            continue
        if line.startswith("NodeName="):
            record = [line]
        elif record:
            record.append(line)
        elif line.startswith(("SwitchName=", "BlockName=")):
            leaves = leaves_of_line(line, where) | leaves
        elif "|" not in line:
            raise InputError(
                f"{where}: {plain(line)} is not understood: give what {COMMANDS[0].shown} prints"
            )
        elif line.split("|")[0].strip().upper() == "NODELIST":
            columns = [HEADINGS.get(one.strip().upper(), "") for one in line.rstrip("|").split("|")]
            if missing := {"name", "state", "gres"} - set(columns):
                raise InputError(f"{where}: no column {', '.join(sorted(missing))}: use {COMMANDS[0].shown}")
        else:
            rows += _of_line(line, columns, where)
    if record:
        rows.append(_of_record("\n".join(record), capture.name))
    return rows, leaves


def _of_line(line: str, columns: Sequence[str], where: str) -> list[Row]:
    """A line of sinfo; a reason, the last, may hold a bar of its own."""
    cells = line.split("|", len(columns) - 1)
    if len(cells) < len(columns):
        raise InputError(
            f"{where}: {len(cells)} columns in place of {len(columns)}: give the output unchanged"
        )
    row = {name: cell.rstrip("|").strip() for name, cell in zip(columns, cells, strict=True)}
    partition = row.get("partition", "").rstrip("*")
    made = Row(
        "",
        _states(row["state"]),
        row["gres"],
        row.get("used"),
        _words(row.get("features")),
        _reason(row.get("reason")),
        frozenset({plain(partition)} if partition else ()),
    )
    return [replace(made, name=plain(name, 253)) for name in expand(row["name"], where)]


def _of_record(text: str, where: str) -> Row:
    """A node of `scontrol show node`, on one line or several. Names come before what people write."""
    pairs: dict[str, str] = {}
    found = list(re.finditer(r"(?:^|\s)([A-Z]\w+)=", text))
    for match, end in zip(found, [*(one.start() for one in found[1:]), len(text)], strict=True):
        pairs.setdefault(match[1], text[match.end() : end].strip())
    if "State" not in pairs:
        raise InputError(f"{where}: node {plain(pairs.get('NodeName', ''))} has no State: give it unchanged")
    used = pairs.get("GresUsed")
    if used is None and (tres := re.search(r"gres/gpu=(\d{1,6})(?:,|$)", pairs.get("AllocTRES", ""))):
        used = f"gpu:{tres[1]}"
    elif used is None and "gres/gpu" in pairs.get("CfgTRES", ""):
        used = "gpu:0"
    reason = re.sub(r"\s*\[[^\]]*@[^\]]*\]\s*$", "", pairs.get("Reason", ""))
    return Row(
        plain(pairs["NodeName"], 253),
        _states(pairs["State"]),
        pairs.get("Gres", ""),
        used,
        _words(pairs.get("AvailableFeatures")),
        _reason(reason),
        frozenset(map(plain, _words(pairs.get("Partitions")))),
        pairs.get("GresDrain", ""),
    )


def _of_json(document: dict[str, Any], where: str) -> list[Row]:
    """Nodes of scontrol's and sinfo's JSON: ``nodes`` with a row each, or ``sinfo`` with rows of several."""
    if isinstance(document.get("nodes"), list):
        return [_of_node(one) for one in items(document["nodes"])]
    if not isinstance(document.get("sinfo"), list):
        raise InputError(f"{where}: no nodes in it: give sinfo --json or scontrol show nodes --json")
    rows = []
    for one in items(document["sinfo"]):
        names = inner(one, "nodes", "nodes")
        names = [word(name) for name in names] if isinstance(names, list) else []
        states = inner(one, "node", "state")
        used = word(inner(one, "gres", "used"))
        shared = len(names) > 1 and "MIXED" in _state_words(states)  # whose of them the GPUs are is not said
        partition = word(inner(one, "partition", "name"))
        reason = inner(one, "reason", "description") or inner(one, "reason")
        row = Row(
            "",
            _state_words(states),
            word(inner(one, "gres", "total")),
            None if shared else used,
            _words(inner(one, "features", "total")),
            _reason(reason),
            frozenset({partition} if partition else ()),
        )
        rows += [replace(row, name=name) for name in names if name]
    return rows


def _of_node(one: Mapping[str, Any]) -> Row:
    name = word(one.get("name"))
    if not name:
        raise InputError("a node without a name: give the output of scontrol or sinfo unchanged")
    used = one.get("gres_used")
    return Row(
        name,
        _state_words(one.get("state"), one.get("state_flags")),
        word(one.get("gres")),
        word(used) if isinstance(used, str) else None,
        _words(one.get("features")),
        _reason(one.get("reason")),
        frozenset(_words(one.get("partitions"))),
        word(one.get("gres_drained")),
    )


def _states(text: str) -> frozenset[str]:
    """Words of a state: of ``mixed#`` as of ``IDLE+CLOUD+POWERED_DOWN``."""
    bare = text.strip().rstrip("".join(SUFFIXES))
    more = {SUFFIXES[one] for one in text.strip()[len(bare) :]}
    return frozenset({part.strip().upper() for part in bare.split("+") if part.strip()} | more)


def _state_words(*given: Any) -> frozenset[str]:
    words: set[str] = set()
    for one in given:
        for text in one if isinstance(one, list) else [one]:
            words |= _states(text) if isinstance(text, str) else set()
    return frozenset(words)


def _words(value: Any) -> tuple[str, ...]:
    """Words of a list, or of a text with commas between them."""
    if isinstance(value, list):
        return tuple(word(one) for one in value if word(one))
    text = value if isinstance(value, str) else ""
    return tuple(plain(one) for one in text.split(",") if one.strip() and one.strip() != "(null)")


def _reason(value: Any) -> str:
    text = plain(value, 100) if isinstance(value, str) else ""
    return "" if text.lower() in ("none", "(null)", "n/a") else text


def gres_of(text: str, where: str) -> dict[str, int]:
    """GPUs of a generic resource by type; ``gpu`` stands for none.

    >>> gres_of("gpu:nvidia_h200:4(S:0-1),mps:400", "n1"), gres_of("gpu:8", "n1")
    ({'nvidia_h200': 4}, {'gpu': 8})
    """
    found: dict[str, int] = {}
    for one in re.split(r",(?![^(]*\))", text):
        plainly = re.sub(r"^gres[/:]|\((?!null\)).*", "", one.strip())  # newer versions may write gres/gpu
        name, *rest = plainly.split(":")
        if name != "gpu":
            continue
        number = rest.pop() if rest and re.fullmatch(r"-?\d+", rest[-1]) else "1"
        kind = ":".join(rest).replace("(null)", "") or "gpu"
        found[kind] = found.get(kind, 0) + count_of(number, f"node {where}, GRES {plain(text)}")
    return found


def _number(text: str, where: str, *names: str) -> int:
    """How many of generic resources of other names."""
    numbers = re.findall(rf"(?:^|,)(?:{'|'.join(names)})(?::[^:,()]+)?:(\d{{1,6}})", text)
    return sum(count_of(one, f"node {where}") for one in numbers)


def _found(row: Row) -> Found:
    """A node with its GPUs counted."""
    kinds = gres_of(row.gres, row.name)
    label, gpus = next(iter(kinds.items()), ("gpu", 0))
    gpus = sum(kinds.values()) if kinds else gpus
    refused = next((why for kind in kinds if (why := slice_of(kind))), "")
    if not kinds and _number(row.gres, row.name, "shard", "mps"):
        gpus, refused = 1, "GPUs that are given out in parts (shard, MPS): a process has a GPU to itself"
    if len(kinds) > 1 and not refused:
        label, refused = (
            "+".join(sorted(kinds)),
            "GPUs of several kinds in one node: plan on nodes of one kind",
        )
    state, out, held = _judged(row)
    used = None if row.used is None else sum(gres_of(row.used, row.name).values())
    shared = row.used is not None and bool(_number(row.used, row.name, "shard", "mps"))
    lost = min(gpus, sum(gres_of(row.drained, row.name).values())) if row.drained else 0
    busy = shared or bool(row.states & {*BUSY, "DRAINING"})
    free = 0 if out or held or shared or "ALLOCATED" in row.states else gpus - lost
    if free and "MIXED" in row.states:
        free = max(0, free - used) if used is not None else 0
    elif free and used:
        free, busy = max(0, free - used), True
    why = ", ".join(filter(None, (out or held or ("in use" if busy else ""), row.reason)))
    return Found(
        name=row.name,
        label=label,
        gpus=gpus,
        healthy=0 if out else gpus - lost,
        free=free,
        busy=busy,
        state=state,
        why=why,
        features=row.features,
        partitions=row.partitions,
        refused=refused,
    )


def _judged(row: Row) -> tuple[str, str, str]:
    """A node's state in words, what puts it out of service and what holds it back, if anything does."""
    words = row.states
    base = next((name for state, name in BUSY.items() if state in words), "idle")
    if not words & {"IDLE", *BUSY, *DRAIN, *OUT, *HELD}:
        return (", ".join(sorted(words)).lower() or "unknown",) * 2 + ("",)
    if words & {"POWERING_UP", "POWERED_DOWN", "POWER_UP"}:
        words = words - {"NOT_RESPONDING", "NO_RESPOND"}  # it is not there yet to respond
    out = next((name for state, name in OUT.items() if state in words), "")
    if words & DRAIN:
        out = out or ("draining" if words & {*BUSY, "DRAINING", "COMPLETING"} else "drained")
        return out, out, ""
    held = next((name for state, name in HELD.items() if state in words), "")
    if base == "idle" and words & {"POWERING_UP", "POWER_UP"}:
        held = held or "powering up"  # jobs wait until it is there; to one that is off they are given at once
    if strange := words - FINE - set(OUT) - set(HELD):
        out = out or ", ".join(sorted(strange)).lower()
    return out or held or base, out, held
