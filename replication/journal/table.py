"""The leaf table: 16 bytes of keyed BLAKE3 for every 64 KiB of a disk, and a root over it.

A leaf of zeros has the constant `ZERO`, so a table of zeros describes a disk of zeros. The last leaf of a disk may be
short and is hashed as it is. The root is two levels deep: a digest for every page of 4,096 entries (a page of zeros has
a constant one), and one over size and page digests, so that a cycle pays for the pages it touched only.

`Table` keeps the entries in a mapped file: memory is bounded by `trim`, whatever the disk's size. The file is a cache
and needs no crash safety: whoever opens one compares its root with the root in the manifest, and computes it anew if they
differ.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from io import FileIO

from blake3 import blake3

from farshore.replication.ports import LEAF, Extent

ENTRY = 16
ZERO = bytes(ENTRY)
PAGE = 4096  # entries of a page: 64 KiB of table, 256 MiB of disk
_PAGE_BYTES = PAGE * ENTRY
_DIGEST = 32
_ZERO_PAGE = bytes(_PAGE_BYTES)
_ZERO_LEAF = bytes(LEAF)
_TRIM = 256  # pages (16 MiB) that a root reads before they are given back
_UNDO = 1 << 18  # entries that can be taken back; more: the table is read anew


def leaf_count(size: int) -> int:
    """Leaves of a disk of `size` bytes."""
    return -(-size // LEAF)


def hashes(key: bytes, data: bytes | bytearray | memoryview) -> bytes:
    """The entries of leaf-aligned bytes."""
    body = data if isinstance(data, bytes) else bytes(data)
    if len(body) <= LEAF:
        return leaf_hash(key, body)
    view = memoryview(body)
    found: list[bytes] = []
    for at in range(0, len(body), LEAF):
        # `startswith` is one memcmp; comparing views is ten times slower.
        if body.startswith(_ZERO_LEAF, at):
            found.append(ZERO)
        elif at + LEAF > len(body):
            found.append(leaf_hash(key, body[at:]))
        else:
            found.append(blake3(view[at : at + LEAF], key=key).digest(length=ENTRY))
    return b"".join(found)


def leaf_hash(key: bytes, leaf: bytes) -> bytes:
    """The entry of one leaf."""
    zeros = leaf == _ZERO_LEAF if len(leaf) == LEAF else leaf == bytes(len(leaf))
    return ZERO if zeros else blake3(leaf, key=key).digest(length=ENTRY)


def all_zero(entries: bytes | bytearray) -> bool:
    """Whether these are zeros only."""
    return all(
        entries.startswith(_ZERO_PAGE[: min(_PAGE_BYTES, len(entries) - at)], at)
        for at in range(0, len(entries), _PAGE_BYTES)
    )


class Root:
    """Computes the root from entries that come in order."""

    def __init__(self, key: bytes, size: int) -> None:
        self._key = key
        self._hasher = blake3(size.to_bytes(8, "little"), key=key)
        self._left = leaf_count(size) * ENTRY
        self._rest = b""

    def update(self, entries: bytes | bytearray) -> None:
        self._left -= len(entries)
        body = self._rest + bytes(entries)
        whole = len(body) // _PAGE_BYTES * _PAGE_BYTES
        for at in range(0, whole, _PAGE_BYTES):
            self._hasher.update(page_digest(self._key, body[at : at + _PAGE_BYTES]))
        self._rest = body[whole:]

    def text(self) -> str:
        """After the last update."""
        if self._left:
            raise ValueError("entries are missing")
        if self._rest:
            self._hasher.update(page_digest(self._key, self._rest))
            self._rest = b""
        return "k3:" + self._hasher.hexdigest()


def page_digest(key: bytes, page: bytes) -> bytes:
    """Digest of up to 4,096 entries; zeros for zeros."""
    return bytes(_DIGEST) if all_zero(page) else blake3(page, key=key).digest()


class Table:
    """The leaf table of one disk in a file. Entries of different leaves may be written from several threads."""

    def __init__(self, key: bytes, file: FileIO, size: int) -> None:
        """`file`: open for reading and writing, unbuffered; closed with the table, or with the last reference to it."""
        self._key = key
        self._file = file
        self._map = mmap.mmap(-1, ENTRY)
        self._undo: list[tuple[int, bytes]] | None = None
        self._undone = 0
        self.lost = True  # until `accept`: nobody has proved yet what it holds
        self._size = 0
        self._digests = bytearray()
        self._dirty: set[int] = set()
        self._open(size)

    def _open(self, size: int) -> None:
        self._map.close()
        self._size = size
        length = max(1, leaf_count(size)) * ENTRY
        self._file.truncate(length)
        self._map = mmap.mmap(self._file.fileno(), length)
        pages = -(-length // _PAGE_BYTES)
        self._digests = bytearray(pages * _DIGEST)
        self._dirty = set(range(pages))

    @property
    def size(self) -> int:
        """Of the disk, bytes."""
        return self._size

    def resize(self, size: int) -> None:
        """New leaves are zeros. A leaf that is cut or completed differs from its entry: entries depend on the length too."""
        if size != self._size:
            self.lost = True
            self._open(size)

    def clear(self) -> None:
        """All leaves zeros."""
        self._map.close()
        self._file.truncate(0)
        self._open(self._size)

    def get(self, first: int, count: int) -> bytes:
        return self._map[first * ENTRY : (first + count) * ENTRY]

    def put(self, first: int, entries: bytes | memoryview) -> None:
        if not entries:
            return
        start, end = first * ENTRY, first * ENTRY + len(entries)
        if self._undo is not None:
            if self._undone + len(entries) // ENTRY > _UNDO:
                self.lost = True
            else:
                self._undone += len(entries) // ENTRY
                self._undo.append((start, self._map[start:end]))
        self._map[start:end] = entries
        self._dirty.update(range(start // _PAGE_BYTES, (end - 1) // _PAGE_BYTES + 1))

    def begin(self) -> None:
        """From here on what is written can be taken back."""
        self._undo = []
        self._undone = 0

    def accept(self) -> None:
        """It holds what it should; what was written since `begin` stands."""
        self._undo = None
        self.lost = False

    def take_back(self) -> bool:
        """Undo what was written since `begin`; False: too much, the table is good for nothing now."""
        undo, self._undo = self._undo, None
        if self.lost or undo is None:
            return undo is None and not self.lost
        for start, old in reversed(undo):
            self.put(start // ENTRY, old)
        return True

    def root(self) -> str:
        used = leaf_count(self._size) * ENTRY
        for number, page in enumerate(sorted(self._dirty), 1):
            if number % _TRIM == 0:
                self.trim()  # of a new table every page is looked at
            part = self._map[page * _PAGE_BYTES : min(used, (page + 1) * _PAGE_BYTES)]
            self._digests[page * _DIGEST : (page + 1) * _DIGEST] = page_digest(self._key, part)
        self._dirty.clear()
        hasher = blake3(self._size.to_bytes(8, "little"), key=self._key)
        hasher.update(bytes(self._digests[: -(-used // _PAGE_BYTES) * _DIGEST]))
        return "k3:" + hasher.hexdigest()

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """(first leaf, entries) over the whole table, page by page."""
        count = leaf_count(self._size)
        for first in range(0, count, PAGE):
            yield first, self.get(first, min(PAGE, count - first))

    def trim(self) -> None:
        """Give mapped pages back to the page cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        if not self._map.closed:
            self._map.close()
            self._file.close()


def differing(first: int, mine: bytes, other: bytes) -> Iterator[Extent]:
    """Runs of leaves (as extents of the disk, whole leaves) whose entries differ."""
    if mine == other:
        return
    start: int | None = None
    count = len(mine) // ENTRY
    for leaf in range(count):
        same = mine[leaf * ENTRY : (leaf + 1) * ENTRY] == other[leaf * ENTRY : (leaf + 1) * ENTRY]
        if not same and start is None:
            start = leaf
        elif same and start is not None:
            yield Extent((first + start) * LEAF, (leaf - start) * LEAF)
            start = None
    if start is not None:
        yield Extent((first + start) * LEAF, (count - start) * LEAF)
