"""Writes that were submitted before a mark and reach the disk after it, on a disk that nothing freezes."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest

from farshore.providers.physical.agent import cuts, disks
from farshore.providers.physical.agent.blocks import BLOCK, Blocks
from farshore.providers.physical.agent.cuts import CutDisk, CutFailed, Cutter
from farshore.providers.physical.agent.disks import Device
from farshore.providers.physical.agent.freeze import Frozen
from farshore.providers.physical.agent.holding import DirectReader
from farshore.providers.physical.agent.tracking import Book

from .conftest import config_of

SIZE = 8 * BLOCK


class Disk:
    """A file as a device, and a tracker that books a write when it is submitted; the bytes come when they are told to."""

    kind = "trace"

    def __init__(self, path) -> None:
        self.path = str(path)
        path.write_bytes(bytes(SIZE))
        self.device = Device(self.path, 0, 0, SIZE, "x", "1")
        self.book = Book("trace", self.device)

    def submit(self, block: int) -> None:
        self.book.current.add(block * BLOCK, BLOCK)

    def complete(self, block: int, byte: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(block * BLOCK)
            file.write(byte * BLOCK)
            file.flush()
            os.fsync(file.fileno())

    def watch(self, devices) -> None: ...
    def tidy(self) -> None: ...
    def stop(self, *, clean: bool) -> None: ...

    def mark(self) -> dict[str, str]:
        return {"d": self.book.mark()}

    def changed(self, key: str, since: str, until: str = "", *, carry: float = 0.0) -> Blocks:
        return self.book.changed(self.book.mark_of(since), self.book.mark_of(until) if until else None, carry)


class Open:
    """Freezes nothing."""

    @contextlib.contextmanager
    def frozen(self, mounts, limit):
        yield Frozen()


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setattr(disks, "writes", lambda device: (0,))
    return Disk(tmp_path / "disk")


@pytest.fixture
def take(disk, tmp_path):
    config = config_of(tmp_path, tmp_path, {"d": disk.path}, spool=tmp_path, freeze_copy_mib=0.0)
    cutter = Cutter(config, Open(), lambda: [])  # type: ignore[arg-type]

    def cut(base: str, **more):
        part = CutDisk("d", disk.device, disk, DirectReader(disk.device), base=base, **more)
        return cutter.take("c", "crash-consistent", {"d": part}, {})

    return cut


def story(disk, take, monkeypatch) -> bytes:
    """A write is under way at the first mark, and done before the second; returns what the cut holds of its block."""
    base = disk.mark()["d"]
    disk.submit(2)
    fill, rounds = Cutter._fill, iter(range(100))

    def filled(self, cut, part):
        number = next(rounds)
        if number == 0:
            # The bulk is read now, block 2 still has its old bytes; another block is overwritten, so a second round comes.
            disk.submit(5)
            left = fill(self, cut, part)
            disk.submit(2 + 3)
            disk.complete(2, b"n")
            disk.complete(5, b"m")
            return left or BLOCK
        return fill(self, cut, part)

    monkeypatch.setattr(Cutter, "_fill", filled)
    cut = take(base)
    try:
        return cut.read("d", 2 * BLOCK, 1)
    finally:
        cut.close()


def test_what_was_under_way_at_a_former_mark_is_read_again(disk, take, monkeypatch):
    assert story(disk, take, monkeypatch) == b"n"


def test_the_mutant_without_carrying_is_caught(disk, take, monkeypatch):
    monkeypatch.setattr(cuts, "CARRY", 0.0)
    assert story(disk, take, monkeypatch) == b"\0"


def test_a_base_that_was_marked_loosely_takes_along_what_was_under_way(disk, take):
    disk.submit(1)
    base = disk.mark()["d"]  # as a seed's mark: block 1 is under way, what was copied of it is old
    disk.complete(1, b"n")
    for carry, kept in ((60.0, True), (0.0, False)):
        cut = take(base, base_carry=carry)
        assert cut.spool.held("d", SIZE).any(BLOCK, BLOCK) is kept
        cut.close()


def test_a_barrier_that_did_not_hold_forgets_nothing(disk, tmp_path, monkeypatch):
    """Round 1 is void; what was written before it must still be read again in round 2."""
    config = config_of(
        tmp_path, tmp_path, {"d": disk.path}, spool=tmp_path, freeze_copy_mib=0.0, freeze_limit=0.0
    )
    barriers = iter(range(100))

    class Late:
        @contextlib.contextmanager
        def frozen(self, mounts, limit):
            number = next(barriers)
            if number == 1:
                disk.submit(4)
                disk.complete(4, b"n")
            yield Frozen(late=number == 1)

    fill, rounds = Cutter._fill, iter(range(100))

    def filled(self, cut, part):
        left = fill(self, cut, part)
        return left or (BLOCK if next(rounds) == 0 else 0)

    monkeypatch.setattr(cuts, "CARRY", 0.0)  # or it would be read again for that reason
    monkeypatch.setattr(Cutter, "_fill", filled)
    part = CutDisk("d", disk.device, disk, DirectReader(disk.device))
    cut = Cutter(config, Late(), lambda: []).take("c", "crash-consistent", {"d": part}, {})  # type: ignore[arg-type]
    assert cut.read("d", 4 * BLOCK, 1) == b"n"
    assert cut.evidence["rounds"] == 3
    cut.close()


def test_a_release_waits_for_the_reads_under_way(disk, take, monkeypatch):
    cut = take("")
    inside, go = threading.Event(), threading.Event()
    pieces = cut.spool.pieces

    def slow(*arguments):
        inside.set()
        go.wait(30)
        return pieces(*arguments)

    cut.spool.pieces = slow
    found: list[bytes] = []
    reading = threading.Thread(target=lambda: found.append(cut.read("d", 0, 4)))
    reading.start()
    assert inside.wait(30)
    closing = threading.Thread(target=cut.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive(), "the descriptors were closed under a reader"
    go.set()
    closing.join(30)
    reading.join(30)
    assert found == [bytes(4)]
    with pytest.raises(CutFailed, match="was released"):
        cut.read("d", 0, 4)
