"""Waiting with checkpoints; the operations themselves are tested with the resources that they make."""

from __future__ import annotations

import asyncio
import time

import pytest

from farshore.providers.azure.lro import attended
from farshore.providers.ports import Checkpoint

from .bench import Killed, Notes


async def test_a_checkpoint_is_called_while_work_lasts() -> None:
    notes = Notes()
    assert (
        await attended(lambda _: asyncio.sleep(0.25, "done"), checkpoint=notes, begin={"a": 1}, interval=0.05)
        == "done"
    )
    assert 2 <= len(notes.seen) <= 6
    assert notes.last == {"a": 1}


async def test_short_work_needs_no_checkpoint() -> None:
    notes = Notes()
    await attended(lambda _: asyncio.sleep(0), checkpoint=notes, interval=1)
    assert notes.seen == []


async def test_a_checkpoint_that_raises_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work(_note: Checkpoint) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    started = time.monotonic()
    with pytest.raises(Killed):
        await attended(work, checkpoint=Notes(kill_when=lambda _: True), interval=0.02)
    assert ended.is_set()
    assert time.monotonic() - started < 5


async def test_cancelling_the_caller_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work(_note: Checkpoint) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    task = asyncio.create_task(attended(work, checkpoint=Notes(), interval=0.02))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_the_works_own_error_comes_through() -> None:
    async def work(_note: Checkpoint) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await attended(work, checkpoint=Notes(), interval=1)


async def test_the_last_note_is_repeated_while_the_next_one_is_awaited() -> None:
    async def work(note: Checkpoint) -> None:
        note({"token": "t"})
        await asyncio.sleep(0.2)

    notes = Notes()
    await attended(work, checkpoint=notes, begin={"token": "old"}, interval=0.05)
    assert len(notes.seen) >= 2
    assert all(note == {"token": "t"} for note in notes.seen)
