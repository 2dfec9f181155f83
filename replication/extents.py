"""Runs of bytes of a disk: widened to leaves, merged, split. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from farshore.replication.ports import LEAF, Extent


def normalise(extents: Iterable[Extent], size: int, grain: int = LEAF) -> list[Extent]:
    """The same bytes as ordered, disjoint, non-touching extents, widened to `grain` and clamped to `size`.

    Widening covers the disk's end too: the last leaf may be short. What lies beyond the end is dropped.
    """
    spans: list[tuple[int, int]] = []
    for extent in extents:
        start = max(0, extent.start)
        end = min(extent.start + extent.length, size)
        if end <= start:
            continue
        spans.append((start // grain * grain, min(-(-end // grain) * grain, size)))
    spans.sort()
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return [Extent(start, end - start) for start, end in merged]


def total(extents: Iterable[Extent]) -> int:
    """Bytes covered, of disjoint extents."""
    return sum(extent.length for extent in extents)


def split(extents: Iterable[Extent], limit: int) -> Iterator[Extent]:
    """The same bytes in pieces of at most `limit`, cut at multiples of `limit` so that pieces stay aligned."""
    for extent in extents:
        at, end = extent.start, extent.start + extent.length
        while at < end:
            stop = min(end, (at // limit + 1) * limit)
            yield Extent(at, stop - at)
            at = stop


def bridge(extents: Sequence[Extent], gap: int) -> list[Extent]:
    """Ordered disjoint extents with gaps of at most `gap` bytes filled: fewer, larger runs."""
    joined: list[Extent] = []
    for extent in extents:
        if joined:
            last = joined[-1]
            if extent.start - (last.start + last.length) <= gap:
                joined[-1] = Extent(last.start, extent.start + extent.length - last.start)
                continue
        joined.append(extent)
    return joined
