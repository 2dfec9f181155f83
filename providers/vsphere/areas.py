"""Changed-block answers come in windows; here they are walked, checked for coverage, merged and clamped. Pure.

A missed byte would be a silent hole in every later recovery point, so anything odd in an answer raises NotCovered and
the disk is compared in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from farshore.replication.ports import Extent


class NotCovered(ValueError):
    """The answers do not cover the disk without gaps; the text says where."""


@dataclass(frozen=True, slots=True)
class Window:
    """One answer: it speaks of [start, start+length) and names what changed in there. Bytes."""

    start: int
    length: int
    areas: Sequence[tuple[int, int]]  # (start, length)


def collect(capacity: int, query: Callable[[int], Window]) -> list[Extent]:
    """All changed extents of a disk of `capacity` bytes: ordered, merged, within the disk.

    `query(offset)` asks for the window that begins at `offset`. Raises NotCovered when a window begins elsewhere, is
    empty, or names an area outside itself, or when the windows end before the disk does.
    """
    found: list[tuple[int, int]] = []
    offset = 0
    while offset < capacity:
        window = query(offset)
        end = window.start + window.length
        if window.start != offset:
            raise NotCovered(f"asked from offset {offset}, the answer begins at {window.start}")
        if window.length <= 0:
            raise NotCovered(f"the answer at offset {offset} covers nothing")
        for start, length in window.areas:
            if length < 0 or start < offset or start + length > end:
                raise NotCovered(f"area {start}+{length} lies outside the answer {offset}+{window.length}")
            found.append((start, length))
        offset = end
    if offset != capacity:
        raise NotCovered(f"the answers end at {offset}, the disk at {capacity}")
    return merge(found, capacity)


def merge(areas: Iterable[tuple[int, int]], capacity: int) -> list[Extent]:
    """Neighbouring and overlapping areas as one, in order, clamped to the disk."""
    out: list[Extent] = []
    for start, length in sorted(areas):
        end = min(start + length, capacity)
        if start >= end:
            continue
        if out and start <= out[-1].start + out[-1].length:
            last = out[-1]
            out[-1] = Extent(last.start, max(last.length, end - last.start))
        else:
            out.append(Extent(start, end - start))
    return out


def epoch(change_id: str) -> str:
    """The part of a change id that names the tracking epoch; the rest is opaque."""
    return change_id.rpartition("/")[0] or change_id
