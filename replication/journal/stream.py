"""Bytes out of composed regions: fetch, open, verify, hand on. Used by redo, readers, materialisation and scrub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Backend
from farshore.replication.journal import segment, table
from farshore.replication.journal.compose import Group, Journal, Piece, Region
from farshore.replication.ports import LEAF, Extent

FETCH = 4 << 20  # the most stored bytes of one request
_GAP = 64 << 10  # stored bytes that are read along to save a request

Sink = Callable[[int, bytes | memoryview], None]
"""(offset, bytes) of what is to be written. Called from several threads."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Pieces that one request brings."""

    key: str
    group: Group
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Copy:
    """A run of the base."""

    extent: Extent
    entries: bytes


def fetches(key: str, region: Region) -> Iterator[Fetch]:
    """What has to be fetched for a region, in requests of at most `FETCH` bytes."""
    for group in region.groups:
        batch: list[Piece] = []
        for piece in group.pieces:
            if batch:
                last, chunk = batch[-1].chunk, piece.chunk
                far = chunk.position - (last.position + last.stored) > _GAP
                if far or chunk.position + chunk.stored - batch[0].chunk.position > FETCH:
                    yield Fetch(key, group, batch)
                    batch = []
            batch.append(piece)
        if batch:
            yield Fetch(key, group, batch)


def deliver(journal: Journal, fetch: Fetch, sink: Sink) -> int:
    """Fetch, verify, hand on. Returns the bytes handed on. ReplicaDamaged."""
    group, first = fetch.group, fetch.pieces[0].chunk
    stored = memoryview(journal.payload(fetch.key, group.ref, group.index, first, fetch.pieces[-1].chunk))
    done = 0
    for piece in fetch.pieces:
        chunk = piece.chunk
        at = chunk.position - first.position
        data = segment.open_chunk(
            journal.keys, group.index, chunk, stored[at : at + chunk.stored], name=group.ref.name
        )
        view = memoryview(data)
        for run in piece.runs:
            sink(run.start, view[run.start - chunk.offset : run.start - chunk.offset + run.length])
            done += run.length
    return done


def copies(region: Region, most: int = 1 << 20) -> Iterator[Copy]:
    """What a region keeps of its base, in pieces."""
    for run in region.kept:
        at, end = run.start, run.start + run.length
        while at < end:
            stop = min(end, (at // most + 1) * most)
            first, last = (at - region.start) // LEAF, -(-(stop - region.start) // LEAF)
            yield Copy(Extent(at, stop - at), bytes(region.table[first * table.ENTRY : last * table.ENTRY]))
            at = stop


@contextlib.contextmanager
def blaming(image: str, snapshot: str, disk: str) -> Generator[None]:
    """A store that has lost an image says so in its own words: add what `damage` wants to know."""
    try:
        yield
    except FarshoreError as error:
        if error.code is not Code.REPLICA_DAMAGED or error.info.details:
            raise
        details: dict[str, object] = {"image": image, "disk": disk, "areas": []}
        if snapshot:
            details["snapshot"] = snapshot
        raise FarshoreError(error.code, error.info.message, subject=image, details=details) from error


def copy_base(
    backend: Backend,
    leaf_key: bytes,
    image: str,
    snapshot: str,
    copy: Copy,
    *,
    key: str,
    base_size: int,
    sink: Sink,
) -> int:
    """Read a run of the base, verify every leaf of it, hand it on. ReplicaDamaged names image and area."""
    extent = copy.extent
    there = max(0, min(extent.length, base_size - extent.start))
    with blaming(image, snapshot, key):
        data = backend.read(image, extent.start, there, snapshot)
    if there < extent.length:  # the disk grew inside its last leaf, of zeros
        data += bytes(extent.length - there)
    fresh = table.hashes(leaf_key, data)
    if fresh != copy.entries:
        wrong = list(table.differing(extent.start // LEAF, fresh, copy.entries))
        raise FarshoreError(
            Code.REPLICA_DAMAGED,
            f"{image}@{snapshot} is damaged: {wrong[0].length} bytes at {wrong[0].start} of disk {key} are not "
            "what was committed.",
            subject=image,
            details={
                "image": image,
                "snapshot": snapshot,
                "disk": key,
                "areas": [[e.start, e.length] for e in wrong[:100]],
            },
        )
    sink(extent.start, data)
    return extent.length
