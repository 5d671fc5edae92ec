"""The worker threads that run the model, and the queue before them.

The event loop never computes: it hands work to a thread and reads results as they come. The requests that run share the
engine's steps (:mod:`hanmo.inference.engine`), so that eight of them take far less than eight times as long as one; the
others wait in order, at most ``MAX_WAITING`` of them. A request that fails or whose client has left ends alone; its
thread goes on with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

from hanmo.serving.problems import ApiError

T = TypeVar("T")

WORKERS = 8  # requests that run at the same time
MAX_WAITING = 16
RETRY_AFTER_SECONDS = 5

log = logging.getLogger(__name__)


class Job(Generic[T]):
    """Work in the queue and the results it has given so far; iterate over it in the event loop.

    Results are kept until they are read. Their number is bounded by ``max_tokens``, and a reader that is slow or stuck
    must never hold up a thread, because that would hold up other requests.
    """

    def __init__(self, work: Callable[[], Iterator[T]], loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.loop = loop
        self.results: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.cancelled = threading.Event()

    def deliver(self, kind: str, value: Any = None) -> None:
        """Hand a result to the event loop from any thread; a loop that is gone needs none."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.results.put_nowait, (kind, value))

    def run(self) -> None:
        """Do the work, in a worker thread; between two results look whether anybody still wants them."""
        try:
            with contextlib.closing(self.work()) as results:  # type: ignore[type-var]
                for result in results:
                    if self.cancelled.is_set():
                        return
                    self.deliver("result", result)
            self.deliver("end")
        except Exception as error:
            self.deliver("error", error)

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            kind, value = await self.results.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value


class Runner:
    """The worker threads.

    Args:
        max_waiting: how many requests may wait for those that are running.
        workers: how many run at the same time.
    """

    def __init__(self, max_waiting: int = MAX_WAITING, workers: int = WORKERS) -> None:
        self.max_waiting = max_waiting
        self.waiting: deque[Job[Any]] = deque()
        self.running: set[Job[Any]] = set()
        self.closed = False
        self.changed = threading.Condition()
        names = (f"hanmo-model-{number}" for number in range(workers))
        self.threads = [threading.Thread(target=self.loop, name=name, daemon=True) for name in names]

    def start(self) -> None:
        """Start the threads."""
        for thread in self.threads:
            thread.start()

    @property
    def ready(self) -> bool:
        """Whether new work is taken."""
        return any(thread.is_alive() for thread in self.threads) and not self.closed

    def submit(self, work: Callable[[], Iterator[T]]) -> Job[T]:
        """Put work at the end of the queue; call it from the event loop that will read the results.

        Raises:
            ApiError: 503 where the queue is full or the server is stopping.
        """
        job = Job(work, asyncio.get_running_loop())
        with self.changed:
            if not self.ready:
                raise ApiError("the server is stopping", status=503, code="server_stopping")
            if len(self.waiting) >= self.max_waiting:
                raise ApiError(
                    f"{self.max_waiting} requests are waiting already; try again in a moment",
                    status=503,
                    code="server_busy",
                    retry_after=RETRY_AFTER_SECONDS,
                )
            self.waiting.append(job)
            self.changed.notify()
        return job

    def cancel(self, job: Job[Any]) -> None:
        """Stop a job at its next token; one that still waits gives its place free at once."""
        job.cancelled.set()
        with self.changed, contextlib.suppress(ValueError):
            self.waiting.remove(job)

    def loop(self) -> None:
        """Run one job after another until the runner is closed and nothing waits; in each thread."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if not self.waiting:
                    return
                job = self.waiting.popleft()
                self.running.add(job)
            job.run()
            with self.changed:
                self.running.discard(job)

    def drain(self) -> None:
        """Take no new work; finish what is there."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def abort(self) -> None:
        """End all work that is left and tell its readers."""
        with self.changed:
            left = [*self.waiting, *self.running]
            self.waiting.clear()
        for job in left:
            job.cancelled.set()
            job.deliver("error", ApiError("the server is stopping", status=503, code="server_stopping"))

    def close(self, seconds: float = 5.0) -> None:
        """Stop: drain, abort, and wait for the threads (which leave at their next token)."""
        self.drain()
        self.abort()
        end = time.monotonic() + seconds
        for thread in self.threads:
            if thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))
