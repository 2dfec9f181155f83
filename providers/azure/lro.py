"""Long-running operations: begin, write down the continuation token, poll; or go on from a token.

The SDK walks the operation (Retry-After first, else the polling interval). Here it is made to survive us: the token goes
into the checkpoint before the first poll, and a successor polls the same operation without asking for it again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from azure.core.exceptions import AzureError, HttpResponseError
from azure.core.polling import AsyncLROPoller
from azure.core.polling.base_polling import OperationFailed

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure.errors import classify, said
from farshore.providers.ports import Checkpoint

T = TypeVar("T")
Begin = Callable[[str | None], Awaitable[AsyncLROPoller[T]]]
"""Starts an operation; with a continuation token, goes on with one without a new request."""


class OperationLost(Exception):
    """A token leads nowhere: it is unreadable, or Azure has forgotten the operation (or does not show it yet)."""


class LateFailure(FarshoreError):
    """An operation that Azure had accepted ended as Failed or Canceled. The resource stays, in state Failed."""

    def __init__(self, error: FarshoreError) -> None:
        info = error.info
        super().__init__(
            error.code,
            info.message,
            subject=info.subject,
            causes=info.possible_causes,
            action=info.recommended_action,
            retryable=error.retryable,
            retry_after=error.retry_after,
            details=info.details,
        )


def silent(_note: Mapping[str, Any]) -> None:
    """A checkpoint that nobody reads."""


async def attended(
    work: Callable[[Checkpoint], Awaitable[T]],
    *,
    checkpoint: Checkpoint,
    interval: float,
    begin: Mapping[str, Any] | None = None,
) -> T:
    """Await `work(note)` and repeat its last note (at first `begin`) to `checkpoint` at least every `interval` seconds.

    So a checkpoint comes in time even while a request hangs, and what a successor needs stays in it. An exception of
    `checkpoint` cancels the work.
    """
    last = dict(begin or {})

    def note(news: Mapping[str, Any]) -> None:
        nonlocal last
        last = dict(news)
        checkpoint(last)

    task = asyncio.ensure_future(work(note))
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=interval)
            if done:
                return await task
            checkpoint(last)
    finally:
        if not task.done():
            task.cancel()
            # Only the cancellation that was just asked for is swallowed; the caller's own goes on.
            with contextlib.suppress(asyncio.CancelledError, AzureError, FarshoreError):
                await task


async def drive(
    begin: Begin[T],
    *,
    doing: str,
    subject: str,
    checkpoint: Checkpoint = silent,
    note: Mapping[str, Any] | None = None,
    token: str | None = None,
) -> T:
    """Run an operation to its end and return its result.

    `token` goes on with an operation; OperationLost when it leads nowhere. Errors of the first request are raised as the
    SDK raised them, so that the caller can tell 412 from the rest; later ones are FarshoreError, of class LateFailure
    when Azure itself gave the operation up. What ended is not kept in the checkpoint.
    """
    said_so = dict(note or {})
    try:
        poller = await begin(token)
    except (ValueError, TypeError, KeyError, AzureError) as error:
        if token is None:
            raise
        # Going on asks Azure nothing: this token is of another version or damaged.
        raise OperationLost(str(error)) from error
    current = {**said_so, "token": poller.continuation_token()}
    checkpoint(current)
    try:
        return await poller.result()
    except AzureError as error:
        if _gave_up(error):
            checkpoint(said_so)
            raise LateFailure(classify(error, doing=doing, subject=subject, late=True)) from error
        what = said(error)
        if isinstance(error, HttpResponseError) and what.status == 404:
            if token is not None:
                raise OperationLost(what.message) from error
            raise FarshoreError(
                Code.TARGET_NOT_VISIBLE_YET,
                f"Azure accepted {doing} but does not show the operation yet.",
                subject=subject,
                details={"azure_code": what.code, "azure_message": what.message},
            ) from error
        raise classify(error, doing=doing, subject=subject) from error


def _gave_up(error: AzureError) -> bool:
    return isinstance(error.__cause__, OperationFailed)
