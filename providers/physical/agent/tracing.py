"""Tracking by the kernel's block trace events: no module, no reboot, root and tracefs are enough.

A private trace instance records `block_bio_queue` of the watched disks: the event comes *before* the request goes to the
driver, with the whole disk's number and sectors also for partitions. Every operation but a read counts (`rwbs` not
beginning with R): discards say D and write-zeroes N, so a filter for W alone would miss them. Flushes have no sectors.

Nothing may get lost unnoticed. The ring keeps the old and counts what does not fit; at every `mark` and every question a
numbered marker is written into the trace and waited for, then counters of loss must stand at zero, the switches must be
as they were set, and the kernel's count of events read must be ours. Any doubt begins a new life for every disk.

The trace's clock is `mono`, one clock for all CPUs: the pipe then hands out events in their order, and whatever was
submitted before a marker was written comes before the marker.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farshore.providers.physical.agent import disks
from farshore.providers.physical.agent.blocks import Blocks
from farshore.providers.physical.agent.disks import Device
from farshore.providers.physical.agent.tracking import Book, NotKnown, parse

KIND = "trace"
_EVENT = "events/block/block_bio_queue"
_LINE = re.compile(
    rb"block_bio_queue: (\d+),(\d+) ([A-Z]+) (\d+) \+ (\d+) \[|tracing_mark_write: farshore (\d+)\n"
)
_COUNTER = re.compile(r"^(overrun|commit overrun|dropped events|read events): (\d+)$", re.MULTILINE)
_PATIENCE = 20.0  # seconds until a marker that does not come back counts as a loss


class TraceUnavailable(Exception):
    """This kernel, or the rights of this process, do not allow tracing. The text says what is missing."""


def find_tracefs(folder: Path | None = None) -> Path:
    """Where tracefs is mounted; mounts it at its usual place when it is not. TraceUnavailable."""
    for place in [folder] if folder else [Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing")]:
        if (place / "instances").is_dir():
            return place
    place = folder or Path("/sys/kernel/tracing")
    if "tracefs" not in (disks.PROC / "filesystems").read_text():
        raise TraceUnavailable("the kernel has no tracefs")
    import subprocess

    done = subprocess.run(["mount", "-t", "tracefs", "nodev", str(place)], capture_output=True, check=False)
    if done.returncode or not (place / "instances").is_dir():
        raise TraceUnavailable(f"tracefs cannot be mounted: {done.stderr.decode(errors='replace').strip()}")
    return place


class TraceTracker:
    """Fills `ChangeSource`."""

    kind = KIND

    def __init__(self, tracefs: Path, name: str, state: Path, *, buffer_kib: int = 8192) -> None:
        """`name` of the trace instance: one agent, one name. `buffer_kib` is per CPU."""
        self._folder = tracefs / "instances" / name
        self._state = state
        self._buffer_kib = buffer_kib
        self._books: dict[str, Book] = {}
        self._by_number: dict[tuple[int, int], Book] = {}
        self._reasons: dict[str, str] = {}  # why a life ended
        self._lock = threading.Condition()
        self._kick = threading.Event()
        self._ending = False
        self._marker = self._seen = 0
        self._consumed = 0  # events and markers read from this instance
        self._filter = ""
        if not (tracefs / "events/block/block_bio_queue").is_dir():
            raise TraceUnavailable("the kernel has no block trace events (CONFIG_BLK_DEV_IO_TRACE)")
        kept = self._kept()
        self._open(fresh=not kept)
        if kept:
            self._consumed, self._marker = int(kept["consumed"]), int(kept["marker"])
            self._seen = self._marker
            self._filter = str(kept["filter"])
        self._candidates: dict[str, Any] = kept["books"] if kept else {}
        self._note_running()
        # Started by the first `watch`: what the ring holds from before belongs to books that must be there first.
        self._thread = threading.Thread(target=self._read, name="trace", daemon=True)

    # -- the port ------------------------------------------------------------------------------------------------

    def watch(self, devices: Mapping[str, Device]) -> None:
        """See `ChangeSource`. A device that a kept state fits goes on in its former life."""
        with self._lock:
            books: dict[str, Book] = {}
            for key, one in devices.items():
                book = self._books.get(key)
                if book is not None and book.device == one:
                    books[key] = book
                    continue
                if book is not None:
                    self._reasons[book.life] = _difference(book.device, one)
                books[key] = self._revived(key, one) or Book(KIND, one)
            for key, book in self._books.items():
                if key not in devices:
                    self._reasons[book.life] = "the disk was taken out of the agent's configuration"
            self._candidates = {}
            self._books = books
            self._by_number = {(book.device.major, book.device.minor): book for book in books.values()}
        wanted = _filter(self._by_number)
        if wanted != self._filter:
            self._set_filter(wanted)
        if self._thread.ident is None:
            self._thread.start()

    def _revived(self, key: str, one: Device) -> Book | None:
        kept = self._candidates.get(key)
        if kept is None:
            return None
        try:
            return Book.load(KIND, one, kept)
        except (KeyError, ValueError, TypeError) as error:
            self._reasons[str(kept.get("life"))] = (
                f"the agent was restarted and its memory does not fit: {error}"
            )
            return None

    def mark(self) -> dict[str, str]:
        loss = self._drain()
        with self._lock:
            if loss:
                self._begin_anew(loss)
            return {key: book.mark() for key, book in self._books.items()}

    def changed(self, key: str, since: str, until: str = "", *, carry: float = 0.0) -> Blocks:
        kind, life, _ = parse(since)
        loss = self._drain() if not until else ""
        with self._lock:
            if loss:
                self._begin_anew(loss)
            book = self._books[key]
            if kind == KIND and life != book.life:
                raise NotKnown(
                    self._reasons.get(life, "the agent was stopped or the machine was started anew since")
                )
            return book.changed(book.mark_of(since), book.mark_of(until) if until else None, carry)

    def tidy(self) -> None:
        """Pack what can be packed. Outside of any freeze."""
        with self._lock:
            for book in self._books.values():
                book.tidy()

    def stop(self, *, clean: bool) -> None:
        """A clean stop leaves the instance running and keeps what was read; the next start of this boot goes on."""
        loss = self._drain() if clean and self._thread.is_alive() else ""
        self._ending = True
        self._kick.set()
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._pipe)
        os.close(self._marks)
        if not clean or loss:
            self._remove()
            self._state.unlink(missing_ok=True)
            return
        kept = {
            "boot_id": disks.boot_id(),
            "consumed": self._consumed,
            "marker": self._marker,
            "filter": self._filter,
            "books": {key: book.dump() for key, book in self._books.items()},
        }
        _write(self._state, kept)

    # -- what can go wrong ---------------------------------------------------------------------------------------

    def _begin_anew(self, reason: str) -> None:
        for key, book in list(self._books.items()):
            self._reasons[book.life] = reason
            self._books[key] = fresh = Book(KIND, book.device)
            self._by_number[fresh.device.major, fresh.device.minor] = fresh
        # The counters of loss only ever rise: a new instance begins at zero.
        os.close(self._pipe)
        os.close(self._marks)
        self._open(fresh=True)
        self._set_filter(_filter(self._by_number))

    def _drain(self) -> str:
        """Wait until everything submitted before now is in the books; returns what was lost, for a person, or ""."""
        with self._lock:
            self._marker += 1
            number = self._marker
            try:
                os.write(self._marks, b"farshore %d\n" % number)
            except OSError as error:
                # A full ring refuses markers in the same way as one that is switched off: the counters tell.
                lost, _ = self._counters()
                return _lost(lost) if lost else f"the trace cannot be written to: {error.strerror}"
            deadline = time.monotonic() + _PATIENCE
            self._kick.set()
            while self._seen < number:
                if not self._lock.wait(timeout=max(0.0, min(1.0, deadline - time.monotonic()))) and (
                    time.monotonic() >= deadline or self._counters()[0]
                ):
                    break
            return self._loss(number)

    def _loss(self, number: int) -> str:
        # The reader is outside of its own section while we hold the lock, so both counts stand still on our side; the
        # kernel's count moves only when somebody reads.
        lost, read = self._counters()
        if lost:
            return _lost(lost)
        if self._seen < number:
            return "the trace did not answer"
        if read != self._consumed:
            return (
                f"somebody else emptied or read the trace ({read} events left it, {self._consumed} came here)"
            )
        try:
            set_as_wanted = (
                self._get("tracing_on") == "1"
                and self._get(f"{_EVENT}/enable") == "1"
                and (self._get(f"{_EVENT}/filter") == self._filter)
            )
        except OSError:
            set_as_wanted = False
        return "" if set_as_wanted else "somebody else switched the trace off or changed its filter"

    def _counters(self) -> tuple[int, int]:
        """Events lost and events read, over all CPUs. A vanished instance counts as a loss."""
        lost = read = 0
        try:
            for cpu in (self._folder / "per_cpu").iterdir():
                for name, value in _COUNTER.findall((cpu / "stats").read_text()):
                    if name == "read events":
                        read += int(value)
                    else:
                        lost += int(value)
        except OSError:
            return 1, 0
        return lost, read

    # -- the kernel's side ---------------------------------------------------------------------------------------

    def _open(self, *, fresh: bool) -> None:
        if fresh:
            self._remove()
            self._folder.mkdir()
            self._put("tracing_on", "0")
            self._put("trace_clock", "mono")
            self._put("options/overwrite", "0")  # keep the old, count what does not fit
            self._put("options/context-info", "0")  # shorter lines
            self._put("buffer_size_kb", str(self._buffer_kib))
            self._put(f"{_EVENT}/filter", "dev == 0")
            self._put(f"{_EVENT}/enable", "1")
            self._put("tracing_on", "1")
            self._consumed = 0
            self._seen = self._marker
            self._filter = ""
        self._pipe = os.open(self._folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        self._marks = os.open(self._folder / "trace_marker", os.O_WRONLY)

    def _set_filter(self, text: str) -> None:
        self._put(f"{_EVENT}/filter", text)
        if self._get(f"{_EVENT}/filter") != text:
            raise TraceUnavailable(f"the kernel refused the filter {text!r}")
        self._filter = text

    def _remove(self) -> None:
        if self._folder.is_dir():
            with contextlib.suppress(OSError):
                self._put("tracing_on", "0")
                self._put(f"{_EVENT}/enable", "0")
            try:
                self._folder.rmdir()
            except OSError as error:
                raise TraceUnavailable(
                    f"trace instance {self._folder.name} is in use: {error.strerror}"
                ) from error

    def _put(self, name: str, value: str) -> None:
        try:
            (self._folder / name).write_text(value)
        except OSError as error:
            raise TraceUnavailable(f"tracefs refused {name} = {value}: {error.strerror}") from error

    def _get(self, name: str) -> str:
        return (self._folder / name).read_text().strip()

    def _read(self) -> None:
        """The reader's thread: from the pipe into the books until nothing is left, then a short rest."""
        while not self._ending:
            with self._lock:
                busy = self._fold_some()
            if not busy:
                self._kick.wait(0.02)
                self._kick.clear()

    def _fold_some(self) -> bool:
        """True if there may be more."""
        try:
            data = os.read(self._pipe, 1 << 20)
        except BlockingIOError:
            return False
        except OSError:
            return False  # the next drain notices
        self._fold(data)
        return bool(data)

    def _fold(self, data: bytes) -> None:
        books = self._by_number
        for major, minor, _kind, sector, sectors, marker in _LINE.findall(data):
            self._consumed += 1
            if marker:
                self._seen = int(marker)
                self._lock.notify_all()
            else:
                book = books.get((int(major), int(minor)))
                if book is not None:
                    book.current.add(int(sector) * 512, int(sectors) * 512)

    # -- memory over restarts ------------------------------------------------------------------------------------

    def _kept(self) -> dict[str, Any] | None:
        """What a clean predecessor of this boot left; None: begin anew."""
        try:
            kept = json.loads(self._state.read_text())
        except (OSError, ValueError):
            return None
        usable = kept.get("boot_id") == disks.boot_id() and "books" in kept and self._folder.is_dir()
        return kept if usable else None

    def _note_running(self) -> None:
        """From now on only a clean stop makes the memory valid again."""
        _write(self._state, {"boot_id": disks.boot_id(), "running": os.getpid()})


def _filter(numbers: Mapping[tuple[int, int], Any]) -> str:
    if not numbers:
        return "dev == 0"
    wanted = " || ".join(f"dev == {major << 20 | minor}" for major, minor in sorted(numbers))
    return f'({wanted}) && !(rwbs ~ "R*")'


def _lost(number: int) -> str:
    return f"{number} trace events were lost (ring buffer too small for this rate of writes)"


def _difference(old: Device, new: Device) -> str:
    if old.size != new.size:
        return f"{new.path} was resized from {old.size} to {new.size} bytes"
    return f"{new.path} is another device than before"


def _write(path: Path, what: Mapping[str, Any]) -> None:
    """Durable: file, then name, then folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        json.dump(what, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
