"""Bitmaps over 64 KiB blocks, kept in memory-mapped files: a set bit survives the death of the process."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = 65536
"""Granularity of overlays and of change tracking, bytes."""

_ONES = re.compile("1+")


def blocks(capacity: int) -> int:
    """Blocks that cover `capacity` bytes."""
    return -(-capacity // BLOCK)


class Bitmap:
    """Bits in a file. `fresh=True` starts with zeros whatever the file held."""

    def __init__(self, path: Path, bits: int, *, fresh: bool = False) -> None:
        self.path = path
        self.bits = bits
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0)
        fd = os.open(path, flags, 0o600)
        try:
            size = max(1, -(-bits // 8))
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)

    def __contains__(self, bit: int) -> bool:
        return bool(self._map[bit >> 3] & (1 << (bit & 7)))

    def set_range(self, first: int, last: int) -> None:
        """Set bits `first`…`last`, both included."""
        view = self._map
        for bit in range(first, last + 1):
            view[bit >> 3] |= 1 << (bit & 7)

    def set_all(self) -> None:
        """Set every bit."""
        self.set_range(0, self.bits - 1)

    def to_int(self) -> int:
        """The whole map as one integer, bit 0 lowest."""
        return int.from_bytes(self._map[:], "little")

    def merge(self, value: int) -> None:
        """Set every bit that is set in `value`."""
        size = len(self._map)
        self._map[:] = (self.to_int() | value).to_bytes(size, "little")

    def close(self) -> None:
        """Release the mapping; the file stays."""
        self._map.close()

    def remove(self) -> None:
        """Release the mapping and delete the file."""
        self._map.close()
        self.path.unlink(missing_ok=True)


def read_int(path: Path) -> int:
    """A closed map as an integer; a missing file is empty."""
    try:
        return int.from_bytes(path.read_bytes(), "little")
    except FileNotFoundError:
        return 0


def runs(value: int) -> Iterator[tuple[int, int]]:
    """(first bit, number of bits) of each run of ones, ascending."""
    if value:
        for match in _ONES.finditer(format(value, "b")[::-1]):
            yield match.start(), match.end() - match.start()
