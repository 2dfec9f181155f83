"""Copies in advance: how a disk without a snapshot device gets its first point, or a point after a long silence.

The agent can keep only as much of an instant as its spool holds. What is more is copied here, from the running disk into
a sparse file on the worker's side, in rounds: each begins with a barrier (a mark; nothing is held up for longer than the
freeze), then what changed since the mark before is read. The rounds shrink until the rest fits the agent's spool; then the
cut is made on top of the last mark. The file alone is of no instant and never leaves this module as one; file and cut
together are exactly the instant, because what was not written since the last mark is as it was read after it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.physical.client import AgentClient
from farshore.providers.physical.errors import AgentRefused
from farshore.replication.ports import LEAF, Extent

_PIECE = 4 << 20
_RESERVE = 256 << 20  # bytes that stay free in the folder


class Seed:
    """The copies of the disks of one cut. Blocking; `read` may be called by several threads."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder / f"seed-{name}"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._files: dict[str, int] = {}
        self._copied: dict[str, bytearray] = {}  # one byte a leaf

    def copy(
        self,
        client: AgentClient,
        key: str,
        size: int,
        extents: Iterable[Extent],
        tick: Callable[[str, int], None],
    ) -> int:
        """Read extents of the running disk into the file; returns the bytes read."""
        if key not in self._files:
            path = self._folder / key
            self._files[key] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._files[key], size)
            self._copied[key] = bytearray(-(-size // LEAF))
        copied = 0
        for extent in extents:
            for at in range(extent.start, extent.start + extent.length, _PIECE):
                length = min(_PIECE, extent.start + extent.length - at)
                data = client.read("live", {"disk": key}, at, length, doing=f"copying {key} in advance")
                self._room(length)
                self._put(key, at, data)
                copied += length
                tick(key, copied)
        return copied

    def _put(self, key: str, at: int, data: bytes) -> None:
        file = self._files[key]
        first, count = at // LEAF, -(-len(data) // LEAF)
        view = memoryview(data)
        while view:
            done = os.pwrite(file, view, at)
            view, at = view[done:], at + done
        self._copied[key][first : first + count] = b"\x01" * count

    def _room(self, length: int) -> None:
        if shutil.disk_usage(self._folder).free - length < _RESERVE:
            raise FarshoreError(
                Code.SOURCE_NOT_ELIGIBLE,
                f"The seed folder {self._folder.parent} is full.",
                causes=(
                    "The first copy of a disk without a snapshot device needs room for what the disk holds.",
                ),
                action="Make room in the worker's seed folder, or put the disk on LVM thin.",
                retryable=True,
                retry_after=300.0,
            )

    def has(self, key: str, offset: int, length: int) -> bool:
        """Whether all of a range was copied."""
        copied = self._copied.get(key)
        if copied is None:
            return False
        first, stop = offset // LEAF, -(-(offset + length) // LEAF)
        return copied.find(0, first, stop) < 0

    def read(self, key: str, offset: int, length: int) -> bytes:
        data = os.pread(self._files[key], length, offset)
        if len(data) != length:
            raise FarshoreError(Code.SOURCE_READ_FAILED, f"The copy of {key} is shorter than the disk.")
        return data

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def sow(
    client: AgentClient,
    seed: Seed,
    sizes: Mapping[str, int],
    bases: Mapping[str, str],
    before: Mapping[str, str],
    *,
    room: int,
    rounds: int,
    tick: Callable[[str, int], None],
) -> dict[str, str]:
    """Copy in rounds until a cut on top of the returned marks fits `room` bytes. SnapshotFailed when it never does.

    `bases`: the consumer's last states by disk; "" or missing for a disk that is copied as a whole. `before`: marks that
    an earlier call returned for the same seed.
    """
    for _ in range(rounds):
        marks: dict[str, str] = client.call("POST", "seeds", doing="marking before a copy in advance")[
            "marks"
        ]
        copied = 0
        for key, size in sizes.items():
            since = before.get(key) or bases.get(key, "")
            extents = _changed(client, key, since, marks[key]) if since else None
            if extents is None:
                extents = [Extent(0, size)]
            copied += seed.copy(client, key, size, extents, tick)
        before = marks
        # While this was read, less was written than was read: what the next cut has to keep is likely to fit. Half the
        # room is the margin.
        if copied <= room // 2:
            return marks
        if _pending(client, sizes, marks) <= room // 2:
            return marks
    raise FarshoreError(
        Code.SNAPSHOT_FAILED,
        f"The disks were written faster than {rounds} copies in advance could keep up with.",
        causes=("The network to the server is slower than its disks are written.",),
        action="Give the agent a larger spool, run the first copy at a quieter time, or put the disks on LVM thin.",
    )


def _changed(client: AgentClient, key: str, since: str, until: str) -> list[Extent] | None:
    """None: only a copy of the whole disk helps."""
    query = {"disk": key, "since": since, "until": until}
    try:
        runs = client.call("GET", "seeds/changed", query=query, doing=f"asking what changed on {key}")
    except AgentRefused as refused:
        if refused.code != "not-known":
            raise
        return None
    return [Extent(offset, length) for offset, length in runs]


def _pending(client: AgentClient, sizes: Mapping[str, int], marks: Mapping[str, str]) -> int:
    """Bytes written since the marks, as of now."""
    total = 0
    for key, size in sizes.items():
        extents = _changed(client, key, marks[key], "")
        total += size if extents is None else sum(extent.length for extent in extents)
    return total
