"""Disks with real bytes: a flat base extent and a tree of 64 KiB overlay links, with change tracking.

A link is a file as large as the disk plus a bitmap of the blocks it holds (for the base: of the blocks ever written, that
is, allocated). The live link is a leaf that takes the writes; a snapshot owns the link that was live when it was taken.
A link that neither is live nor belongs to a snapshot is folded away by `consolidate`.

Everything is on disk before a write returns (data by pwrite, bitmaps by shared mappings), so that a killed process loses
nothing acknowledged. The tree itself is metadata: the machine persists `to_json()` after every change; files are created
before and deleted after that, so that a kill in between leaves garbage at most.

`Disk` does not lock: callers hold the machine's I/O lock for writes and for changes of the tree.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from farshore.lab.vcenter.bitmap import BLOCK, Bitmap, blocks, runs
from farshore.lab.vcenter.cbt import ChangeTracking

BASE = 0
_COPY_STEP = 4 << 20
_ZEROS = bytes(_COPY_STEP)


class Link:
    """One link of a chain; files are opened at first use."""

    def __init__(self, number: int, parent: int | None, path: Path, map_path: Path, capacity: int) -> None:
        self.number = number
        self.parent = parent
        self.path = path
        self.map_path = map_path
        self.capacity = capacity
        self.generation = 0
        """Counts up whenever what the link holds may change under a reader: fold, upload, power on."""
        self._fd: int | None = None
        self._present: Bitmap | None = None

    def create(self) -> None:
        """Make both files, empty; whatever was there is gone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            file.truncate(self.capacity)
        if self.number != BASE:
            self._present = Bitmap(self.map_path, blocks(self.capacity), fresh=True)
        else:
            self.map_path.unlink(missing_ok=True)

    @property
    def fd(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR)
        return self._fd

    @property
    def present(self) -> Bitmap:
        if self._present is None:
            self._present = Bitmap(self.map_path, blocks(self.capacity))
        return self._present

    def resize(self, capacity: int) -> None:
        self.close()
        os.truncate(self.path, capacity)
        self.capacity = capacity

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._present is not None:
            self._present.close()
            self._present = None

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        self.map_path.unlink(missing_ok=True)


class Disk:
    """A virtual disk. `key` is its device key, `unit` its SCSI unit number, `stem` its file name without suffix."""

    def __init__(self, directory: Path, state: Path, record: dict[str, Any]) -> None:
        """Open the disk that `record` (see `to_json`) describes; `directory` holds extents, `state` bitmaps."""
        self.directory = directory
        self.state = state
        self.key: int = record["key"]
        self.unit: int = record["unit"]
        self.controller: int = record.get("controller", 1000)
        self.label: str = record["label"]
        self.stem: str = record["stem"]
        self.datastore: str = record.get("datastore", "")
        self.uuid: str = record["uuid"]
        self.capacity: int = record["capacity"]
        self.mode: str = record.get("mode", "persistent")
        self.backing: str = record.get("backing", "flat")
        self.thin: bool = record.get("thin", True)
        self.live: int = record.get("live", BASE)
        self.links: dict[int, Link] = {}
        self._ended: list[ChangeTracking] = []
        for number, parent in (record.get("links") or {"0": None}).items():
            self._link(int(number), parent)
        tracking: dict[str, Any] | None = record.get("cbt")
        self.cbt: ChangeTracking | None = None
        if tracking:
            self.cbt = ChangeTracking(state, blocks(self.capacity), tracking["epoch"], tracking["number"])
            self.cbt.blind = record.get("blind", False)

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "unit": self.unit,
            "controller": self.controller,
            "label": self.label,
            "stem": self.stem,
            "datastore": self.datastore,
            "uuid": self.uuid,
            "capacity": self.capacity,
            "mode": self.mode,
            "backing": self.backing,
            "thin": self.thin,
            "live": self.live,
            "links": {str(link.number): link.parent for link in list(self.links.values())},
            "cbt": self.cbt.to_json() if self.cbt else None,
            "blind": bool(self.cbt and self.cbt.blind),
        }

    def create(self) -> None:
        """Make the files of a new, all-zero disk."""
        self.links[BASE].create()

    # ------------------------------------------------------------------ names

    def descriptor_name(self, link: int) -> str:
        """`web.vmdk`, `web-000001.vmdk`."""
        return f"{self.stem}{_suffix(link)}.vmdk"

    def extent_name(self, link: int) -> str:
        """`web-flat.vmdk`, `web-000001-sesparse.vmdk`."""
        return f"{self.stem}-flat.vmdk" if link == BASE else f"{self.stem}{_suffix(link)}-sesparse.vmdk"

    def chain(self, link: int) -> list[int]:
        """`link` and its ancestors, base last."""
        result: list[int] = []
        current: int | None = link
        while current is not None:
            result.append(current)
            current = self.links[current].parent
        return result

    # ------------------------------------------------------------------ bytes

    def read(self, offset: int, length: int, link: int | None = None) -> bytes:
        """Bytes as the guest sees them (`link=None`) or as of a frozen link."""
        if offset < 0 or length < 0 or offset + length > self.capacity:
            raise ValueError(f"{offset}+{length} is outside the disk of {self.capacity} bytes")
        chain = [self.links[n] for n in self.chain(self.live if link is None else link)]
        if len(chain) == 1:
            return _pread(chain[0].fd, length, offset)
        parts: list[bytes] = []
        for source, start, size in _segments(chain, offset, length):
            parts.append(_pread(source.fd, size, start))
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """A guest's write to the live link."""
        if not data:
            return
        end = offset + len(data)
        if offset < 0 or end > self.capacity:
            raise ValueError(f"{offset}+{len(data)} is outside the disk of {self.capacity} bytes")
        first, last = offset // BLOCK, (end - 1) // BLOCK
        if self.cbt is not None:
            self.cbt.record(first, last)
        link = self.links[self.live]
        if link.parent is not None:
            self._fill_edge(
                link, first, offset > first * BLOCK or (first == last and end < self._block_end(first))
            )
            if last != first:
                self._fill_edge(link, last, end < self._block_end(last))
        _pwrite(link.fd, data, offset)
        link.present.set_range(first, last)

    def allocated(self, link: int) -> int:
        """Blocks that any link of the chain holds, as bits: what `*` reports."""
        value = 0
        for number in self.chain(link):
            value |= self.links[number].present.to_int()
        return value

    def sha256(self, link: int | None = None) -> str:
        """Digest of the whole disk, live or as of a frozen link. Unallocated space is hashed without reading it."""
        at = self.live if link is None else link
        known = self.allocated(at)
        digest = hashlib.sha256()
        step_bits = _COPY_STEP // BLOCK
        mask = (1 << step_bits) - 1
        for offset in range(0, self.capacity, _COPY_STEP):
            size = min(_COPY_STEP, self.capacity - offset)
            if (known >> (offset // BLOCK)) & mask:
                digest.update(self.read(offset, size, at))
            else:
                digest.update(memoryview(_ZEROS)[:size])
        return digest.hexdigest()

    # ------------------------------------------------------------------ the tree

    def freeze(self) -> int:
        """Open a new live link above the present one; return the frozen link's number."""
        frozen = self.live
        number = self._free_number()
        self._link(number, frozen)
        self.links[number].create()
        self.live = number
        return frozen

    def revert(self, link: int) -> None:
        """Drop the live link and open a new one above `link`. The dropped files are `garbage` until `sweep`."""
        number = self._free_number()
        self._link(number, link)
        self.links[number].create()
        self.live = number

    def differing(self, first: int, second: int) -> int:
        """Blocks that may differ between two links: those held by links that only one of the chains has."""
        one, two = self.chain(first), self.chain(second)
        value = 0
        for number in set(one) ^ set(two):
            value |= self.links[number].present.to_int()
        return value

    def loose(self, owned: Collection[int]) -> list[int]:
        """Links that are neither live nor owned by a snapshot and have at most one child."""
        return [
            n
            for n in list(self.links)
            if n != self.live
            and n not in owned
            and (n != BASE or self._children(n))
            and len(self._children(n)) <= 1
        ]

    def copy_down(self, number: int) -> None:
        """First half of a fold: copy what the only child of `number` holds into it.

        Harmless to repeat after a kill: until `adopt` is persisted, the child still hides what was copied.
        """
        children = self._children(number)
        if not children:
            return
        child, target = self.links[children[0]], self.links[number]
        target.generation += 1
        for offset, size in _present_runs(child):
            for start in range(offset, offset + size, _COPY_STEP):
                length = min(_COPY_STEP, offset + size - start)
                _pwrite(target.fd, _pread(child.fd, length, start), start)
        target.present.merge(child.present.to_int())

    def adopt(self, number: int) -> tuple[int | None, Link]:
        """Second half: `number` takes its child's place in the tree, or goes when it has none.

        Returns (the child it replaces or None, the link whose files may go once the tree is persisted).
        """
        children = self._children(number)
        if not children:
            return None, self.links.pop(number)
        child = self.links.pop(children[0])
        for link in self.links.values():
            if link.parent == child.number:
                link.parent = number
        if self.live == child.number:
            self.live = number
        return child.number, child

    def has_children(self, number: int) -> bool:
        return bool(self._children(number))

    def fold_bytes(self, number: int) -> int:
        """Bytes that folding `number` copies."""
        return sum(size for child in self._children(number) for _, size in _present_runs(self.links[child]))

    @property
    def trackable(self) -> bool:
        """Whether change tracking works for this kind of disk."""
        return self.backing == "flat" and not self.mode.startswith("independent")

    def extend(self, capacity: int) -> None:
        """Grow a disk that has only its base link."""
        for link in self.links.values():
            link.resize(capacity)
        self.capacity = capacity
        if self.cbt is not None:
            self.cbt.resize(blocks(capacity))

    def replace_base(self, upload: Path) -> None:
        """Put a whole new extent in place (datastore upload). Change tracking does not see it, as in reality."""
        link = self.links[BASE]
        link.generation += 1
        link.close()
        upload.replace(link.path)
        os.truncate(link.path, self.capacity)
        link.present.set_all()

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        if self.cbt is not None:
            self.cbt.close()

    def remove(self) -> None:
        """Delete all files."""
        for link in self.links.values():
            link.remove()
        if self.cbt is not None:
            self.cbt.remove()

    # ------------------------------------------------------------------ change tracking

    def start_tracking(self) -> None:
        """Begin an epoch; what is allocated already counts as changed (back-fill)."""
        self.stop_tracking()
        tracking = ChangeTracking(self.state, blocks(self.capacity))
        tracking.merge(self.allocated(self.live))
        self.cbt = tracking

    def stop_tracking(self) -> None:
        """End the epoch. Its maps stay until `sweep`: a kill before the change is persisted brings it back."""
        previous, self.cbt = self.cbt, None
        if previous is not None:
            previous.close()
            self._ended.append(previous)

    def sweep(self) -> None:
        """Delete the maps of ended epochs; to be called once their end is persisted."""
        while self._ended:
            self._ended.pop().remove()

    # ------------------------------------------------------------------ details

    def _link(self, number: int, parent: int | None) -> None:
        path = self.directory / self.extent_name(number)
        map_path = self.state / f"{self.stem}{_suffix(number)}.present"
        self.links[number] = Link(number, parent, path, map_path, self.capacity)

    def _children(self, number: int) -> list[int]:
        return [link.number for link in list(self.links.values()) if link.parent == number]

    def _free_number(self) -> int:
        number = 1
        while number in self.links:
            number += 1
        return number

    def _block_end(self, block: int) -> int:
        return min((block + 1) * BLOCK, self.capacity)

    def _fill_edge(self, link: Link, block: int, partial: bool) -> None:
        """Copy a block from below before a write covers only a part of it."""
        if partial and block not in link.present:
            start = block * BLOCK
            size = self._block_end(block) - start
            assert link.parent is not None
            _pwrite(link.fd, self.read(start, size, link.parent), start)
            link.present.set_range(block, block)


def _suffix(link: int) -> str:
    return f"-{link:06d}" if link else ""


def _segments(chain: list[Link], offset: int, length: int) -> Iterator[tuple[Link, int, int]]:
    """(link, offset, length) pieces that make up a range, neighbours from the same link merged."""
    end = offset + length
    maps = [(link, link.present) for link in chain[:-1]]
    base = chain[-1]
    source: Link | None = None
    start = offset
    for block in range(offset // BLOCK, -(-end // BLOCK)):
        holder = next((link for link, present in maps if block in present), base)
        if holder is not source:
            if source is not None:
                yield source, start, block * BLOCK - start
                start = block * BLOCK
            source = holder
    if source is not None:
        yield source, start, end - start


def _present_runs(link: Link) -> Iterator[tuple[int, int]]:
    for first, count in runs(link.present.to_int()):
        start = first * BLOCK
        yield start, min(count * BLOCK, link.capacity - start)


def _pread(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    got = len(data)
    while got < length:
        data = os.pread(fd, length - got, offset + got)
        if not data:  # behind the end of a sparse file that was cut short: zeros
            parts.append(bytes(length - got))
            break
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)
