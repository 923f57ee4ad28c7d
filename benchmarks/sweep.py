"""A sweep of 1,000 points against its bar, 60 s on two cores, and in the CPU time of headline searches.

    python benchmarks/sweep.py [JOBS]

Wall-clock time depends on what else runs; CPU time over that of the headline search, measured before and
after, does so less. Then it is killed halfway and gone on with: the file must be the same to the byte.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLANNER = [sys.executable, "-c", "from planner.cli import app; app()"]
HEADLINE = [*PLANNER, "search", "--model", "llama-65b", "--gpus", "64x80G"]
SWEEP = [*PLANNER, "sweep", "--model", "llama-65b", "--gpus", "8..1024xA100-80G", "--tokens", "1.4T", "-q"]
SWEEP += ["--seq-length", "1024..16384", "--memory-budget", "32GiB..80GiB..2GiB"]
POINTS = 1000


def timed(command: list[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command and its own children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def headline(runs: int = 5) -> float:
    """CPU seconds of the headline search, the whole process."""
    return sorted(timed(HEADLINE)[1] for _ in range(runs))[runs // 2]


def killed_and_resumed(folder: Path, jobs: str) -> tuple[int, float]:
    """Rows that there were when it was killed, and the seconds of going on from there."""
    output = folder / "resumed.csv"
    command = [*SWEEP, "--jobs", jobs, "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    rows = folder / "resumed.csv.rows"
    while not rows.exists() or rows.read_text().count("\n") < POINTS // 2:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = rows.read_text().count("\n")
    wall, _ = timed([*command, "--resume"])
    return there, wall


def main() -> None:
    """Prints every figure beside its bar."""
    jobs = sys.argv[1] if len(sys.argv) > 1 else "2"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = headline()
        print(
            "| what | wall | CPU | headline searches | points a second |", "|---|---|---|---|---|", sep="\n"
        )
        for count in ("1", jobs):
            wall, cpu = timed([*SWEEP, "--jobs", count, "--output", str(folder / f"{count}.csv")])
            unit = (before + headline()) / 2
            print(
                f"| {POINTS:,} points, {count} process{'es' * (count != '1')} | {wall:.1f} s | {cpu:.1f} s "
                f"| {cpu / unit:.0f} of {unit:.2f} s | {POINTS / wall:.1f} |",
                flush=True,
            )
        there, wall = killed_and_resumed(folder, jobs)
        print(f"killed after {there} points and gone on with: {wall:.1f} s more")
        files = {(folder / f"{one}.csv").read_bytes() for one in ("1", jobs, "resumed")}
        print("the files are the same" if len(files) == 1 else "THE FILES DIFFER")


if __name__ == "__main__":
    main()
