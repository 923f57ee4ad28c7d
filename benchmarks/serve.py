"""Asks `planner serve` as many clients at once do, for a while, and says what they got.

    python benchmarks/serve.py [clients] [seconds]

Starts a server of its own on loopback. Every client keeps a connection and asks one thing after the other:
the form, searches as pages and as JSON, reviews, and garbage; one client in fifty asks only searches that
nobody asked before. Prints a Markdown table, docs/serve.md holds one; exit status 1 if any answer was not
what it should be.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

GET, POST = "GET {} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "POST {} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
FORM = POST + "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{}"
JOBS = (
    "model=llama-65b&gpus=64x80G",
    "model=llama-2-7b&gpus=8xH100&framework=fsdp",
    "model=gpt2-xl&gpus=4xA100-SXM-40GB",
    "model=llama-65b&gpus=8x80G",  # nothing fits
    "model=mixtral-8x7b&gpus=64xH100&seq_length=4096",
)
GARBAGE = (
    (GET.format("/nothing"), 404),
    (GET.format("/search?model=%ff&gpus=8x80G"), 400),
    (GET.format("/api/search?model=../../etc/passwd&gpus=8x80G"), 422),
    (GET.format("/review?gpus=8x80G&model=llama-65b&tensor_parallel=0"), 422),
    (FORM.format("/search", 19, "modell=x&gpus=8x80G"), 400),
    (FORM.format("/", 3, "a=b"), 405),
    (GET.format("/").replace("127.0.0.1", "elsewhere.example"), 421),
)
Asked = tuple[str, str, int]
"""What kind of request, the request, the status that its answer should have."""
NUMBERS = itertools.count(1)


def new() -> Asked:
    """A search that nobody asked before."""
    job = f"model=gpt2-xl&gpus=8xA100-SXM-40GB&global_batch_size={8 * next(NUMBERS)}"
    return "search, new", GET.format(f"/api/search?{job}"), 200


def asked(dice: random.Random) -> Asked:
    """Something to ask."""
    throw, job = dice.random(), dice.choice(JOBS)
    if throw < 0.20:
        return "form", GET.format("/"), 200
    if throw < 0.25:
        return "form sent", FORM.format("/search", len(job), job), 303
    if throw < 0.55:
        return "search, page", GET.format(f"/search?{job}"), 200
    if throw < 0.75:
        return "search, JSON", GET.format(f"/api/search?{job}"), 200
    if throw < 0.80:
        return "review", GET.format(f"/review?{job}"), 200
    return ("garbage", *dice.choice(GARBAGE))


async def ask(port: int, text: str) -> int:
    """One request on a connection of its own: the status of its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text.replace("\r\n", "\r\nConnection: close\r\n", 1).encode())
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1])


async def client(port: int, until: float, seed: int, took: dict[str, list[float]], wrong: list[str]) -> None:
    """One client: a request after the other on one connection until the time is up."""
    dice, reader, writer = random.Random(seed), None, None
    while time.monotonic() < until:
        kind, text, expected = asked(dice) if seed % 50 else new()
        start = time.perf_counter()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(text.encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = (
                int(head.split("content-length: ")[1].split("\r\n")[0]) if "content-length" in head else 0
            )
            body = await reader.readexactly(length)
            status = int(head.split()[1])
            if status != expected or b"Traceback" in body:
                wrong.append(f"{kind}: {status} {body[:200]!r}")
            if "connection: close" in head:
                writer.close()
                writer = None
        except (OSError, EOFError) as error:
            wrong.append(f"{kind}: {error!r}")
            writer = None
        took[kind].append(time.perf_counter() - start)
    if writer:
        writer.close()


def resident(pid: int) -> tuple[float, float]:
    """MiB resident of a process, and of its children."""
    children = [
        one
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for one in (thread / "children").read_text().split()
    ]

    def own(one: int) -> float:
        text = Path(f"/proc/{one}/status").read_text()
        return float(text.split("VmRSS:")[1].split()[0]) / 1024 if "VmRSS" in text else 0.0

    return own(pid), sum(own(int(one)) for one in children)


async def load(pid: int, port: int, clients: int, seconds: float) -> int:
    """Asks, and prints what came of it."""
    took: dict[str, list[float]] = defaultdict(list)
    wrong: list[str] = []
    start = time.monotonic()
    first = [GET.format(f"/{page}?{job}") for job in JOBS for page in ("search", "review")]
    wrong += [f"{one}" for one in await asyncio.gather(*(ask(port, text) for text in first)) if one != 200]
    warm = time.monotonic() - start
    sizes = [resident(pid)]

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            sizes.append(resident(pid))

    watching = asyncio.create_task(watch())
    start = time.monotonic()
    await asyncio.gather(*(client(port, start + seconds, n, took, wrong) for n in range(clients)))
    spent = time.monotonic() - start
    watching.cancel()
    sizes.append(resident(pid))
    print(f"{clients} clients, {spent:.0f} s, after a first answer to each question, {warm:.0f} s\n")
    print("| request | answers | a second | median | 99th percentile | worst |")
    print("|---|---|---|---|---|---|")
    everything = [one for times in took.values() for one in times]
    for kind, times in [*sorted(took.items()), ("all", everything)]:
        times = sorted(times)
        figures = statistics.median(times), times[int(0.99 * (len(times) - 1))], times[-1]
        shown = " | ".join(f"{1000 * figure:,.0f} ms" for figure in figures)
        print(f"| {kind} | {len(times):,} | {len(times) / spent:,.1f} | {shown} |")
    print(f"\nanswers that were not what they should be: {len(wrong)}")
    for label, number in (("server", 0), ("workers", 1)):
        own = [size[number] for size in sizes]
        figures = own[0], own[len(own) // 2], own[-1], max(own)
        print(label + ", MiB: {:.0f} before, {:.0f} half-way, {:.0f} after, {:.0f} most".format(*figures))
    for one in wrong[:10]:
        print(one, file=sys.stderr)
    return 1 if wrong else 0


def main(clients: int = 200, seconds: float = 60.0) -> int:
    """Starts a server, asks it, ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "planner", "serve", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            time.sleep(0.1)
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
        return asyncio.run(load(server.pid, port, clients, seconds))
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    sys.exit(main(*(int(word) for word in sys.argv[1:])))
