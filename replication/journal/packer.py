"""Packs the chunks of one disk and one cycle into segments and stores them. For several threads.

A worker brings the bytes of a chunk, compressed or not. Under the lock it gets a place in the open segment; it encrypts
outside of it. Whoever completes a segment that is full stores it, while others fill the next one. Memory: at most
`workers + 1` segments. References to finished segments leave in pages (see `entries`), so that a first copy of any size
keeps only a few thousand of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from farshore.replication.backend import Backend
from farshore.replication.journal import entries
from farshore.replication.journal.entries import PageRef, SegmentRef
from farshore.replication.journal.keys import SALT, Keys, Random
from farshore.replication.journal.segment import Builder, ChunkKind, Place


class Packer:
    """See the module."""

    def __init__(
        self,
        backend: Backend,
        prefix: str,
        place: Place,
        keys: Keys,
        *,
        random: Random,
        adopted: Sequence[SegmentRef] = (),
        take: Callable[[int], None] | None = None,
    ) -> None:
        """`adopted` come before everything that is packed here. `take` waits for the right to send so many bytes."""
        self._backend = backend
        self._prefix = prefix
        self._place = place
        self._keys = keys
        self._random = random
        self._take = take
        self._lock = threading.Lock()
        self._builder: Builder | None = None
        self._serial = 0
        self._segments: list[SegmentRef] = list(adopted)
        self._pages: list[PageRef] = []
        self.stored = 0  # bytes of objects
        self._roll_pages()

    def zeros(self, offset: int, length: int) -> None:
        """A run of zeros of the disk."""
        done = None
        with self._lock:
            builder = self._current()
            builder.add_zeros(offset, length)
            if builder.full:
                done = self._detach()
        self._store(done)

    def chunk(
        self, offset: int, length: int, kind: ChunkKind, data: bytes | memoryview, digests: bytes
    ) -> None:
        """A chunk that is not zeros."""
        with self._lock:
            builder = self._current()
            nonce = builder.reserve(offset, length, kind, len(data), digests)
            if builder.full:
                self._builder = None
        sealed = builder.seal_chunk(nonce, offset, length, kind, data)
        with self._lock:
            builder.put(nonce, sealed)
            # It is ours to store if nobody can add to it any more and nothing is missing.
            complete = builder if builder is not self._builder and builder.open == 0 else None
        self._store(complete)

    def finish(self) -> tuple[tuple[SegmentRef, ...], tuple[PageRef, ...]]:
        """Store what is open. No worker may be at work any more."""
        with self._lock:
            builder = self._detach()
        self._store(builder)
        if len(self._segments) > entries.INLINE:
            self._roll_pages(at_least=1)
        return tuple(self._segments), tuple(self._pages)

    def _current(self) -> Builder:
        if self._builder is None:
            self._builder = Builder(self._place, self._keys, self._random(SALT))
        return self._builder

    def _detach(self) -> Builder | None:
        """The open segment, if it is complete; else its last worker stores it."""
        builder, self._builder = self._builder, None
        return builder if builder is not None and builder.open == 0 and not builder.empty else None

    def _store(self, builder: Builder | None) -> None:
        if builder is None:
            return
        data, digest, index, start, end = builder.finish()
        with self._lock:
            serial = self._serial
            self._serial += 1
        name = entries.segment_name(self._place.epoch, self._place.cycle, self._place.disk, serial, digest)
        if self._take is not None:
            self._take(len(data))
        store(self._backend, self._prefix + name, data)
        with self._lock:
            self.stored += len(data)
            self._segments.append(SegmentRef(name, start, end, len(data), index))
            self._roll_pages()

    def _roll_pages(self, at_least: int = entries.ROWS) -> None:
        while len(self._segments) >= at_least:
            rows, self._segments = self._segments[: entries.ROWS], self._segments[entries.ROWS :]
            page, data = entries.page(self._place.epoch, self._place.cycle, self._place.disk, rows)
            store(self._backend, self._prefix + page.name, data)
            self._pages.append(page)


def store(backend: Backend, name: str, data: bytes) -> None:
    """Create an object whose name is unique. That it exists already means that an earlier request of ours arrived."""
    if not backend.create(name, data) and backend.get(name) != data:
        raise AssertionError(f"{name} exists with other bytes")
