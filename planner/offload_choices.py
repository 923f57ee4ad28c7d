"""Which offload a framework runs: what may be chosen from, and why the rest may not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from planner.defaults import Job
from planner.errors import InputError
from planner.offload import MOMENTS_ON_HOST, offloading_of
from planner.stacks import STACKS
from strategies.layout import Layout
from strategies.offload import OFFLOADS, PLACES, Way, places_of


def canonical(text: str) -> str:
    """An offload of a whole model in the one way it is written; raises InputError for what is none.

    >>> canonical("Parameters,optimizer:NVMe")
    'optimizer:nvme,parameters'
    """
    found: dict[str, str] = {}
    for item in text.lower().replace(" ", "").split(","):
        name, _, place = item.partition(":")
        if name not in OFFLOADS or place not in ("", *PLACES):
            allowed = ", ".join(OFFLOADS)
            raise InputError(f"offload {item[:40]!r}: use {allowed}, each with :nvme if it goes there")
        if name == "activations" and place == "nvme":
            raise InputError("offload activations:nvme is not modelled: use activations")
        if found.setdefault(name, place) != place:
            raise InputError(f"offload {name} is given twice")
    return written({name: place or "host" for name, place in found.items()})


def written(places: dict[str, str]) -> str:
    """Places as they are written in a layout."""
    return ",".join(name + ":nvme" * (places[name] == "nvme") for name in OFFLOADS if name in places)


def offload_problems(job: Job, layout: Layout) -> Iterator[str]:
    """Why the framework cannot offload what a layout has of the whole model, and what it can."""
    if not layout.offload:
        return
    stack, named = job.stack, layout.offload
    able = offloading_of(stack, layout).whole
    if named not in able:
        others = {
            s: name for s, one in stack.offloading.items() for name in one.whole if s in stack.shardings
        }
        here = f"use offload {' or '.join(able)}" if able else ""
        there = [f"sharding {s} with {name}" for s, name in others.items() if s != layout.sharding]
        frameworks = [
            f"framework {name}"
            for name, other in STACKS.items()
            if name != stack.name and any(named in one.whole for one in other.offloading.values())
        ]
        fix = ", or ".join([part for part in (here, *there) if part] or frameworks) or "none"
        yield f"{stack.name} with {layout.sharding} does not offload {named}: {'use ' * (not here)}{fix}"
        return
    if layout.sharding == "fsdp" and np.any(np.asarray(layout.pipeline_parallel) > 1):
        yield f"{stack.name} offloads {named} without a pipeline only: use pipeline_parallel 1"
    if layout.schedule == "pipedream":
        yield "pipedream updates after every micro-batch, which is not modelled with an offload: use 1f1b"
    if "nvme" in named and not job.cluster.nvme_bytes:
        yield f"offload {named}: say how much NVMe a node has, with --nvme 10TB"
    if job.training.optimizer not in MOMENTS_ON_HOST:
        known = ", ".join(MOMENTS_ON_HOST)
        yield f"offload {named}: {job.training.optimizer} is not planned on the host: use optimizer {known}"
    elif not job.recipe.master + job.recipe.moment * MOMENTS_ON_HOST[job.training.optimizer]:
        yield f"offload {named}: {job.training.optimizer} without master weights has no states to offload"


def offloads(job: Job, family: Layout, wanted: Sequence[str]) -> list[str]:
    """What of the whole model may be offloaded, of the items that are wanted: nothing, too."""
    items = [item for item in wanted if not item.startswith("activations")]
    found = [""]
    for count in range(1, len(items) + 1):
        for chosen in combinations(items, count):
            places = places_of(",".join(chosen))
            if len(places) < count:  # the same item in two places
                continue
            text = written(places)
            if not any(offload_problems(job, replace(family, offload=text))):
                found.append(text)
    return found


def menus(job: Job, family: Layout, policies: Sequence[str], wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """Sets of ways that the layers of a layout may be run in, side by side.

    Megatron offloads no activations beside recomputation; DeepSpeed those that recomputation keeps.
    Single layers offload without a pipeline's chunks only, activations without a pipeline.
    """
    ways = tuple(job.stack.policies_with(family.schedule, policies))
    offloading = offloading_of(job.stack, family)
    alone = [item for item in wanted if item in offloading.layers]
    found = [ways]
    if "activations" in alone and not np.any(np.asarray(family.pipeline_parallel) > 1):
        if offloading.checkpoints:
            if "full" in ways:
                found.append(tuple("full+activations" if way == "full" else way for way in ways))
        elif "none" in ways and job.model.num_hidden_layers > 1:
            found.append(("none", "none+activations"))
    plain = family.schedule in ("1f1b", "gpipe")
    if (
        "optimizer" in alone
        and not family.offload
        and plain
        and not any(offload_problems(job, replace(family, offload="optimizer")))
    ):
        found += [(*menu, *(_with(way, "optimizer") for way in menu)) for menu in found]
    return found


def _with(way: str, item: str) -> str:
    one = Way.of(way)
    return str(Way(one.recompute, (item, *one.offload)))


def activation_problem(job: Job, layout: Layout, recompute: str) -> str:
    """Why activations cannot be offloaded under a layout and a recompute policy (or auto); else empty."""
    stack, offloading = job.stack, offloading_of(job.stack, layout)
    if "activations" not in offloading.layers:
        able = [
            f"framework {other.name}" + (f" with option {variant.replace(':', '=')}" if variant else "")
            for other in STACKS.values()
            for variant, one in {
                "": other,
                **{v: other.under(dict([v.split(":")])) for v in other.variants},
            }.items()
            if any("activations" in own.layers for own in one.offloading.values())
        ]
        return f"{stack.name} with {layout.sharding} offloads no activations that are modelled: use {able[0]}"
    if layout.pipeline_parallel > 1:
        return "offload activations: no framework is known to with a pipeline: use pipeline_parallel 1"
    if offloading.checkpoints and recompute not in ("full", "auto"):
        return (
            f"{stack.name} offloads what recompute full keeps (cpu_checkpointing): use recompute full or auto"
        )
    if not offloading.checkpoints and recompute not in ("none", "auto"):
        return f"{stack.name} offloads activations without recomputation only: use recompute none or auto"
    if not offloading.checkpoints and job.model.num_hidden_layers < 2:
        return f"{stack.name} offloads the activations of fewer than all layers: of one layer, none"
    return ""
