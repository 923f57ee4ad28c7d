"""Times the commands as whole processes, as ratios to what they must at least do, in one run.

    python benchmarks/run.py [runs]

Prints a Markdown table; docs/performance.md holds one with the machine it was taken on.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from planner import ClusterSpec, ModelSpec, TrainingSpec
from planner.bounds import quick_bound
from planner.defaults import resolve
from planner.layouts import enumerate_layouts
from planner.stages import price

PLANNER = str(Path(sys.executable).with_name("planner"))
IMPORTS = [sys.executable, "-c", "import typer, rich.table, pydantic, networkx, pulp, highspy"]
TYPER = [sys.executable, "-c", "import typer, rich"]
HEADLINE = [PLANNER, "search", "--model", "llama-65b", "--gpus", "64x80G"]
LARGEST = [PLANNER, "search", "--model", "llama-3-405b", "--gpus", "16384xH100"]
WIDEST = [*LARGEST, "--framework", "torchtitan", "--global-batch-size", "131072"]

WRITING = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""The environment in which the first, unmeasured run leaves bytecode, as an installation does."""


def seconds(command: list[str]) -> float:
    """Wall-clock seconds of one process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=WRITING)
    return time.perf_counter() - start


def pair(command: list[str], base: list[str], runs: int) -> tuple[float, float, float]:
    """Medians of two commands run in turn, and of the ratios pair by pair."""
    seconds(command), seconds(base)
    pairs = [(seconds(command), seconds(base)) for _ in range(runs)]
    ratios = [a / b for a, b in pairs]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return medians[0], medians[1], statistics.median(ratios)


def pricing(wanted: int = 1_000_000) -> tuple[int, float]:
    """Layouts enumerated, priced and bounded, and the seconds that took, one job after another."""
    gc.set_threshold(100_000)  # as the command does
    model, cluster = ModelSpec.from_catalog("llama-3-405b"), ClusterSpec.parse("16384xH100")
    count, batch, start = 0, 2**17, time.perf_counter()
    while count < wanted:
        training = TrainingSpec(seq_length=8192, global_batch_size=batch, framework="torchtitan")
        job = resolve(model, cluster, training)
        for family in enumerate_layouts(job).families:
            quick_bound(price(job, family))
            count += len(family.data_parallel)
        batch += 2**15
    return count, time.perf_counter() - start


def main() -> None:
    """Prints every figure beside its bar."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print("| what | median | of | ratio | bar |")
    print("|---|---|---|---|---|")
    for name, command, base, bar in (
        ("headline search, whole process", HEADLINE, IMPORTS, "3 x, aiming at 2 x"),
        ("`planner --help`", [PLANNER, "--help"], TYPER, "1.5 x"),
    ):
        ours, theirs, ratio = pair(command, base, runs)
        print(f"| {name} | {ours:.3f} s | {theirs:.3f} s | {ratio:.2f} | {bar} |")
    for name, command in (
        ("16,384 GPUs, Llama 3 405B, megatron", LARGEST),
        ("the same, torchtitan, batch 131,072", WIDEST),
    ):
        seconds(command)
        wall = statistics.median(seconds(command) for _ in range(max(3, runs // 2)))
        proof = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        words = " ".join(proof.split())
        layouts = words[: words.rindex(" layouts: ")].rsplit(" ", 1)[-1]
        state = "proved optimal" if "proved optimal" in words else "not proved"
        print(f"| {name}: {layouts} layouts | {wall:.3f} s | | | 3 s, aiming at 1.5 s; {state} |")
    count, wall = pricing()
    print(f"| pricing alone, {count:,} layouts | {wall:.2f} s | | {count / wall:,.0f} a second | 100,000 |")


if __name__ == "__main__":
    main()
