"""The leaf table: 16 bytes of BLAKE3 for every 64 KiB of a disk, and one root over it.

A leaf of zeros has the constant `ZERO` (16 zero bytes), not its BLAKE3 value: a table that was never written therefore
describes a disk that was never written, and neither needs initialising. No other content has that value but with
probability 2**-128. The last leaf of a disk may be short and is hashed as it is, without padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blake3 import blake3

from farshore.replication.ports import LEAF, Extent

ENTRY = 16  # bytes of table a leaf
ZERO = bytes(ENTRY)
_ZEROS = bytes(4 << 20)


def leaf_count(size: int) -> int:
    """Leaves of a disk of `size` bytes."""
    return -(-size // LEAF)


def table_size(size: int) -> int:
    """Bytes of the leaf table of a disk of `size` bytes."""
    return leaf_count(size) * ENTRY


def is_zero(data: bytes) -> bool:
    """Whether all bytes are zero. One memcmp per 4 MiB: some 10 GB/s."""
    if len(data) <= len(_ZEROS):
        return data == _ZEROS if len(data) == len(_ZEROS) else data == _ZEROS[: len(data)]
    return all(is_zero(data[at : at + len(_ZEROS)]) for at in range(0, len(data), len(_ZEROS)))


def leaf_hash(leaf: bytes) -> bytes:
    """The table's entry of one leaf."""
    return ZERO if is_zero(leaf) else blake3(leaf).digest(length=ENTRY)


def hashes(data: bytes) -> bytes:
    """The entries of consecutive leaves; `data` starts at a leaf's start."""
    if is_zero(data):
        return bytes(leaf_count(len(data)) * ENTRY)
    return b"".join(leaf_hash(data[at : at + LEAF]) for at in range(0, len(data), LEAF))


def root(table: bytes | bytearray | memoryview, size: int) -> str:
    """The digest of a whole disk: `b3:<hex>` over its size and its leaf table (72 ms per TiB of disk)."""
    length = table_size(size)
    if len(table) < length:
        raise ValueError(f"a table of {len(table)} bytes cannot describe a disk of {size} bytes")
    hasher = blake3(size.to_bytes(8, "little"))
    hasher.update(memoryview(table)[:length])
    return "b3:" + hasher.hexdigest()


def table_ranges(extents: Iterable[Extent]) -> list[Extent]:
    """The byte ranges of the table that describe leaf-aligned extents of the disk."""
    ranges: list[Extent] = []
    for extent in extents:
        first = extent.start // LEAF
        last = -(-(extent.start + extent.length) // LEAF)
        ranges.append(Extent(first * ENTRY, (last - first) * ENTRY))
    return ranges


def written(table: bytes | bytearray, size: int) -> Iterator[Extent]:
    """Extents of the disk whose leaves are not zero according to the table."""
    count = leaf_count(size)
    start: int | None = None
    block = 4096  # leaves looked at in one comparison
    index = 0
    while index < count:
        stop = min(count, index + block)
        part = bytes(table[index * ENTRY : stop * ENTRY])
        if is_zero(part):
            if start is not None:
                yield Extent(start * LEAF, (index - start) * LEAF)
                start = None
        else:
            for leaf in range(index, stop):
                at = (leaf - index) * ENTRY
                if part[at : at + ENTRY] == ZERO:
                    if start is not None:
                        yield Extent(start * LEAF, (leaf - start) * LEAF)
                        start = None
                elif start is None:
                    start = leaf
        index = stop
    if start is not None:
        yield Extent(start * LEAF, size - start * LEAF)
