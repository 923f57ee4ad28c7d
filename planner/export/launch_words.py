"""How a script starts its processes, and what it gives them: of deepspeed, accelerate and torchrun."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from planner.export.shell_words import Command, read_script

SCRIPTS = (".sh", ".bash", ".sbatch", ".slurm", ".txt", ".cmd")
GPUS = ("num_gpus", "nproc_per_node")
NODES = ("num_nodes", "nnodes", "num_machines")
ALONE = frozenset(("multi_gpu", "use_fsdp", "use_deepspeed", "use_megatron_lm", "no_python", "no_local_rank"))
"""Launchers' flags that take no value."""
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
LENGTHS = ("seq_length", "max_seq_length", "max_seq_len", "max_length", "model_max_length", "block_size")
"""Arguments of scripts that are the length of a sequence."""


@dataclass(frozen=True)
class Launch:
    """A launcher's flags and its script's, by name with ``_`` for ``-``; flags without a value are empty."""

    launcher: str = ""
    flags: Mapping[str, str] = field(default_factory=dict)
    script: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)

    @property
    def per_node(self) -> int | None:
        """Processes on a node."""
        found = next((number(self.flags[name]) for name in GPUS if name in self.flags), None)
        if found is None and (places := self.flags.get("include")):
            _, _, gpus = places.partition("@")[0].partition(":")
            found = len(gpus.split(",")) if gpus else None
        if found is None and self.launcher == "accelerate" and self.nodes:
            world = number(self.flags.get("num_processes", ""))
            found = world // self.nodes if world else None
        return found

    @property
    def nodes(self) -> int | None:
        """Nodes; one where nothing is said."""
        found = next((self.flags[name] for name in NODES if name in self.flags), "1")
        return number(found)

    @property
    def world_size(self) -> int | None:
        """Processes in all."""
        if self.launcher == "accelerate":
            return number(self.flags.get("num_processes", ""))
        return self.per_node * self.nodes if self.per_node and self.nodes else None

    @property
    def seq_length(self) -> int | None:
        """Tokens of a sequence, if the script is told."""
        return next((number(self.arguments[name]) for name in LENGTHS if name in self.arguments), None)


def launch_of(files: Mapping[str, str], given: Mapping[str, str]) -> Launch:
    """What the first command of a launcher says; an empty one where no file has any."""
    for words in _commands(files, given):
        if found := _launched(words):
            return found
    return Launch()


def number(text: str) -> int | None:
    """A whole number of a word; None for what is not known."""
    return int(text) if re.fullmatch(r"\d{1,9}", text.strip()) else None


def _launched(words: Sequence[str]) -> Launch | None:
    for index, word in enumerate(words):
        name = word.rsplit("/", 1)[-1]
        rest = list(words[index + 1 :])
        if name in LAUNCHERS:
            if name == "accelerate":
                if rest[:1] != ["launch"]:
                    continue
                rest = rest[1:]
            return _parsed(name, rest)
        if name == "-m" and rest[:1] in (["torch.distributed.run"], ["torch.distributed.launch"]):
            return _parsed("torchrun", rest[1:])
    return None


def _parsed(launcher: str, words: list[str]) -> Launch:
    flags: dict[str, str] = {}
    while words and words[0].startswith("-"):
        name, equals, value = words.pop(0).lstrip("-").replace("-", "_").partition("=")
        if name in ("m", "module"):
            break
        if not equals and name not in ALONE and words and not words[0].startswith("-"):
            value = words.pop(0)
        flags[name] = value
    script = words.pop(0) if words else ""
    return Launch(launcher, flags, script, arguments_of(words))


def arguments_of(words: Sequence[str]) -> dict[str, str]:
    """A script's arguments by name; of a name with several values, all of them with spaces between.

    >>> arguments_of(["--bf16", "True", "--deepspeed", "--lr=1e-4"])
    {'bf16': 'True', 'deepspeed': '', 'lr': '1e-4'}
    """
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, _, value = word[2:].partition("=")
            name = key.replace("-", "_")
            found[name] = value
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return found


def _commands(files: Mapping[str, str], given: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """Words of the commands of scripts, those that surely run first."""
    found: list[Command] = []
    for name, text in files.items():
        if name.endswith(SCRIPTS) or text.startswith("#!"):
            found += read_script(name, text, given, files).commands
    for command in sorted(found, key=lambda one: not one.sure):
        yield command.words
