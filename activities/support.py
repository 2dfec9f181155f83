"""What every activity needs: errors in Temporal's form, heartbeats, threads that can be stopped."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from temporalio import activity
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from farshore.contract.errors import to_application_error
from farshore.domain.errors import Code, FarshoreError

T = TypeVar("T")
_BEAT = 2.0  # seconds between heartbeats
_THREADS = ThreadPoolExecutor(max_workers=1024, thread_name_prefix="step")
"""For work that blocks. Threads are made as needed, so the bound is the workers' slots and never this pool: a leg keeps
its thread for an hour."""


class ErrorInterceptor(Interceptor):
    """Turns every error of an activity into one that explains itself. Registered once, by the worker."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _Errors(next)


class _Errors(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        try:
            return await super().execute_activity(input)
        except FarshoreError as error:
            # The chain of causes holds texts of SDKs, which may hold secrets: it stays in the log.
            activity.logger.info("%s: %s", error.code.value, error, exc_info=error)
            raise to_application_error(error) from None
        except (ApplicationError, CancelledError, asyncio.CancelledError):
            raise
        except Exception as error:
            # The last net: whatever an SDK raises unforeseen must still reach the person on call with advice.
            activity.logger.exception("unforeseen error in %s", activity.info().activity_type)
            where = activity.info().activity_type
            wrapped = FarshoreError(
                Code.INTERNAL,
                f"{where} failed with {type(error).__name__}; the worker's log has the details.",
            )
            raise to_application_error(wrapped) from None


class Beat:
    """Heartbeats of one activity: the newest details, sent every two seconds and at once when they change."""

    def __init__(self, resume: Mapping[str, Any]) -> None:
        self.resume = resume  # what a dead predecessor left
        self._details: dict[str, Any] = dict(resume)

    def checkpoint(self, details: Mapping[str, Any]) -> None:
        """Remember and send. Called from the event loop."""
        self._details = dict(details)
        activity.heartbeat(self._details)

    def note(self, details: Mapping[str, Any]) -> None:
        """Remember; the next beat sends it. May be called from any thread."""
        self._details = dict(details)

    async def keep(self) -> None:
        while True:
            await asyncio.sleep(_BEAT)  # first: a step that ends before costs the server no call
            activity.heartbeat(self._details)


@contextlib.asynccontextmanager
async def beating() -> AsyncGenerator[Beat]:
    """Heartbeat in the background for as long as the step runs."""
    details = activity.info().heartbeat_details
    first = details[0] if details else {}
    beat = Beat(first if isinstance(first, Mapping) else {})
    task = asyncio.create_task(beat.keep())
    try:
        yield beat
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Run blocking work in a thread. On cancellation the work sees `should_stop()` and is awaited to its end, so that
    no thread goes on writing after its activity has ended."""
    stop = threading.Event()
    context = contextvars.copy_context()

    def run() -> T:
        return context.run(work, stop.is_set)

    task = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(_THREADS, run))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        while not task.done():  # however often the cancellation is repeated
            with contextlib.suppress(
                BaseException
            ):  # the first cancellation is what counts, and is raised below
                await asyncio.shield(task)
        raise
