"""What an exporter is given, and what it gives: from a plan to files, environment and command."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any

from planner import __version__
from planner.defaults import Job
from planner.errors import InputError
from planner.files import plain
from planner.plan import Plan
from planner.specs import ClusterSpec, ModelSpec
from planner.told import one_way
from planner.units import gib
from strategies.layout import Layout


class NotExpressible(InputError):
    """What a target cannot be told. ``instead`` are options of ``planner estimate`` that it could be.

    They are as :func:`planner.asked.options_text` has them: ``option`` maps names to values.
    """

    def __init__(self, message: str, instead: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.instead = dict(instead or {})


class Shell(str):
    """A word that a shell expands, such as ``$SLURM_NODEID``: the exporter's own, never a user's."""


@dataclass(frozen=True)
class Subject:
    """A plan with the model and the cluster that it was made for: what is exported."""

    model: ModelSpec
    cluster: ClusterSpec
    plan: Plan

    @cached_property
    def job(self) -> Job:
        """The job that the plan is of, with its framework's tables."""
        from planner.api import job_for

        return job_for(self.model, self.cluster, self.plan.training, self.layout)

    @cached_property
    def layout(self) -> Layout:
        """The plan's degrees."""
        return self.plan.layout.to_layout()

    @property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of the plan's JSON, but for how it was found."""
        return hashlib.sha256(self.plan.model_dump_json(exclude={"proof"}).encode()).hexdigest()[:12]

    @property
    def nodes(self) -> int:
        """Nodes that the job takes, the last one perhaps in part."""
        return ceil(self.plan.num_gpus / self.per_node)

    @property
    def per_node(self) -> int:
        """Processes on a node."""
        return min(self.cluster.gpus_per_node, self.plan.num_gpus)

    def options(self) -> dict[str, str]:
        """The framework's own choices of kernels and buffers, all of them."""
        return dict(self.job.training.options)

    def recompute(self, target: str) -> tuple[str, int | None]:
        """The policy that layers run under, and how many of each chunk do; None stands for all of them.

        Raises NotExpressible where stages differ or policies other than none are mixed: few frameworks can
        be told so.
        """
        if (way := one_way([stage.rows for stage in self.plan.stages])) is not None:
            return way
        ways = {name.partition("+")[0] for stage in self.plan.stages for name in stage.recompute}
        policy = "full" if "full" in ways else max(ways - {"none"})
        most = max(sum(stage.rows.get(policy, ())) for stage in self.plan.stages)
        counts = Counter(stage.recompute.get(policy, 0) for stage in self.plan.stages)
        shown = ", ".join(f"{n} on {stages} stages" for n, stages in sorted(counts.items()))
        told = f"{target} recomputes the same layers on every stage: the plan has {shown}"
        raise NotExpressible(plain(told, 300), {"recompute": f"{policy}:{most}"})

    def doubts(self) -> Iterator[str]:
        """What speaks against the plan's own figures: those that its layout has today are others.

        It was changed by hand then, or written by another version of the planner.
        """
        from planner.overheads import device_bytes
        from planner.plan import priced_again
        from planner.replay import StageReplay

        prices, rows = priced_again(self.job, self.plan)
        for index, stage in enumerate(self.plan.stages):
            pools = StageReplay(prices, index, rows).run().pools
            peak = float(device_bytes(self.job, self.layout, pools, "value"))
            if abs(stage.peak_bytes - peak) > 0.001 * peak:
                yield (
                    f"stage {index} of the plan has a peak of {gib(stage.peak_bytes)} GiB, its layout one of "
                    f"{gib(round(peak))}: it was changed, or is of another version: plan it again"
                )
                return

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers on each stage."""
        return tuple(stage.layers for stage in self.plan.stages)

    def header(self, comment: str = "# ", also: Sequence[str] = ()) -> str:
        """Comment lines on top of a file: where it comes from, what is predicted, what it cannot say.

        Everything that somebody wrote is made printable and put on one line: it cannot leave the comment.
        """
        plan, layout = self.plan, self.layout
        lines = [
            f"planner {__version__}, plan {self.digest}: {plain(self.model.name, 200)} on {plan.num_gpus} x "
            f"{plain(plan.gpu, 100)} as {layout.describe()}",
            f"predicted peak {gib(plan.peak_bytes)} GiB ({gib(plan.least_bytes)} to {gib(plan.most_bytes)})"
            f" of {gib(plan.capacity_bytes)}, {plan.verdict}; {plan.step_time_s:.3g} s a step",
            *also,
            *(f"assumed: {one}" for one in plan.assumptions),
            *(f"warning: {one}" for one in plan.warnings),
        ]
        return "".join(f"{comment}{plain(line, 1000)}".rstrip() + "\n" for line in lines)


@dataclass(frozen=True)
class Export:
    """What an exporter makes of a plan.

    ``files`` by name, of which ``by_hand`` are what ``program`` is, for those who start nodes by hand;
    ``env`` of every process; ``program`` is what is started on every GPU (the script and its arguments) and
    ``launcher`` what starts it on a node: ``torchrun``, or ``accelerate`` with the file that configures it;
    ``submit`` hands the files to a scheduler. ``notes`` say what the files cannot: to be read before the job
    is queued.
    """

    target: str
    version: str
    files: Mapping[str, str]
    by_hand: tuple[str, ...] = field(default=(), kw_only=True)
    env: Mapping[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ()
    launcher: str = "torchrun"
    launcher_options: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    submit: tuple[str, ...] = ()  # what hands the files to a scheduler, which then starts the nodes
    submit_inside: bool = False  # in their folder

    def needed(self) -> Iterator[str]:
        """Files that are looked for where the job starts: the program, and those of ours that it names."""
        words = (*self.launcher_options, *self.program)
        yield from (name for name in self.files if any(name in word for word in words))
        yield from (one for one in self.program[:1] if one not in self.files and one[:1] not in ("/", "-"))

    def header(self, subject: Subject, comment: str = "# ") -> str:
        """The header of what a scheduler is handed, with the version and with what the files cannot say."""
        also = (f"for {self.target} {self.version}", *(f"note: {one}" for one in self.notes))
        return subject.header(comment, also)

    def on_node(self, subject: Subject, node_rank: str, address: str, port: str = "29500") -> tuple[str, ...]:
        """The command that starts a node's processes, their ranks being ``node_rank`` times its GPUs and on.

        Rendezvous is static: torchrun's c10d backend numbers nodes as they come (pytorch/pytorch#137402),
        and ranks would not be where the plan has them. Words that a shell is to expand are :class:`Shell`.
        """
        nodes, each = str(subject.nodes), str(subject.per_node)
        if self.launcher == "accelerate":
            place = ("--machine_rank", node_rank, "--main_process_ip", address, "--main_process_port", port)
            return ("accelerate", "launch", *self.launcher_options, *place, *self.program)
        place = ("--node-rank", node_rank, "--master-addr", address, "--master-port", port)
        return (
            *("torchrun", "--nnodes", nodes, "--nproc-per-node", each),
            *place,
            *self.launcher_options,
            *self.program,
        )


def quoted(words: Iterable[str]) -> str:
    """Words as a POSIX shell takes them; those that it is to expand in double quotes.

    >>> quoted(["echo", "$HOME", Shell("$SLURM_NODEID"), "a'b"])
    'echo \\'$HOME\\' "$SLURM_NODEID" \\'a\\'"\\'"\\'b\\''
    """
    import shlex

    return " ".join(f'"{word}"' if isinstance(word, Shell) else shlex.quote(word) for word in words)


def by_flags(words: Iterable[str]) -> list[list[str]]:
    """A command's words, each flag with its values; before the first flag what comes first.

    >>> by_flags(["train.py", "--lr", "1e-4", "--bf16"])
    [['train.py'], ['--lr', '1e-4'], ['--bf16']]
    """
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return [line for line in lines if line]


def setting_of(settings: Mapping[str, str], name: str, default: str = "", most: int = 500) -> str:
    """What somebody set, of one line of bounded length. Raises InputError."""
    value = settings.get(name, default)
    if len(value) > most or not value.isprintable():
        raise InputError(
            f"--set {name}={plain(value)!r}: use one line of at most {most} printable characters"
        )
    return value


def settings_of(texts: Sequence[str], keep_case: bool = False) -> dict[str, str]:
    """Settings of ``["partition=h100"]``; variables of a shell ``keep_case``. Raises InputError.

    >>> settings_of(["image=registry/train:1", "time=2-00:00:00"])
    {'image': 'registry/train:1', 'time': '2-00:00:00'}
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"--set {plain(text)}: write NAME=VALUE, as in partition=h100")
        if name in found:
            raise InputError(f"--set {plain(name)} is given twice: keep one")
        found[name.strip() if keep_case else name.strip().lower()] = value
    return found
