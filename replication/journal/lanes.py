"""Work on an iterator of tasks with a few threads, or with none.

Each worker takes the next task itself, so nothing is queued and memory is bounded by the workers. The calling thread only
looks around: progress, requests to stop. With no workers the calling thread does everything, always in the same order:
what tests of crashes need.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def run(
    tasks: Iterable[T],
    work: Callable[[T], None],
    *,
    workers: int,
    look: Callable[[], None],
    poll: float = 0.25,
    name: str = "lane",
) -> None:
    """Do `work` on every task. `look` is called often by the calling thread; what it raises ends the work, and so does
    the first error of a worker. Returns when no worker is at work any more."""
    if workers == 0:
        for task in tasks:
            look()
            work(task)
        look()
        return
    _Lanes(iter(tasks), work, workers, name).run(look, poll)


class _Lanes(Generic[T]):
    def __init__(self, tasks: Iterator[T], work: Callable[[T], None], workers: int, name: str) -> None:
        self._tasks = tasks
        self._work = work
        self._next = threading.Lock()
        self._state = threading.Condition()
        self._running = workers
        self._error: BaseException | None = None
        self._halt = False
        self._threads = [
            threading.Thread(target=self._lane, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]

    def run(self, look: Callable[[], None], poll: float) -> None:
        for thread in self._threads:
            thread.start()
        try:
            while True:
                with self._state:
                    done = self._state.wait_for(lambda: self._running == 0 or self._error is not None, poll)
                if done:
                    break
                look()
        finally:
            self._halt = True
            for thread in self._threads:
                thread.join()
        if self._error is not None:
            raise self._error
        look()

    def _lane(self) -> None:
        try:
            while not self._halt:
                with self._next:
                    task = next(self._tasks, self)
                if task is self:
                    break
                self._work(task)  # type: ignore[arg-type]
        except BaseException as error:  # told to the thread that called `run`, which raises it
            with self._state:
                self._error = self._error or error
                self._halt = True
        finally:
            with self._state:
                self._running -= 1
                self._state.notify_all()
