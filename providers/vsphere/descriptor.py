"""The text descriptor of a virtual disk: which file holds the bytes of which range.

Only extents whose file offsets are disk offsets can be read by range: type VMFS (a flat extent on VMFS) and FLAT.
Anything else (SESPARSE, VMFSSPARSE, SPARSE, RDM, a vSAN or vVol object) is refused with a reason.
Source: the Virtual Disk Format description of VMware, sections "The Header" and "The Extent Description".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SECTOR = 512
_EXTENT = re.compile(r'^(RW|RDONLY|NOACCESS)\s+(\d+)\s+(\w+)(?:\s+"([^"]*)"(?:\s+(\d+))?)?\s*$')
_READABLE = frozenset({"VMFS", "FLAT"})


class UnreadableDisk(ValueError):
    """The descriptor names no bytes that a range request could read; the text tells a person why."""


@dataclass(frozen=True, slots=True)
class FlatExtent:
    """A range of the disk and the file that holds it. Bytes."""

    start: int
    length: int
    file: str  # relative to the descriptor's folder
    file_offset: int


def parse(text: str) -> tuple[str, tuple[FlatExtent, ...]]:
    """`createType` and the readable extents in disk order. Raises UnreadableDisk."""
    if "# Disk DescriptorFile" not in text[:512]:
        raise UnreadableDisk("it is not a disk descriptor")
    create_type = ""
    extents: list[FlatExtent] = []
    position = 0
    for raw in text.splitlines():
        line = raw.strip()
        if line.lower().startswith("createtype"):
            create_type = line.partition("=")[2].strip().strip('"')
        match = _EXTENT.match(line)
        if match is None:
            continue
        access, sectors, kind, file, offset = match.groups()
        length = int(sectors) * SECTOR
        if kind not in _READABLE or access == "NOACCESS":
            raise UnreadableDisk(f"its extent is of type {kind}, whose bytes cannot be read by range")
        if not file or "://" in file:
            raise UnreadableDisk(f"its bytes are in an object store ({file or 'no file'}), not in a file")
        if file.startswith("/"):
            raise UnreadableDisk(f"its extent {file} lies outside its folder")
        extents.append(FlatExtent(position, length, file, int(offset or 0) * SECTOR))
        position += length
    if not extents:
        raise UnreadableDisk(f"its descriptor (type {create_type or 'unknown'}) names no extent")
    if re.search(r"^\s*parentCID\s*=\s*(?!ffffffff\b)[0-9a-f]+", text, re.IGNORECASE | re.MULTILINE):
        raise UnreadableDisk("it is a link on top of another disk, not a base disk")
    return create_type, tuple(extents)


def pieces(extents: tuple[FlatExtent, ...], offset: int, length: int) -> list[tuple[str, int, int]]:
    """(file, offset in file, length) of a range of the disk, in order. ValueError outside the disk."""
    out: list[tuple[str, int, int]] = []
    end = offset + length
    for extent in extents:
        low, high = max(offset, extent.start), min(end, extent.start + extent.length)
        if low < high:
            out.append((extent.file, extent.file_offset + low - extent.start, high - low))
    if sum(piece[2] for piece in out) != length:
        raise ValueError(f"range {offset}+{length} is outside the disk")
    return out
