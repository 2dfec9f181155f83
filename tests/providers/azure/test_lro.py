"""Waiting with checkpoints; the operations themselves are tested with the resources that they make."""

from __future__ import annotations

import asyncio
import time

import pytest

from farshore.providers.azure.lro import attended

from .bench import Killed, Notes


async def test_a_checkpoint_is_called_while_work_lasts() -> None:
    notes = Notes()
    assert (
        await attended(asyncio.sleep(0.25, "done"), checkpoint=notes, note={"a": 1}, interval=0.05) == "done"
    )
    assert 3 <= len(notes.seen) <= 6
    assert notes.last == {"a": 1}


async def test_short_work_needs_no_checkpoint() -> None:
    notes = Notes()
    await attended(asyncio.sleep(0), checkpoint=notes, note={}, interval=1)
    assert notes.seen == []


async def test_a_checkpoint_that_raises_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    started = time.monotonic()
    with pytest.raises(Killed):
        await attended(work(), checkpoint=Notes(kill_when=lambda _: True), note={}, interval=0.02)
    assert ended.is_set()
    assert time.monotonic() - started < 5


async def test_cancelling_the_caller_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    task = asyncio.create_task(attended(work(), checkpoint=Notes(), note={}, interval=0.02))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_the_works_own_error_comes_through() -> None:
    async def work() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await attended(work(), checkpoint=Notes(), note={}, interval=1)
