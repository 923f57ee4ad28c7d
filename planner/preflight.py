"""Shows an export to the framework that is installed, and compares what it understands with the plan.

A *probe* (planner/probes) is a script that imports nothing of the planner: it is run by the interpreter that
will train, reads a case as JSON from standard input and answers one line of JSON. No GPU is used and none is
needed: process groups are torch's fake ones, modules lie on the meta device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.export.base import Export, Subject
from planner.files import plain
from planner.rank_parameters import rank_parameters

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


def preflight(subject: Subject, made: Export, python: str) -> Preflight:
    """An export before the framework of an interpreter, ``python``.

    Raises InputError where there is no probe for the target, or the interpreter has no such framework.
    """
    if made.target not in PROBES:
        raise InputError(f"preflight of {made.target}: it can be asked of {', '.join(PROBES)}")
    probe = PROBES[made.target]
    case, answer = probe.case(subject, made), dict[str, Any]()
    for script in probe.scripts(made.version):
        answer |= asked(script, case, python)
        version = plain(f"{made.target} {answer.get('version', made.version)}", 100)
        if not answer["ok"]:
            return Preflight(made.target, version, plain(str(answer["error"]), 600), ())
    return Preflight(made.target, version, "", tuple(probe.checks(subject, answer)))


def asked(script: str, case: Mapping[str, Any], python: str) -> dict[str, Any]:
    """What a probe answers. Raises InputError where the interpreter cannot be run or gives no answer."""
    probe = Path(__file__).parent / "probes" / f"{script}.py"
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
            raise InputError(f"{plain(python)} gave no answer within {LIMIT_S} s") from None
    lines = [line for line in done.stdout[-MOST_BYTES:].splitlines() if line.startswith("{")]
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        if missing := re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", said):
            raise InputError(
                f"{plain(python)} has no {missing[1]}: run this where you train, or name its interpreter "
                "with --python"
            ) from None
        raise InputError(f"{plain(python)} gave no answer; it said: {plain(said, 300)}") from None
    return answer


def _layout_of(subject: Subject) -> dict[str, Any]:
    """The plan's numbers, by the planner's names."""
    layout = subject.layout
    names = ("tensor_parallel", "pipeline_parallel", "data_parallel", "context_parallel", "expert_parallel")
    numbers = {name: getattr(layout, name) for name in (*names, "micro_batch_size", "grad_accum")}
    return numbers | {"global_batch_size": layout.global_batch_size, "seq_length": subject.job.seq_length}


def _compared(subject: Subject, read: Mapping[str, Any]) -> Iterator[Check]:
    """What was read of the plan's numbers beside them."""
    for name, value in _layout_of(subject).items():
        if name in read:
            yield Check(name.replace("_", " "), value, read[name])


def _first_ranks(subject: Subject) -> list[int]:
    """The first rank of every pipeline stage."""
    return [stage * int(subject.layout.stride("pp")) for stage in range(len(subject.plan.stages))]


def _megatron_case(subject: Subject, made: Export) -> dict[str, Any]:
    blackwell = (subject.cluster.gpu.compute_capability or 0) >= 10
    return {
        "words": list(made.program[1:]),
        "env": dict(made.env),
        "world": subject.plan.num_gpus,
        "arch": 10 if blackwell else 9,
        "ranks": _first_ranks(subject),
    }


def _of_megatron(subject: Subject, answer: Mapping[str, Any]) -> Iterator[Check]:
    read = {
        "tensor_parallel": answer["tensor_model_parallel_size"],
        "pipeline_parallel": answer["pipeline_model_parallel_size"],
        "data_parallel": answer["data_parallel_size"],
        "context_parallel": answer["context_parallel_size"],
        "expert_parallel": answer["expert_model_parallel_size"],
        "micro_batch_size": answer["micro_batch_size"],
        "grad_accum": answer["micro_batches"],
        "global_batch_size": answer["global_batch_size"],
        "seq_length": answer["seq_length"],
    }
    yield from _compared(subject, read)
    for stage, rank in enumerate(_first_ranks(subject)):
        chunks = answer["counts"][str(rank)]
        layers = subject.plan.stages[stage].layers
        yield Check(f"layers of rank {rank}", layers, sum(count for _, count in chunks))
        own = rank_parameters(subject, stage)
        yield Check(f"parameters of rank {rank}", own, sum(count for count, _ in chunks))


def _torchtitan_case(subject: Subject, made: Export) -> dict[str, Any]:
    text = next(iter(made.files.values()))
    return {"toml": text, "recipe": text, "world": subject.plan.num_gpus, "ranks": _first_ranks(subject)}


def _of_torchtitan(subject: Subject, answer: Mapping[str, Any]) -> Iterator[Check]:
    dims = answer["dims"]
    read = {
        "tensor_parallel": dims["tp"],
        "pipeline_parallel": dims["pp"],
        "data_parallel": dims["dp_replicate"] * dims["dp_shard"],
        "context_parallel": dims["cp"],
        "expert_parallel": dims["ep"],
        "micro_batch_size": answer["micro"],
        "grad_accum": answer["accumulated"],
        "global_batch_size": answer["batch"],
        "seq_length": answer["seq"],
    }
    yield from _compared(subject, read)
    if "local" in answer:
        from planner.export.torchtitan_shards import local_parameters

        for rank, count in zip(_first_ranks(subject), answer["local"], strict=True):
            yield Check(f"parameters of rank {rank}", local_parameters(subject, rank), count)


def _deepspeed_case(subject: Subject, made: Export) -> dict[str, Any]:
    layout = subject.layout
    config = json.loads(made.files["ds_config.json"])
    parts = layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel
    return {"config": config, "world": subject.plan.num_gpus, "parts": parts}


def _of_deepspeed(subject: Subject, answer: Mapping[str, Any]) -> Iterator[Check]:
    names = ("global_batch_size", "micro_batch_size", "grad_accum")
    yield from _compared(subject, dict(zip(names, answer["batch"], strict=True)))
    stages = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
    yield Check("ZeRO stage", stages.get(subject.layout.sharding), answer["stage"])


def _accelerate_case(subject: Subject, made: Export) -> dict[str, Any]:
    return {"files": dict(made.files), "world": subject.layout.data_parallel}


def _of_accelerate(subject: Subject, answer: Mapping[str, Any]) -> Iterator[Check]:
    yield Check("processes", subject.plan.num_gpus, answer["processes"])
    yield Check("machines", subject.nodes, answer["machines"])
    arguments, mesh = answer["arguments"], answer["mesh"]
    read = {
        "tensor_parallel": mesh.get("tp", 1),
        "micro_batch_size": arguments["per_device_train_batch_size"],
        "grad_accum": arguments["gradient_accumulation_steps"],
    }
    yield from _compared(subject, read)


@dataclass(frozen=True)
class Probe:
    """How a framework is asked: the scripts for a version, the case, and what of the answer is compared."""

    scripts: Callable[[str], Sequence[str]]
    case: Callable[[Subject, Export], dict[str, Any]]
    checks: Callable[[Subject, Mapping[str, Any]], Iterator[Check]]


PROBES = {
    "megatron": Probe(lambda version: ["megatron"], _megatron_case, _of_megatron),
    "torchtitan": Probe(
        lambda version: ["torchtitan02", "torchtitan_shards"] if version == "0.2" else ["torchtitan03"],
        _torchtitan_case,
        _of_torchtitan,
    ),
    "deepspeed": Probe(lambda version: ["deepspeed"], _deepspeed_case, _of_deepspeed),
    "accelerate": Probe(lambda version: ["accelerate"], _accelerate_case, _of_accelerate),
}
"""Targets whose framework can be asked."""
