"""Sets of 64 KiB blocks of a disk: one byte a block (16 MiB a TiB), because slices and searches of bytes run in C."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

BLOCK = 65536
"""Bytes of a block: the unit of tracking, and the leaf of the replication engine."""


class Blocks:
    """A set of blocks. Not safe for two threads at once: its owner locks."""

    __slots__ = ("bits", "size")

    def __init__(self, size: int, bits: bytearray | None = None) -> None:
        self.size = size
        self.bits = bytearray(count(size)) if bits is None else bits

    @classmethod
    def all(cls, size: int) -> Blocks:
        return cls(size, bytearray(b"\x01") * count(size))

    def add(self, offset: int, length: int) -> None:
        """Add every block that the byte range touches; what lies beyond the end is ignored."""
        if length > 0 and offset < self.size:
            first = offset // BLOCK
            last = min((offset + length - 1) // BLOCK, len(self.bits) - 1)
            if first == last:
                self.bits[first] = 1
            else:
                self.bits[first : last + 1] = b"\x01" * (last - first + 1)

    def update(self, other: Blocks) -> None:
        self.bits = _combine(self.bits, other.bits, lambda a, b: a | b)

    def minus(self, other: Blocks) -> Blocks:
        return Blocks(self.size, _combine(self.bits, other.bits, lambda a, b: a & ~b))

    def both(self, other: Blocks) -> Blocks:
        return Blocks(self.size, _combine(self.bits, other.bits, lambda a, b: a & b))

    def copy(self) -> Blocks:
        return Blocks(self.size, bytearray(self.bits))

    def __len__(self) -> int:
        return self.bits.count(1)

    def __bool__(self) -> bool:
        return 1 in self.bits

    def __contains__(self, block: int) -> bool:
        return self.bits[block] == 1

    def any(self, offset: int, length: int) -> bool:
        """Whether a block that the byte range touches is in the set."""
        return length > 0 and self.bits.find(1, offset // BLOCK, -(-(offset + length) // BLOCK)) >= 0

    def bytes(self) -> int:
        """Bytes of the disk that the set covers."""
        tail = self.size % BLOCK
        short = BLOCK - tail if tail and self.bits[-1] else 0
        return len(self) * BLOCK - short

    def runs(self, longest: int = 0) -> Iterator[tuple[int, int]]:
        """(offset, length) of neighbouring blocks, ordered, clamped to the disk; at most `longest` bytes, 0 for any."""
        at = self.bits.find(1)
        while at >= 0:
            end = self.bits.find(0, at)
            end = len(self.bits) if end < 0 else end
            offset, stop = at * BLOCK, min(end * BLOCK, self.size)
            step = longest or (stop - offset)
            for start in range(offset, stop, step):
                yield start, min(step, stop - start)
            at = self.bits.find(1, end)

    def pack(self) -> bytes:
        """Small, for keeping. See `unpack`."""
        return zlib.compress(self.bits, 1)

    @classmethod
    def unpack(cls, size: int, packed: bytes) -> Blocks:
        bits = bytearray(zlib.decompress(packed))
        if len(bits) != count(size):
            raise ValueError(f"{len(bits)} blocks are kept, the disk has {count(size)}")
        return cls(size, bits)


def count(size: int) -> int:
    """Blocks of a disk of `size` bytes; the last one may be short."""
    return -(-size // BLOCK)


def _combine(a: bytearray, b: bytearray, what: Callable[[int, int], int]) -> bytearray:
    """Byte by byte, as one operation on long integers."""
    joined = what(int.from_bytes(a, "little"), int.from_bytes(b, "little"))
    return bytearray(joined.to_bytes(len(a), "little"))
