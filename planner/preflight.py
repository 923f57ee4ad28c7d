"""Shows an export to the framework that is installed, and compares what it understands with the plan.

A *probe* (planner/probes) is a script that imports nothing of the planner: it is run by the interpreter that
will train, reads a case as JSON from standard input and answers one line of JSON. No GPU is used and none is
needed: process groups are torch's fake ones, modules lie on the meta device.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.export.base import Export, Subject
from planner.files import plain

PROBES = ("megatron", "torchtitan", "deepspeed", "accelerate", "pytorch")
"""Targets whose framework can be asked."""
LIMIT_S = 600
MOST_BYTES = 1_000_000


@dataclass(frozen=True)
class Check:
    """One thing that the plan says, and what the framework makes of the export."""

    what: str
    planned: Any
    found: Any

    @property
    def holds(self) -> bool:
        """Is it the same?"""
        return bool(self.planned == self.found)


@dataclass(frozen=True)
class Preflight:
    """What came of it: ``problem`` is the framework's own refusal, empty where it takes the export."""

    target: str
    version: str
    problem: str
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Does the framework take the export, and mean the plan by it?"""
        return not self.problem and bool(self.checks) and all(check.holds for check in self.checks)

    def document(self) -> dict[str, Any]:
        """The outcome as JSON."""
        checks = [asdict(check) | {"holds": check.holds} for check in self.checks]
        own = {"target": self.target, "version": self.version, "problem": self.problem, "checks": checks}
        return {"schema": "planner.preflight/1", "holds": self.holds, **own}


def planned(subject: Subject) -> dict[str, Any]:
    """What a framework should read of any export, by the planner's names."""
    layout, training = subject.layout, subject.job.training
    return {
        "world_size": subject.plan.num_gpus,
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.pipeline_parallel,
        "data_parallel": layout.data_parallel,
        "context_parallel": layout.context_parallel,
        "expert_parallel": layout.expert_parallel,
        "chunks": layout.chunks,
        "micro_batch_size": layout.micro_batch_size,
        "grad_accum": layout.grad_accum,
        "global_batch_size": layout.global_batch_size,
        "seq_length": training.seq_length,
        "sequence_parallel": layout.sequence_parallel,
    }


def preflight(subject: Subject, made: Export, python: str) -> Preflight:
    """An export before the framework of an interpreter, ``python``.

    Raises InputError where there is no probe for the target, or the interpreter has no such framework.
    """
    if made.target not in PROBES:
        raise InputError(f"preflight of {made.target}: it can be asked of {', '.join(PROBES)}")
    from planner.rank_parameters import first_ranks, held_parameters

    ranks = first_ranks(subject)
    case = {
        "files": dict(made.files),
        "program": list(made.program),
        "env": dict(made.env),
        "world_size": subject.plan.num_gpus,
        "per_node": subject.per_node,
        "ranks": ranks,
    }
    answer = asked(made.target, case, python)
    if missing := answer.get("missing"):
        raise InputError(
            f"{plain(python)} has no {plain(str(missing))}: run this where you train, or name its "
            "interpreter with --python"
        )
    expected = planned(subject) | dict(made.expects)
    read = answer.get("read", {})
    checks = [Check(name, expected[name], read[name]) for name in expected if name in read]
    counts = answer.get("parameters", {})
    if counts:
        for stage, rank in enumerate(ranks):
            own = held_parameters(subject, made.target, stage)
            checks.append(Check(f"parameters of rank {rank}", own, counts.get(str(rank))))
    version, problem = plain(str(answer.get("version", "")), 100), plain(str(answer.get("error", "")), 2000)
    return Preflight(made.target, version, problem, tuple(checks))


def asked(target: str, case: Mapping[str, Any], python: str) -> dict[str, Any]:
    """What a probe answers. Raises InputError where the interpreter cannot be run or gives no answer."""
    probe = Path(__file__).parent / "probes" / f"{target}.py"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [python, str(probe)],
                input=json.dumps([case]),
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
                cwd=folder,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        except OSError as error:
            raise InputError(f"--python {plain(python)} cannot be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise InputError(f"{target} gave no answer within {LIMIT_S} s") from None
    lines = [line for line in done.stdout[-MOST_BYTES:].splitlines() if line.startswith("{")]
    if not lines:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise InputError(f"{target} gave no answer in {plain(python)}; it said: {plain(said[0], 300)}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
