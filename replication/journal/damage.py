"""What is known to be damaged: found by scrub or on use, kept as `<machine>/q/<hash>.json` until it hurts nobody any more.

A finding names an object or image, a disk and areas of it. The next cycle of a living source ships these areas again,
whatever the leaf table says, and notes its number in the finding (`healed`). Points in between that need the damaged bytes
stay damaged: reading them fails, and `Store.damage` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any, cast

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Backend
from farshore.replication.ports import Extent


class Part(StrEnum):
    """What is damaged."""

    SEGMENT = "segment"  # or a page of references
    REPLICA = "replica"  # the image of a disk
    BASE = "base"  # a frozen state
    ENTRY = "entry"  # of the log


@dataclass(frozen=True, slots=True)
class Finding:
    """Something damaged."""

    part: Part
    subject: str  # name of the segment or image ("image@snapshot" for a base), number of the entry
    disk: str
    areas: tuple[Extent, ...]
    text: str
    found_at: float  # unix seconds
    healed: int = 0  # number of the point that shipped the areas again; 0: none yet

    @property
    def id(self) -> str:
        where = ",".join(f"{e.start}+{e.length}" for e in self.areas)
        return sha256(f"{self.part}|{self.subject}|{self.disk}|{where}".encode()).hexdigest()[:24]


def of_error(error: FarshoreError, now: float) -> Finding | None:
    """The finding inside a ReplicaDamaged, None when it names nothing."""
    details = error.info.details
    if error.code is not Code.REPLICA_DAMAGED or "disk" not in details:
        return None
    areas = tuple(Extent(int(start), int(length)) for start, length in details.get("areas", ()))
    disk, text = str(details["disk"]), error.info.message
    if "segment" in details:
        return Finding(Part.SEGMENT, str(details["segment"]), disk, areas, text, now)
    if details.get("snapshot"):
        subject = f"{details['image']}@{details['snapshot']}"
        return Finding(Part.BASE, subject, disk, areas, text, now)
    if "image" in details:
        return Finding(Part.REPLICA, str(details["image"]), disk, areas, text, now)
    if "entry" in details:
        return Finding(Part.ENTRY, str(details["entry"]), disk, areas, text, now)
    return None


def note(backend: Backend, prefix: str, finding: Finding) -> None:
    """Keep a finding. One of an immutable object that was healed already stays so."""
    name = f"{prefix}q/{finding.id}.json"
    known = _parse(backend.get(name))
    if known is not None and known.healed and finding.part is not Part.REPLICA:
        return
    backend.put(name, _encode(finding))


def read(backend: Backend, prefix: str) -> list[Finding]:
    """All findings. Unreadable ones are left out: scrub finds their damage again."""
    found = (_parse(backend.get(stored.name)) for stored in backend.list(f"{prefix}q/"))
    return [finding for finding in found if finding is not None]


def healed(backend: Backend, prefix: str, finding: Finding, cycle: int) -> None:
    """Point `cycle` has the damaged areas again."""
    backend.put(f"{prefix}q/{finding.id}.json", _encode(replace(finding, healed=cycle)))


def forget(backend: Backend, prefix: str, finding: Finding) -> None:
    """What was damaged is gone or right again."""
    backend.delete(f"{prefix}q/{finding.id}.json")


def _encode(finding: Finding) -> bytes:
    return json.dumps(
        {
            "part": finding.part.value,
            "subject": finding.subject,
            "disk": finding.disk,
            "areas": [[e.start, e.length] for e in finding.areas],
            "text": finding.text,
            "found_at": finding.found_at,
            "healed": finding.healed,
        }
    ).encode()


def _parse(data: bytes | None) -> Finding | None:
    if data is None:
        return None
    try:
        raw = cast("dict[str, Any]", json.loads(data))
        areas = cast("Sequence[Sequence[int]]", raw["areas"])
        return Finding(
            Part(raw["part"]),
            str(raw["subject"]),
            str(raw["disk"]),
            tuple(Extent(int(start), int(length)) for start, length in areas),
            str(raw["text"]),
            float(raw["found_at"]),
            int(raw["healed"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
