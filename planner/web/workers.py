"""A few processes that answer: each answer within a time and a memory, or its process ends.

A process has no way to write a file and no more memory than it is given. One that takes too long, dies or
has grown is replaced. Requests wait for a process in a queue of bounded length; those that ask the same wait
for one answer, and the last answers are kept, up to a number of bytes: what the server holds in memory has
a bound, whatever it is asked.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from planner.web.answers import Answer
from planner.web.fields import Asked

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Key = tuple[str, Asked]
SECONDS = 90.0
"""Of one answer: the search's own limit, and what would fit where nothing does."""
WAIT = 120.0
"""Seconds in the queue."""
QUEUE = 512
KEPT = 64 * 2**20
"""Bytes of answers that are kept."""
MEMORY = 4 * 2**30
"""Bytes of a process: its address space."""
GROWN = 768 * 2**20
"""Bytes of a process that is replaced after its answer; one that has answered usual questions has 150 MiB."""

SLOW = f"this takes longer than {SECONDS:g} seconds here: ask for fewer layouts, or use planner search"
DIED = "this takes more memory than there is for one answer: ask for fewer layouts, or use planner search"
BUSY = "too many questions at once: ask again in a minute"


def work(connection: Connection) -> None:
    """What a process does until its server ends: tasks in, answers and its largest size out."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it
    sys.dont_write_bytecode = True
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    _limit()
    from planner.web.answers import answer, prepare

    prepare()
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        connection.send((answer(*task), _size()))


def _limit() -> None:
    """Bounds the process, where the system can."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # not offered here, or less already
            continue


def _size() -> int:
    """Bytes that the process has had at most."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Worker:
    """A process, and the line to it."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True, name="planner worker")
        self.process.start()
        theirs.close()

    def ask(self, task: tuple[Any, ...], seconds: float) -> tuple[Answer, int]:
        """An answer and the process's size. Raises TimeoutError; EOFError or OSError if it died."""
        self.line.send(task)
        if not self.line.poll(seconds):
            raise TimeoutError
        found: tuple[Answer, int] = self.line.recv()
        return found

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join(5)
        self.line.close()


class Workers:
    """The processes, the queue before them, and the answers that are kept."""

    def __init__(
        self, number: int, seconds: float = SECONDS, wait: float = WAIT, queue: int = QUEUE, kept: int = KEPT
    ) -> None:
        self.number, self.seconds, self.wait, self.queue, self.kept = number, seconds, wait, queue, kept
        self.waiting = 0
        self.held = 0
        self.answers: OrderedDict[Key, Answer] = OrderedDict()
        self.under_way: dict[Key, asyncio.Task[Answer]] = {}
        self.all: set[Worker] = set()
        self.threads = ThreadPoolExecutor(number, thread_name_prefix="planner worker")
        self.idle: asyncio.Queue[Worker] = asyncio.Queue()

    async def start(self) -> None:
        """Starts the processes."""
        for _ in range(self.number):
            await self._add()

    async def stop(self) -> None:
        """Ends them."""
        for worker in self.all:
            worker.process.kill()
        for task in self.under_way.values():
            task.cancel()
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def _add(self) -> None:
        worker = await asyncio.get_running_loop().run_in_executor(self.threads, Worker)
        self.all.add(worker)
        self.idle.put_nowait(worker)

    async def answer(self, task: str, asked: Asked, *more: Any) -> Answer:
        """The answer to a task, made once for all who ask for it at the time.

        ``more`` follows from what was asked.
        """
        key = (task, asked)
        if found := self.answers.get(key):
            self.answers.move_to_end(key)
            return found
        under_way = self.under_way.get(key)
        if under_way is None:
            if self.waiting >= self.queue:
                return Answer.of(503, BUSY)
            self.waiting += 1
            under_way = self.under_way[key] = asyncio.create_task(self._make(key, more))
            under_way.add_done_callback(lambda _: self.under_way.pop(key, None))
        return await asyncio.shield(under_way)

    async def _make(self, key: Key, more: tuple[Any, ...]) -> Answer:
        try:
            async with asyncio.timeout(self.wait):
                worker = await self.idle.get()
        except TimeoutError:
            return Answer.of(503, BUSY)
        finally:
            self.waiting -= 1
        try:
            loop = asyncio.get_running_loop()
            found, size = await loop.run_in_executor(self.threads, worker.ask, (*key, *more), self.seconds)
        except TimeoutError:
            await self._replace(worker)
            return Answer.of(504, SLOW)
        except (EOFError, OSError):
            await self._replace(worker)
            return Answer.of(503, DIED)
        if found.trace:
            print(found.trace, file=sys.stderr)
        if size > GROWN:
            await self._replace(worker)
        else:
            self.idle.put_nowait(worker)
        if found.status in (200, 422):
            self._keep(key, found)
        return found

    async def _replace(self, worker: Worker) -> None:
        self.all.discard(worker)
        await asyncio.get_running_loop().run_in_executor(self.threads, worker.stop)
        await self._add()

    def _keep(self, key: Key, found: Answer) -> None:
        """Keeps an answer, and forgets those that were not asked for longest."""
        self.answers[key] = found
        self.held += _bytes(key, found)
        while self.held > self.kept:
            self.held -= _bytes(*self.answers.popitem(last=False))


def _bytes(key: Key, found: Answer) -> int:
    """Bytes that an answer and its question take, about."""
    return len(found.body) + len(repr(key)) + 1000
