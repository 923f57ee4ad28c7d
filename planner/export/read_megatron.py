"""Reads launch scripts and argument files of Megatron-LM: its flags as a plan's options, and what is wrong.

``files`` are a launch script, or a file with the flags alone, and whatever these name; nothing in them is run
(planner/export/shell_words.py). ``given`` are values of variables that they leave open; a name with a dash in
it, ``vocab-size``, is a flag to add.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planner.errors import InputError
from planner.export.imported import Imported
from planner.export.megatron_arguments import Arguments, parse, table, version
from planner.export.megatron_findings import UNFUSED, check
from planner.export.megatron_flags import BY_NAME
from planner.export.read_megatron_model import model_of
from planner.export.read_megatron_options import options_of
from planner.export.shell_expand import shown, unknown_in
from planner.export.shell_words import Command, Script, arguments, is_arguments, read_script
from planner.files import plain

FRAMEWORK = "megatron"
SIGNS = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-layers",
    "--hidden-size",
    "--num-attention-heads",
    "--micro-batch-size",
    "--global-batch-size",
    "--seq-length",
    "--max-position-embeddings",
    "--model-parallel-size",
    "--hybrid-layer-pattern",
)
"""Flags that no other program has together."""
OWN = ("", "pretrain_gpt.py", "pretrain_mamba.py", "pretrain_hybrid.py")
"""Scripts that add no flags of their own."""
COUNTS_GPUS = True
"""``WORLD_SIZE`` is how many GPUs there are, whatever a script starts as it stands."""
OTHERS = (".json", ".toml", ".yaml", ".yml", ".py")


@dataclass(frozen=True)
class Launch:
    """What a job is started with: the script's name, the processes, the environment, the flags' words."""

    words: tuple[str, ...]
    script: str = ""
    env: Mapping[str, str] | None = None  # None: not known, as of a file with the flags alone
    world_size: int | None = None
    per_node: int | None = None
    notes: tuple[str, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)


def recognises(files: Mapping[str, str]) -> bool:
    """Are these Megatron-LM's? Two of its own flags are in one of them."""
    return any(
        sum(re.search(rf"(?<![\w-]){sign}(?![\w-])", text) is not None for sign in SIGNS) >= 2
        for name, text in files.items()
        if not name.lower().endswith(OTHERS)
    )


def read(files: Mapping[str, str], given: Mapping[str, str] | None = None) -> Imported:
    """A configuration in the planner's words. Raises InputError for files that cannot be read, and for flags
    that a plan depends on whose values are not known: it names what to give.
    """
    given = dict(given or {})
    added = {name: given.pop(name) for name in list(given) if "-" in name}
    launch = launch_of({name: text for name, text in files.items()}, given)
    words = list(launch.words)
    for name, value in added.items():
        flag = "--" + name.strip("-")
        if flag not in table():
            raise InputError(f"--set {plain(name)}: no flag of Megatron-LM, and no variable has a dash")
        words += [flag] if table()[flag]["kind"] == "switch" else [flag, value]
    others = [word for word in words if word.startswith(("--deepspeed", "--zero-stage"))]
    found = parse(words, adds=bool(others) or launch.script.rpartition("/")[2] not in OWN)
    for place, text in list(launch.broken.items())[:5]:
        text = f"{text!r} is not read: a quote or bracket may be open"
        found.add("warning", place, text, "close it: bash -n names the line")
    _refuse_open(found)
    for name in found.loose:
        text = "is not known: it may hold further flags, which are not read"
        found.add(
            "warning", shown(f"\ue000{name}\ue001"), text, f"give --set {name}=..., empty if there are none"
        )
    if (counted := _whole(given.get("WORLD_SIZE", ""))) and counted != launch.world_size:
        if launch.world_size:
            text = f"it starts {launch.world_size} processes as it stands, and is judged as if of {counted}"
            found.add("warning", "world size", text, "see that it starts as many")
        launch = replace(launch, world_size=counted, per_node=None)
    model = model_of(found, launch.script)
    options = options_of(found, model, launch.world_size)
    if all((launch.env or {}).get(name) == "0" for name in UNFUSED):
        options["option"] = ["attention=eager", *options["option"][1:]]
    if others:
        text = "is Megatron-DeepSpeed's: what DeepSpeed shares out is not read here"
        found.add("warning", shown(others[0]), text, "give --sharding zero1, zero2 or zero3")
    check(found, model, options, launch.world_size, launch.env)
    return Imported(
        framework=FRAMEWORK,
        options=options,
        model=model,
        world_size=launch.world_size,
        per_node=launch.per_node,
        findings=tuple(found.findings),
        unread=(*launch.notes, *_unread(found)),
        target="megatron",
        settings=frozenset(found.names.values()) | frozenset(launch.env or ()),
    )


def _refuse_open(found: Arguments) -> None:
    """Raises InputError where a flag that a plan depends on has a value that is not known."""
    planned = {
        flag: names
        for flag, names in found.open.items()
        if flag in BY_NAME and not BY_NAME[flag].of.startswith("run.")
    }
    if not planned:
        return
    said = ", ".join(
        f"{flag} is {' and '.join('$' + n.lstrip('$') for n in names)}"
        for flag, names in list(planned.items())[:8]
    )
    names = dict.fromkeys(name for names in planned.values() for name in names)
    able = [name for name in names if re.fullmatch(r"\w+", name)]
    fix = " ".join(f"--set {name}=..." for name in able[:8])
    instead = " ".join(f"--set {flag[2:]}=..." for flag in list(planned)[:3])
    raise InputError(f"values that are not known: {plain(said, 400)}: give {fix or instead}")


def _unread(found: Arguments) -> list[str]:
    """Flags that change nothing that is planned."""
    dests = {table()[flag]["dest"] for flag in BY_NAME if flag in table()}
    dests |= {table()[flag]["dest"] for flag in CHECKED if flag in table()}
    return [
        f"{found.names[dest]} {shown(' '.join(map(str, value if isinstance(value, list) else [value])))}"
        if not isinstance(value, bool)
        else found.names[dest]
        for dest, value in found.values.items()
        if dest not in dests
    ]


CHECKED = (
    "--use-mcore-models",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
    "--use-flash-attn",
    "--attention-backend",
    "--use-torch-fsdp2",
    "--use-rotary-position-embeddings",
    "--moe-layer-recompute",
    "--main-grads-dtype",
    "--main-params-dtype",
    "--fp8-param-gather",
    "--no-position-embedding",
    "--fine-grained-activation-offloading",
)
"""Flags that are read beside those of the table."""


# The command


def launch_of(files: Mapping[str, str], given: Mapping[str, str]) -> Launch:
    """What starts the job. Raises InputError where no file has a command with Megatron-LM's flags."""
    lists = {name: text for name, text in files.items() if is_arguments(text)}
    scripts = {name: text for name, text in files.items() if name not in lists}
    found: list[tuple[Command, Script, str]] = []
    read: list[Script] = []
    for name, text in scripts.items():
        if name.lower().endswith(OTHERS):
            continue
        script = read_script(name, text, given, files)
        read.append(script)
        found += [(command, script, name) for command in script.commands]
    best = max(found, key=lambda one: (_flags(one[0].words), one[0].sure), default=None)
    if best is not None and _flags(best[0].words) >= 2:
        return _started(best[0], best[1], found)
    if lists:
        words = [word for name, text in lists.items() for word in arguments(name, text)]
        start = max(found, key=lambda one: _starts(one[0].words), default=None)
        if start is not None and _starts(start[0].words):
            own = _started(start[0], start[1], [])
            return Launch((*words, *_extra(own.words)), own.script, own.env, own.world_size, own.per_node)
        return Launch(tuple(words))
    for script in read:
        if set_only := _of_variables(script):
            return set_only
    notes = [f"{place}: {text!r} is no bash" for script in read for place, text in script.broken.items()]
    notes += dict.fromkeys(note for script in read for note in script.notes)
    why = f": {'; '.join(notes[:4])}" if notes else ""
    shown_names = ", ".join(plain(name) for name in files)
    raise InputError(f"{shown_names}: no command with Megatron-LM's flags{why}")


def _of_variables(script: Script) -> Launch | None:
    """The flags that a script only sets, for another one to run with."""
    words: list[str] = []
    names: list[str] = []
    for name, own in sorted(script.variables.items(), key=lambda one: -_flags(one[1])):
        new = {word.partition("=")[0] for word in own if word in table()} - set(words)
        if _flags(own) >= 2 and new:
            words += own
            names.append(name)
    if not names:
        return None
    note = f"there is no command: the flags in {', '.join('$' + name for name in names[:8])} are read"
    return Launch(tuple(words), notes=(note, *script.notes), broken=script.broken)


def _flags(words: Sequence[str]) -> int:
    return sum(word.partition("=")[0] in table() for word in words)


def _starts(words: Sequence[str]) -> int:
    return sum(word.rpartition("/")[2] in ("torchrun", "srun") or word.endswith(".py") for word in words)


def _extra(words: Sequence[str]) -> list[str]:
    """Words behind those that stand for the file of flags."""
    return [word for word in words if not unknown_in(word)]


def _started(command: Command, script: Script, others: Sequence[tuple[Command, Script, str]]) -> Launch:
    words = list(command.words)
    place = _script_at(words)
    before, after = (words[:place], words[place + 1 :]) if place is not None else _cut(words)
    name = words[place] if place is not None else ""
    world, each = processes(before, script.slurm, command.env)
    notes = (
        [f"taken as not set: {', '.join('$' + name for name in script.unset[:30])}"] if script.unset else []
    )
    notes += script.notes
    if not command.sure:
        notes.append(f"line {command.line}: whether this command runs is not known")
    more = [c for c, *_ in others if c is not command and _flags(c.words) >= 5 and c.words != command.words]
    if more:
        lines = ", ".join(str(c.line) for c in more[:10])
        notes.append(f"there are other training commands, on lines {lines}: line {command.line}'s is read")
    if world is None and before:
        open_names = dict.fromkeys(n for word in before for n in unknown_in(word))
        if open_names:
            notes.append(f"how many processes start is not known, for {', '.join(open_names)}")
    return Launch(tuple(after), name, dict(command.env), world, each, tuple(notes), script.broken)


def _script_at(words: Sequence[str]) -> int | None:
    """Where the words of the program begin that torchrun or python starts."""
    for place, word in enumerate(words):
        if word.endswith(".py") and not word.rpartition("/")[2].startswith("launch"):
            return place
        follows = words[place + 1 : place + 2]
        if word in ("-m", "--module") and follows and not follows[0].startswith("torch.distributed"):
            return place + 1
    return None


def _cut(words: list[str]) -> tuple[list[str], list[str]]:
    start = next((i for i, w in enumerate(words) if w.partition("=")[0] in table()), len(words))
    return words[:start], words[start:]


def processes(
    words: Sequence[str], slurm: Mapping[str, str], env: Mapping[str, str]
) -> tuple[int | None, int | None]:
    """Processes in all and on a node, as torchrun, srun, mpirun or Slurm's job are told; None: not said."""
    told = _launcher_options(words)
    nodes = told.get("nnodes") or _whole(slurm.get("nodes", ""))
    each = told.get("nproc-per-node") or _whole(slurm.get("ntasks-per-node", ""))
    if not told.get("nproc-per-node") and (each or 1) == 1 and _starts_one(words):
        each = None
    gpus = (slurm.get("gpus-per-node") or slurm.get("gres", "")).rpartition(":")[2]
    if each is None and (told or slurm) and not _torchrun(words):
        each = _whole(gpus)
    if nodes is None and each and _torchrun(words):
        nodes = 1 if "--nnodes" not in told else None
        if any(word.partition("=")[0] in ("--nnodes", "--num_nodes") for word in words):
            nodes = None
    total = told.get("ntasks") if not _torchrun(words) else None
    if total is None and nodes and each:
        total = nodes * each
    if total is None:
        total = _whole(slurm.get("ntasks", "")) if not _torchrun(words) else None
    if total is None and not _torchrun(words):
        total = _whole(env.get("WORLD_SIZE", ""))
    if total and each is None and nodes and not total % nodes:
        each = total // nodes
    return total, each if each and total and each <= total else None


def _torchrun(words: Sequence[str]) -> bool:
    return any(
        word.rpartition("/")[2] in ("torchrun", "deepspeed") or word.startswith("torch.distributed")
        for word in words
    )


def _starts_one(words: Sequence[str]) -> bool:
    return _torchrun(words)


LAUNCHERS = {
    "--nnodes": "nnodes",
    "--num_nodes": "nnodes",
    "--nproc-per-node": "nproc-per-node",
    "--num_gpus": "nproc-per-node",
    "--nodes": "nnodes",
    "-N": "nnodes",
    "--ntasks": "ntasks",
    "-n": "ntasks",
    "-np": "ntasks",
    "--ntasks-per-node": "nproc-per-node",
}


def _launcher_options(words: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    torch = _torchrun(words)
    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--nproc"):
            name = name.replace("_", "-")
        key = LAUNCHERS.get(name)
        if key is None or (torch and name in ("--ntasks-per-node", "--ntasks", "-n")):
            continue
        number = _whole((value if equals else after).rpartition(":")[2])
        if number:
            found[key] = number
    return found


def _whole(text: Any) -> int | None:
    text = str(text)
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text[:9]) < 10**8 else None


__all__ = ["FRAMEWORK", "launch_of", "processes", "read", "recognises", "version"]
