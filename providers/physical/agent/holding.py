"""Bytes of a disk that were caught at one instant, kept until the cut is released.

A disk without a snapshot device has only its live bytes. What a cut has to promise is therefore read right after the
barrier and kept here: in a file without a name, by default in memory (tmpfs). The spool must not lie on a protected disk:
each byte kept would be a byte changed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from farshore.providers.physical.agent.blocks import BLOCK, Blocks
from farshore.providers.physical.agent.disks import Device

PIECE = 1 << 20
_ZEROS = bytes(BLOCK)


class ReadFailed(Exception):
    """The device did not give the bytes. The text is for a person."""


class DirectReader:
    """Reads a device past the page cache: what a file system wrote to the device is not in the cache of the device.

    Several threads may read at once; each has a buffer of its own.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._local = threading.local()
        try:
            self._file = os.open(device.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            raise ReadFailed(f"{device.path} cannot be opened: {error.strerror}") from error

    def read(self, offset: int, length: int) -> memoryview:
        """`length` bytes; offset a multiple of BLOCK, length too or up to the end. Valid until this thread's next read."""
        buffer: mmap.mmap | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._local.buffer = mmap.mmap(-1, max(PIECE, -(-length // 4096) * 4096))
        view = memoryview(buffer)[:length]
        done = 0
        while done < length:
            try:
                got = os.preadv(self._file, [view[done:]], offset + done)
            except OSError as error:
                raise ReadFailed(f"{self._device.path} at {offset + done}: {error.strerror}") from error
            if got == 0:
                raise ReadFailed(f"{self._device.path} ends before byte {offset + length}")
            done += got
        return view

    def close(self) -> None:
        os.close(self._file)


class SpoolFull(Exception):
    """More has to be kept than the spool may hold."""


class Spool:
    """Room for blocks of all disks of a cut. Filled by one thread, then read by many."""

    def __init__(self, folder: Path, capacity: int) -> None:
        """`capacity` in bytes."""
        self._file = tempfile.TemporaryFile(dir=folder, prefix="farshore-")  # noqa: SIM115  closed by `close`
        self._capacity = capacity // BLOCK
        self._slots: dict[str, dict[int, int]] = {}
        self._free: list[int] = []
        self._used = 0

    @property
    def bytes(self) -> int:
        return (self._used - len(self._free)) * BLOCK

    def room(self) -> int:
        """Bytes that still fit."""
        return (self._capacity - self._used + len(self._free)) * BLOCK

    def put(self, key: str, offset: int, data: memoryview) -> None:
        """Keep the blocks of a range that begins at a block. SpoolFull."""
        slots = self._slots.setdefault(key, {})
        for at in range(0, len(data), BLOCK):
            block, part = (offset + at) // BLOCK, data[at : at + BLOCK]
            old = slots.pop(block, -1)
            if old >= 0:
                self._free.append(old)
            if part == memoryview(_ZEROS)[: len(part)]:
                slots[block] = -1
                continue
            if self._free:
                slot = self._free.pop()
            elif self._used < self._capacity:
                slot, self._used = self._used, self._used + 1
            else:
                raise SpoolFull
            os.pwrite(self._file.fileno(), part, slot * BLOCK)
            slots[block] = slot

    def drop(self, key: str, blocks: Blocks) -> None:
        """Forget blocks whose bytes are not those of the instant any more."""
        slots = self._slots.get(key, {})
        for block in [block for block in slots if block in blocks]:
            slot = slots.pop(block)
            if slot >= 0:
                self._free.append(slot)

    def held(self, key: str, size: int) -> Blocks:
        found = Blocks(size)
        for block in self._slots.get(key, {}):
            found.bits[block] = 1
        return found

    def pieces(
        self, key: str, offset: int, length: int, live: Callable[[int, int], bytes | memoryview]
    ) -> Iterator[bytes | memoryview]:
        """The bytes of a range: kept ones from here, runs of others from `live(offset, length)`."""
        slots = self._slots.get(key, {})
        end = offset + length
        at = offset
        while at < end:
            block = at // BLOCK
            stop = min(end, (block + 1) * BLOCK)
            slot = slots.get(block)
            if slot is None:
                while stop < end and stop // BLOCK not in slots:
                    stop = min(end, stop + BLOCK)
                yield live(at, stop - at)
            elif slot < 0:
                yield _ZEROS[: stop - at]
            else:
                data = os.pread(self._file.fileno(), stop - at, slot * BLOCK + at % BLOCK)
                if len(data) != stop - at:
                    raise ReadFailed("the spool is shorter than what was kept in it")
                yield data
            at = stop

    def close(self) -> None:
        self._file.close()
