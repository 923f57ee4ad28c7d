"""Slurm: a batch script with one task on each node, whose nodes lie as the plan has its ranks.

Options as sbatch of Slurm 22.05 and later reads them (``--segment`` since 24.05). What somebody sets goes
into ``#SBATCH`` lines, which sbatch splits at blanks, quotes and ``#`` by rules of its own: only characters
that have no meaning there are let through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import NamedTuple

from planner.errors import InputError
from planner.export.base import Export, NotExpressible, Shell, Subject, by_flags, quoted, setting_of
from planner.export.rendering import rendered
from planner.files import plain
from planner.placement import Placement, block_nodes, place_on, unit_nodes

SCRIPT = "job.sbatch"
TIME = r"\d{1,6}(?::\d\d){0,2}|\d{1,4}-\d{1,2}(?::\d\d){0,2}"
WORD = r"[A-Za-z0-9_.][A-Za-z0-9_.,:@+=/-]*"


class Setting(NamedTuple):
    """What may be set: what it is, how it is written, and the #SBATCH option that takes it, if one does."""

    words: str
    written: str
    option: str = ""


NODES = r"[A-Za-z0-9_.][A-Za-z0-9_.,\[\]-]*"
COUNT = r"[1-9]\d{0,5}"

KNOWN = {
    "partition": Setting("Partition, or several with commas.", WORD, "partition"),
    "account": Setting("Account that is charged.", WORD, "account"),
    "qos": Setting("Quality of service.", WORD, "qos"),
    "reservation": Setting("Reservation to run in.", WORD, "reservation"),
    "time": Setting("Limit, as in 2-00:00:00; the partition's by default.", f"{TIME}|UNLIMITED", "time"),
    "name": Setting("Name of the job; the model and the plan by default.", WORD, "job-name"),
    "constraint": Setting(
        "Features of nodes, as in h100&ib400.", r"[A-Za-z0-9_.\[(][A-Za-z0-9_.,&|*()\[\]+=:-]*", "constraint"
    ),
    "exclude": Setting("Nodes to leave out, as in h100-[003,007].", NODES, "exclude"),
    "chdir": Setting(
        "Folder of the export on the cluster; that of submission by default.",
        r"/[A-Za-z0-9_.,:@+=/-]*",
        "chdir",
    ),
    "signal": Setting(
        "Sent to every task before the time is over, as in TERM@300.",
        r"(?:SIG)?[A-Z][A-Z0-9]*(?:@\d{1,5})?",
        "signal",
    ),
    "cpus-per-task": Setting("CPUs of a node; all of them by default.", COUNT, "cpus-per-task"),
    "mem": Setting("Memory of a node, as in 900G; all of it by default.", r"\d{1,9}[KMGT]?", "mem"),
    "gpu-type": Setting("Slurm's name of the kind of GPU, as in h100; any by default.", r"\w[\w.-]*"),
    "gres": Setting("yes: --gres=gpu:8 in place of --gpus-per-node=8.", "yes|no"),
    "exclusive": Setting("no: others may use what is left of the nodes.", "yes|no"),
    "requeue": Setting("Queued again after a node fails or the job is preempted? yes or no.", "yes|no"),
    "topology": Setting("tree: --switches, as many as the plan needs; block: --segment.", "tree|block"),
    "switches": Setting("Leaf switches at most, in place of those that the plan needs.", COUNT),
    "max-switch-wait": Setting("How long to wait for so few, as in 12:00:00, if the site lets it.", TIME),
    "segment": Setting("Nodes of a segment, in place of a pipeline stage.", COUNT),
    "nodes": Setting(
        "Nodes that are free, as in h100-[1-8]/h100-[9-16]: a slash between leaf switches.",
        f"{NODES}(?:/{NODES})*",
    ),
    "port": Setting("Of the rendezvous; 29500 by default.", r"[1-9]\d{0,4}"),
    "host-suffix": Setting("Behind the name of a node, for its fast network.", r"[A-Za-z0-9.-]+"),
    "setup": Setting("Shell file to read first, for modules and environments.", r"[^-].*"),
    "container": Setting("Image to run in, with the Pyxis plug-in.", r"[^-].*"),
    "container-mounts": Setting("SOURCE:TARGET, further ones after commas.", r"[^-].*"),
}
SETTINGS = {name: one.words for name, one in KNOWN.items()}
"""What may be set, with what it is."""


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A framework's export with ``job.sbatch``; with ``nodes`` set, also where every rank runs.

    Raises NotExpressible for plans that torchrun cannot be told, InputError for settings that are none.
    """
    given = {name: one for name in KNOWN if (one := _checked(name, settings))}
    if subject.plan.num_gpus % subject.per_node:
        whole = subject.plan.num_gpus // subject.per_node * subject.per_node
        raise NotExpressible(
            f"{subject.plan.num_gpus} GPUs are not whole nodes of {subject.per_node}: a task on each node "
            f"starts as many processes everywhere; plan for {whole} GPUs",
            {"gpus": f"{whole // subject.per_node}x{subject.per_node}x{subject.plan.gpu}"},
        )
    if not made.program:
        raise NotExpressible(f"{made.target} names no program that a job could start")
    placement = place_on(subject, given["nodes"]) if "nodes" in given else None
    options = [*_options(subject, given, placement), *_topology(subject, given, placement)]
    script = _script(subject, made, given, options, placement)
    files = {**made.files, SCRIPT: script}
    if placement:
        files |= {"placement.json": placement.to_json()}
    notes = (*made.notes, *_notes(subject, made, given, placement))
    return replace(made, target=f"{made.target},slurm", files=files, notes=notes, submit=("sbatch", SCRIPT))


def _checked(name: str, settings: Mapping[str, str]) -> str:
    """A setting as it was given; empty where it was not. Raises InputError for what Slurm would misread."""
    value = setting_of(settings, name, most=4000 if name == "nodes" else 500)
    if name in settings and not re.fullmatch(KNOWN[name].written, value, re.ASCII):
        raise InputError(f"--set {name}={plain(value)!r}: not {name} as Slurm takes it. {KNOWN[name].words}")
    if name == "port" and value and int(value) > 65535:
        raise InputError(f"--set port={value}: use 1 to 65535")
    return value


def _options(subject: Subject, given: Mapping[str, str], placement: Placement | None) -> Iterator[str]:
    """What is asked of sbatch, but for the network."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", subject.model.name).strip("-.")[:60] or "plan"
    named = {"name": f"{name}-{subject.digest[:8]}", **given}
    yield from (f"--{own.option}={named[key]}" for key, own in KNOWN.items() if own.option and key in named)
    yield f"--nodes={subject.nodes}"
    yield "--ntasks-per-node=1"
    kind = f"{given['gpu-type']}:" if "gpu-type" in given else ""
    if given.get("gres") == "yes":
        yield f"--gres=gpu:{kind}{subject.per_node}"
    else:
        yield f"--gpus-per-node={kind}{subject.per_node}"
    if given.get("exclusive") != "no":
        yield "--exclusive"
        if "mem" not in given:
            yield "--mem=0"
    if "requeue" in given:
        yield "--requeue" if given["requeue"] == "yes" else "--no-requeue"
    yield "--output=%x-%j.out"
    if placement:
        yield f"--nodelist={','.join(placement.nodes)}"


def _topology(subject: Subject, given: Mapping[str, str], placement: Placement | None) -> Iterator[str]:
    """What is asked of the network: few leaf switches, or segments of nodes that lie together."""
    kind = given.get("topology")
    for name, own in (("switches", "tree"), ("max-switch-wait", "tree"), ("segment", "block")):
        if name in given and kind not in (own, None):
            raise InputError(f"--set {name} is of topology={own}: leave out topology={kind}")
    if placement:
        if kind or {"switches", "segment"} & given.keys():
            raise InputError("--set nodes names the nodes: leave out topology, switches and segment")
        return
    if kind == "block" or "segment" in given:
        segment = int(given.get("segment") or segment_nodes(subject))
        if subject.nodes % segment:
            raise InputError(
                f"--set segment={segment}: the job's {subject.nodes} nodes are not whole segments"
            )
        yield f"--segment={segment}"
        return
    switches = int(given["switches"]) if "switches" in given else leaf_switches(subject)
    if switches:
        wait = f"@{given['max-switch-wait']}" if "max-switch-wait" in given else ""
        yield f"--switches={switches}{wait}"
    elif kind == "tree" or "max-switch-wait" in given:
        raise InputError("how many leaf switches? Plan with --nodes-per-leaf, or give --set switches=1")


def leaf_switches(subject: Subject) -> int | None:
    """Leaf switches that the job takes at least, its blocks of nodes whole; None where leaves are unknown."""
    leaf, block = subject.cluster.nodes_per_leaf, block_nodes(subject)
    if not leaf:
        return None
    held = leaf // block * block or leaf
    return ceil(subject.nodes / held)


def segment_nodes(subject: Subject) -> int:
    """Nodes of a segment of Slurm's block topology: a block of the plan, or its largest part in a domain.

    A segment fits into one base block, which is an NVLink domain where that spans nodes.
    """
    block, unit = block_nodes(subject), unit_nodes(subject)
    domain = subject.cluster.domain // subject.cluster.gpus_per_node
    if domain <= 1:
        return block
    fitting = [n for n in range(unit, min(block, domain) + 1, unit) if block % n == 0]
    return max(fitting, default=block)


def _script(
    subject: Subject,
    made: Export,
    given: Mapping[str, str],
    options: Sequence[str],
    placement: Placement | None,
) -> str:
    for name in made.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"{plain(name)!r} cannot be the name of an environment variable")
    task = made.on_node(subject, Shell("$SLURM_PROCID"), Shell("$MASTER_ADDR"), Shell("$MASTER_PORT"))
    return rendered(
        "job.sbatch.jinja",
        trim=True,
        header=made.header(subject),
        options=options,
        nodes=subject.nodes,
        each=subject.per_node,
        files=quoted(made.needed()),
        order=quoted(placement.nodes) if placement else "",
        first=placement.nodes[0] if placement else "",
        suffix=given.get("host-suffix", ""),
        port=given.get("port", "29500"),
        env=[f"{name}={quoted([value])}" for name, value in made.env.items()],
        setup=quoted([given["setup"]]) if "setup" in given else "",
        srun=" ".join(_srun(given, placement)),
        task=quoted([f'exec {quoted(task[: -len(made.program)])} "$@"']),
        launcher=quoted(task[:1]),
        program=[quoted(line) for line in by_flags(made.program)],
    )


def _srun(given: Mapping[str, str], placement: Placement | None) -> Iterator[str]:
    """What srun is told, as words of a shell: all nodes end when one does."""
    yield from ("--kill-on-bad-exit=1", "--wait=60")
    if placement:
        yield from (f"--ntasks={len(placement.nodes)}", "--distribution=arbitrary")
    if "container" in given:
        yield quoted([f"--container-image={given['container']}"])
        here = quoted([Shell("--container-mounts=$PWD:$PWD")])
        yield here + (quoted([f",{given['container-mounts']}"]) if "container-mounts" in given else "")
        yield quoted([Shell("--container-workdir=$PWD")])


def _notes(
    subject: Subject, made: Export, given: Mapping[str, str], placement: Placement | None
) -> Iterator[str]:
    """What the script leaves to others."""
    if (needed := list(made.needed())) and "chdir" not in given:
        names = plain(", ".join(needed), 200)
        yield f"{SCRIPT} runs where it is submitted from, and looks there for {names}: --set chdir=..."
    for name, whose in (("partition", "the site's"), ("time", "the partition's")):
        if name not in given:
            yield f"{name} is {whose} default: --set {name}=..."
    if "gpu-type" not in given:
        kind = plain(subject.plan.gpu)
        yield f"any kind of GPU is taken, the plan is for {kind}: --set gpu-type=..., or constraint=..."
    if "container" in given:
        yield "the container needs the Pyxis plug-in of Slurm; the folder of the files is mounted where it is"
    if given.get("topology") == "block" or "segment" in given:
        yield "--segment is of Slurm 24.05 and later, where the site has its block topology"
    if "max-switch-wait" in given:
        yield "Slurm waits no longer than its max_switch_wait, 5 minutes by default: ask the site"
    if not placement and subject.nodes > 1:
        yield (
            "ranks follow the order of nodes in slurm.conf, where those of a leaf switch mostly follow each "
            "other: --set nodes=... for another"
        )
    if placement:
        yield from placement.notes()
    elif not ({"topology", "switches", "segment"} & given.keys() or subject.cluster.nodes_per_leaf):
        yield (
            "nodes may lie anywhere: plan with --nodes-per-leaf for --switches, or give --set "
            "topology=block, switches=N or nodes=..."
        )
    yield "NCCL_SOCKET_IFNAME and what else the network needs is left to the site's environment"
