"""The commands of a bash script with their words, read as data: nothing in it is executed.

Assignments, arrays, defaults, arithmetic, functions, loops, tests and files that are given too are followed
as bash would. Where a test's outcome is not known, both ways are: what they set alike counts, of the rest
what they have in common. What is not known is marked in a command's words
(:func:`~planner.export.shell_expand.unknown_in`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.export.shell_commands import Reader
from planner.export.shell_text import arguments as arguments
from planner.export.shell_text import checked
from planner.export.shell_text import is_arguments as is_arguments
from planner.export.shell_walk import Command as Command

DIRECTIVE = re.compile(r"^#SBATCH[ \t]+(.*)$", re.M)


@dataclass(frozen=True)
class Script:
    """What was read of a script.

    ``slurm`` are its ``#SBATCH`` options by name; ``variables`` what it leaves in them, as words; ``unset``
    those that were taken as not set; ``notes`` what could not be followed.
    """

    commands: tuple[Command, ...]
    slurm: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_script(
    name: str, text: str, given: Mapping[str, str] | None = None, files: Mapping[str, str] | None = None
) -> Script:
    """The commands of a script. ``given`` are values that it does not say itself: of variables, and of ``1``,
    ``2`` ... on its command line; ``files`` others that it may name. Raises InputError for what is no script,
    is too large, or does not end.
    """
    slurm = directives(text)
    known = {**_of_slurm(slurm), **(given or {})}
    reader = Reader(known, {**(files or {}), name: text}, set(given or {}))
    reader.script = name
    reader.read(checked(name, text))
    words = {
        name: tuple(word for text in value.values() for word in text.split())
        for name, value in reader.variables.items()
    }
    return Script(tuple(reader.commands), slurm, words, tuple(reader.unset), tuple(reader.notes))


def directives(text: str) -> dict[str, str]:
    """The options of ``#SBATCH`` lines by name.

    >>> directives("#SBATCH --nodes=4 --exclusive\\n#SBATCH -N 8")
    {'nodes': '8', 'exclusive': ''}
    """
    short = {"-N": "nodes", "-n": "ntasks", "-G": "gpus", "-c": "cpus-per-task"}
    found: dict[str, str] = {}
    for line in DIRECTIVE.findall(text)[:500]:
        words = line.split("#")[0].split()
        for word, after in zip(words, [*words[1:], ""], strict=False):
            key, equals, value = word.partition("=")
            if key[:2] in short and not key.startswith("--"):
                found[short[key[:2]]] = key[2:] or value or after
            elif key.startswith("--"):
                found[key[2:]] = value if equals or after.startswith("-") else after
    return found


def _of_slurm(slurm: Mapping[str, str]) -> dict[str, str]:
    """The variables that Slurm sets of a job's own options."""
    found: dict[str, str] = {}
    nodes, tasks = slurm.get("nodes", ""), slurm.get("ntasks-per-node", "")
    gpus = (slurm.get("gpus-per-node") or _gres(slurm.get("gres", ""))).rpartition(":")[2]
    for names, value in (
        (("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), nodes),
        (("SLURM_NTASKS_PER_NODE",), tasks),
        (("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"), gpus),
        (("SLURM_NTASKS", "SLURM_NPROCS"), slurm.get("ntasks", "")),
    ):
        if value.isdigit():
            found |= dict.fromkeys(names, value)
    if nodes.isdigit() and tasks.isdigit():
        found.setdefault("SLURM_NTASKS", str(int(nodes[:9]) * int(tasks[:9])))
    return found


def _gres(text: str) -> str:
    return next((one for one in text.split(",") if one.startswith("gpu:")), "")
