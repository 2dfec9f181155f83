"""Trackers that lie, on purpose: the proof of `test_points` has to see each of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from farshore.providers.physical.agent import tracing
from farshore.providers.physical.agent.cuts import Cutter
from farshore.providers.physical.agent.tracing import TraceTracker
from farshore.providers.physical.agent.tracking import Book

from .points import Bench

MIB = 1 << 20


def provoke(machine, start, tmp_path, **more) -> int:
    """A point, then everything that changes blocks without a writer's own hand, then a second point; returns how many
    of its blocks are not what was frozen."""
    machine.add("data", 64)
    machine.mkfs("data")
    folder = machine.mount("data")
    keep(folder, 24)
    bench = Bench(machine, start(machine.loops, **more), tmp_path)
    try:
        first = bench.point()
        found = sum(len(blocks) for blocks in first.missed.values())
        os.unlink(folder / "f0")
        os.unlink(folder / "f1")
        os.sync()
        subprocess.run(["fstrim", str(folder)], check=True)  # a loop device gives zeros for what was trimmed
        keep(folder, 3)
        second = bench.point()
        return found + sum(len(blocks) for blocks in second.missed.values())
    finally:
        machine.thaw()
        bench.close()


def keep(folder: Path, mib: int) -> None:
    for number in range(2):
        (folder / f"f{number}").write_bytes(os.urandom(mib * MIB // 2))
    os.sync()


def test_the_true_tracker_misses_nothing(machine, start, tmp_path):
    missed = provoke(machine, start, tmp_path)
    assert missed == 0


def test_a_tracker_that_forgets_discards_is_caught(machine, start, tmp_path, monkeypatch):
    filter_ = tracing._filter
    monkeypatch.setattr(
        tracing, "_filter", lambda numbers: filter_(numbers).replace('!(rwbs ~ "R*")', 'rwbs ~ "*W*"')
    )
    missed = provoke(machine, start, tmp_path)
    assert missed > 0


def test_a_tracker_that_drops_events_silently_is_caught(machine, start, tmp_path, monkeypatch):
    fold = TraceTracker._fold
    calls = iter(range(10**9))

    def lossy(self: TraceTracker, data: bytes) -> None:
        if b"tracing_mark_write" in data or next(calls) % 2:
            fold(self, data)
        else:
            self._consumed += len(tracing._LINE.findall(data))  # counted as the true one does, but not booked

    monkeypatch.setattr(TraceTracker, "_fold", lossy)
    missed = provoke(machine, start, tmp_path)
    assert missed > 0


def test_events_that_are_dropped_and_not_counted_begin_a_new_life(machine, start, tmp_path, monkeypatch):
    """The clumsier form of the mutant before: the kernel's count of events read gives it away."""
    fold = TraceTracker._fold
    armed = False
    dropped: list[bytes] = []

    def lossy(self: TraceTracker, data: bytes) -> None:
        lines = data.splitlines(keepends=True)
        events = [number for number, line in enumerate(lines) if b"block_bio_queue" in line]
        if armed and not dropped and events:
            dropped.append(lines.pop(events[0]))
        fold(self, b"".join(lines))

    monkeypatch.setattr(TraceTracker, "_fold", lossy)
    machine.add("data", 64)
    machine.mkfs("data")
    folder = machine.mount("data")
    bench = Bench(machine, start(machine.loops), tmp_path)
    try:
        assert bench.point().missed == {}
        armed = True
        keep(folder, 8)
        made = bench.point()  # whatever the reader's thread has not folded yet is folded in here
        assert len(dropped) == 1
        assert "somebody else emptied or read the trace" in made.result.reason
        assert made.missed == {}
    finally:
        machine.thaw()
        bench.close()


def test_a_tracker_that_resets_without_saying_is_caught(machine, start, tmp_path, monkeypatch):
    monkeypatch.setattr(Book, "tidy", lambda self: self.generations.clear())
    missed = provoke(machine, start, tmp_path)
    assert missed > 0


def test_a_cut_that_does_not_look_again_after_reading_is_caught(machine, start, tmp_path, monkeypatch):
    """What is overwritten between mark and reading has to be noticed: the test's own hand writes there."""
    machine.add("data", 64)
    machine.mkfs("data")
    folder = machine.mount("data")
    keep(folder, 8)
    monkeypatch.setattr(Cutter, "_overwritten", lambda *_: 0)
    running = start(machine.loops)
    bench = Bench(machine, running, tmp_path)
    write_before_reading(monkeypatch, folder)
    try:
        assert sum(len(blocks) for blocks in bench.point().missed.values()) > 0
    finally:
        machine.thaw()
        bench.close()


def test_a_block_that_is_overwritten_between_mark_and_reading_is_noticed(
    machine, start, tmp_path, monkeypatch
):
    machine.add("data", 64)
    machine.mkfs("data")
    folder = machine.mount("data")
    keep(folder, 8)
    running = start(machine.loops)
    bench = Bench(machine, running, tmp_path)
    write_before_reading(monkeypatch, folder)
    try:
        made = bench.point()
        assert made.missed == {}
        assert int(made.cut.evidence["rounds"]) > 1
    finally:
        machine.thaw()
        bench.close()


def write_before_reading(monkeypatch, folder: Path) -> None:
    """Right after the first thaw of the next cut, before anything is read, a file is overwritten in place."""
    fill = Cutter._fill
    times = iter(range(10**6))

    def late(self, cut, disk):
        if next(times) == 0:
            with (folder / "f0").open("r+b") as file:
                file.write(os.urandom(2 * MIB))
                os.fsync(file.fileno())
        return fill(self, cut, disk)

    monkeypatch.setattr(Cutter, "_fill", late)
