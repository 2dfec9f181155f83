"""Trackers of a disk: what a bitmap's name says, and which bitmaps hold the changes since a point. Pure.

Every cut starts a new bitmap in the same transaction that stops the one before, so the bitmaps of a disk cover its
history without a gap. Their names say which part: the *line* is a random word made when tracking began anew, `first` and
`last` number the cuts of that line whose following interval the bitmap covers. A plain bitmap begins at cut `first` =
`last` and ends at the next cut; a joined one covers several intervals. The `mark` tells cuts of the same number apart that
were made by different processes of QEMU: an image that is brought back from a copy brings its old trackers with it, and
numbers are then given a second time. The tracker of a disk's state is `<line>:<cut>:<mark>`.

A superset of the changes is always right and a subset never: whatever is not exactly as this page says ends the line.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farshore.replication.ports import LEAF

_NAME = re.compile(
    r"farshore-(?P<machine>.+)\.(?P<line>[0-9a-f]{8})\.(?P<first>\d+)-(?P<last>\d+)\.(?P<mark>[0-9a-f]{8})"
)


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A bitmap of ours on a node, as QEMU describes it."""

    name: str
    machine: str
    line: str
    first: int
    last: int
    mark: str
    sound: bool  # QEMU vouches for it, nobody else uses it, and its grain is ours or finer
    recording: bool
    busy: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class Line:
    """An unbroken line of bitmaps, oldest first; the last one is recording."""

    word: str
    bitmaps: tuple[Bitmap, ...]

    @property
    def next(self) -> int:
        return self.bitmaps[-1].last + 1

    def since(self, cut: int, mark: str) -> tuple[Bitmap, ...]:
        """What covers everything from this cut on; () when no bitmap of the line begins with just this cut."""
        if not any((bitmap.first, bitmap.mark) == (cut, mark) for bitmap in self.bitmaps):
            return ()
        return tuple(bitmap for bitmap in self.bitmaps if bitmap.last >= cut)


def marked(line: str, cut: int, run: str) -> str:
    """The mark of a cut. `run` is a random word of the QEMU process: two workers that cut at the same time from the same
    line of the same process want the same name, so the transaction of the second one fails as a whole. For that reason
    names bear no epoch either."""
    return hashlib.sha256(f"{line}:{cut}:{run}".encode()).hexdigest()[:8]


def name(machine: str, line: str, first: int, last: int, mark: str) -> str:
    """The name of a bitmap; `mark` is that of its first cut."""
    return f"farshore-{machine}.{line}.{first}-{last}.{mark}"


def tracker(line: str, cut: int, mark: str) -> str:
    return f"{line}:{cut}:{mark}"


def parse_tracker(value: str | None) -> tuple[str, int, str] | None:
    """Line, cut and mark."""
    parts = (value or "").split(":")
    return (parts[0], int(parts[1]), parts[2]) if len(parts) == 3 and parts[1].isdecimal() else None


def read(described: Sequence[Mapping[str, Any]], machine: str) -> list[Bitmap]:
    """Our bitmaps for `machine` among those of a node (`dirty-bitmaps` of query-named-block-nodes)."""
    found: list[Bitmap] = []
    for item in described:
        match = _NAME.fullmatch(str(item.get("name") or ""))
        if match is None or match["machine"] != machine:
            continue
        broken = bool(item.get("inconsistent"))
        busy = bool(item.get("busy"))
        found.append(
            Bitmap(
                match[0],
                machine,
                match["line"],
                int(match["first"]),
                int(match["last"]),
                match["mark"],
                sound=not broken and not busy and 0 < int(item.get("granularity", 0)) <= LEAF,
                recording=bool(item.get("recording")),
                busy=busy,
                inconsistent=broken,
            )
        )
    return found


def line_of(found: Sequence[Bitmap]) -> tuple[Line | None, str]:
    """The one unbroken line among `found`, or None and why there is none, for a person."""
    if not found:
        return None, "the disk has no change tracking of ours: QEMU was restarted, or the disk is new"
    lines: list[Line] = []
    why = ""
    for word in dict.fromkeys(bitmap.line for bitmap in found):
        members = sorted((b for b in found if b.line == word), key=lambda bitmap: bitmap.first)
        why = _broken(members)
        if not why:
            lines.append(Line(word, tuple(members)))
    if len(lines) == 1:
        return lines[0], ""
    return None, "two workers began change tracking at the same time" if lines else why


def _broken(members: Sequence[Bitmap]) -> str:
    """Why these bitmaps, ordered, are no line; "" when they are."""
    for bitmap in members:
        if bitmap.inconsistent:
            return "change tracking is inconsistent after a crash of QEMU"
        if bitmap.busy:
            return "change tracking is in use by another program"
        if not bitmap.sound:
            return "change tracking is too coarse"
    for before, after in itertools.pairwise(members):
        if after.first != before.last + 1:
            return "a part of change tracking is missing"
        if before.recording:
            return "an old part of change tracking was switched on again"
    newest = members[-1]
    if not newest.recording or newest.first != newest.last:
        return "change tracking was switched off"
    return ""


def join_plan(line: Line, most: int) -> tuple[Bitmap, Bitmap] | None:
    """Two neighbours to be joined when the line has more than `most` bitmaps: the two oldest that do not record."""
    if len(line.bitmaps) <= max(most, 3):
        return None
    return line.bitmaps[0], line.bitmaps[1]
