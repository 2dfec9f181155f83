"""Where the kernel tells nothing: hashes of every block, kept with the cut, compared with those of an older cut.

Whether a disk was written *while* it is read shows in its counters of writes (`/sys/block/*/stat`): if one moved, nothing
that was read since is certain. A disk that is written all the time and can neither be tracked nor snapshotted cannot be
replicated; a quiet one, a read-only one and a snapshot can.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from farshore.providers.physical.agent import disks
from farshore.providers.physical.agent.blocks import BLOCK, Blocks, count
from farshore.providers.physical.agent.disks import Device
from farshore.providers.physical.agent.tracking import NotKnown, parse

KIND = "hash"
ENTRY = 16  # bytes of a block's hash
KEPT = 3  # tables a disk: the committed point's, the running cycle's, one to spare

Counters = Callable[[Device], tuple[int, ...]]


class HashTracker:
    """Fills `ChangeSource`. A mark's id names a table; `learn` makes it, after the barrier."""

    kind = KIND

    def __init__(self, folder: Path, *, counters: Counters = disks.writes) -> None:
        self._folder = folder
        self._counters = counters
        self._devices: dict[str, Device] = {}
        self._at: dict[str, tuple[int, ...]] = {}  # counters at the newest mark, by tracker id
        folder.mkdir(parents=True, exist_ok=True)

    def watch(self, devices: Mapping[str, Device]) -> None:
        self._devices = dict(devices)

    def mark(self) -> dict[str, str]:
        ids: dict[str, str] = {}
        self._at.clear()
        for key, one in self._devices.items():
            ids[key] = f"{KIND}:{uuid.uuid4().hex}:0"
            self._at[ids[key]] = self._counters(one)
        return ids

    def changed(self, key: str, since: str, until: str = "", *, carry: float = 0.0) -> Blocks:
        """Until now: everything as soon as one write was counted. Between two cuts: blocks whose hashes differ."""
        del carry  # tables are of the bytes as they were read: nothing is under way in them
        one = self._devices[key]
        if not until:
            quiet = since in self._at and self._at[since] == self._counters(one)
            # A request is counted when it is done: while one is under way nothing is certain.
            return Blocks(one.size) if quiet and self._at[since][-1] == 0 else Blocks.all(one.size)
        old, new = self._table(key, one, since), self._table(key, one, until)
        found = Blocks(one.size)
        for block in range(count(one.size)):
            at = block * ENTRY
            if old[at : at + ENTRY] != new[at : at + ENTRY]:
                found.bits[block] = 1
        return found

    def learn(self, key: str, tracker: str, read: Callable[[int, int], bytes | memoryview]) -> None:
        """Make the table of a mark by reading the whole disk; old tables go."""
        one = self._devices[key]
        table = bytearray()
        for offset in range(0, one.size, 1 << 20):
            data = memoryview(read(offset, min(1 << 20, one.size - offset)))
            for at in range(0, len(data), BLOCK):
                table += hashlib.blake2b(data[at : at + BLOCK], digest_size=ENTRY).digest()
        path = self._path(key, tracker)
        path.with_suffix(".new").write_bytes(_head(one) + bytes(table))
        path.with_suffix(".new").replace(path)
        tables = sorted(self._folder.glob(f"{key}.*.table"), key=lambda table: table.stat().st_mtime_ns)
        for old in tables[:-KEPT]:
            old.unlink(missing_ok=True)

    def _path(self, key: str, tracker: str) -> Path:
        kind, life, _ = parse(tracker)
        if kind != KIND:
            raise NotKnown(f"changes were tracked by {kind} then and are found by hashes now")
        if not life.isalnum():
            raise NotKnown("the last point has no state of change tracking that this agent knows")
        return self._folder / f"{key}.{life}.table"

    def _table(self, key: str, one: Device, tracker: str) -> bytes:
        try:
            data = self._path(key, tracker).read_bytes()
        except FileNotFoundError:
            raise NotKnown("the hashes of the last point are gone") from None
        head = _head(one)
        if not data.startswith(head) or len(data) != len(head) + count(one.size) * ENTRY:
            raise NotKnown("the hashes of the last point are of another disk or another size")
        return data[len(head) :]

    def tidy(self) -> None:
        return None

    def stop(self, *, clean: bool) -> None:
        del clean  # every table stands for itself, over restarts and reboots


def _head(one: Device) -> bytes:
    return hashlib.blake2b(f"{one.identity}|{one.size}".encode(), digest_size=ENTRY).digest()
