"""One worker thread that runs the model, and the queue before it.

The event loop never computes: it hands work to the thread and reads results as they come. A model runs one request at a
time (on a CPU two at once would only be slower); the others wait in order, at most ``MAX_WAITING`` of them. A request
that fails or whose client has left ends alone; the thread goes on with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

from hanmo.serving.problems import ApiError

T = TypeVar("T")

MAX_WAITING = 16
RETRY_AFTER_SECONDS = 5

log = logging.getLogger(__name__)


class Job(Generic[T]):
    """Work in the queue and the results it has given so far; iterate over it in the event loop.

    Results are kept until they are read. Their number is bounded by ``max_tokens``, and a reader that is slow or stuck
    must never hold up the thread, because that would hold up every other request.
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
        """Do the work, in the worker thread; between two results look whether anybody still wants them."""
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
    """The worker thread.

    Args:
        max_waiting: how many requests may wait for the one that is running.
    """

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.max_waiting = max_waiting
        self.waiting: deque[Job[Any]] = deque()
        self.running: Job[Any] | None = None
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.loop, name="hanmo-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    @property
    def ready(self) -> bool:
        """Whether new work is taken."""
        return self.thread.is_alive() and not self.closed

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
        """Run one job after another until the runner is closed and nothing waits."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if not self.waiting:
                    return
                self.running = job = self.waiting.popleft()
            job.run()
            self.running = None

    def drain(self) -> None:
        """Take no new work; finish what is there."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def abort(self) -> None:
        """End all work that is left and tell its readers."""
        with self.changed:
            left = [*self.waiting, *([self.running] if self.running else [])]
            self.waiting.clear()
        for job in left:
            job.cancelled.set()
            job.deliver("error", ApiError("the server is stopping", status=503, code="server_stopping"))

    def close(self, seconds: float = 5.0) -> None:
        """Stop: drain, abort, and wait for the thread (which leaves at its next token)."""
        self.drain()
        self.abort()
        if self.thread.is_alive():
            self.thread.join(seconds)
