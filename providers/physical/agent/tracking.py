"""The port of change tracking, and the book of generations that every tracker keeps.

A *mark* is an instant, numbered upwards. Between two marks lies a *generation*: the blocks written in between. A disk's
state is named by a tracker id, `<kind>:<life>:<mark>`; `life` changes whenever the tracker cannot vouch for what happened
before (restart, lost events, another device), and then ids of the former life are answered with `NotKnown`.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from farshore.providers.physical.agent.blocks import Blocks
from farshore.providers.physical.agent.disks import Device

KEPT = 64  # generations; older neighbours are joined, which answers with more, never with less


class NotKnown(Exception):
    """The changes since a state cannot be told: every byte has to be compared. `reason` is for a person."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ChangeSource(Protocol):
    """Tracks what is written to a set of disks."""

    @property
    def kind(self) -> str: ...
    def watch(self, devices: Mapping[str, Device]) -> None:
        """Track these disks from now on. A disk whose device is another one than before begins a new life."""
        ...

    def mark(self) -> dict[str, str]:
        """One instant over all disks; returns a tracker id by disk key. Every write that was submitted before the call is
        in an older generation, every write submitted after it in a newer one. Events that were lost begin a new life."""
        ...

    def changed(self, key: str, since: str, until: str = "", *, carry: float = 0.0) -> Blocks:
        """Blocks written between two marks, or between one and now; a superset. NotKnown.

        `carry`: also what was written in that many seconds before `since`. A write that was submitted before a mark may
        reach the disk after it, unless the mark was taken under a freeze.
        """
        ...

    def tidy(self) -> None:
        """A moment in which work that can wait may be done."""
        ...

    def stop(self, *, clean: bool) -> None:
        """End. After a clean stop a successor in the same boot may go on from the state that was kept."""
        ...


def parse(tracker: str) -> tuple[str, str, int]:
    """Kind, life and mark of a tracker id. NotKnown for anything else."""
    parts = tracker.split(":")
    if len(parts) != 3 or not parts[2].isdecimal():
        raise NotKnown("the last point has no state of change tracking that this agent knows")
    return parts[0], parts[1], int(parts[2])


@dataclass(slots=True)
class _Generation:
    begin: int  # mark
    end: int
    bits: bytes | Blocks  # packed as soon as there is time for it
    ended: float  # monotonic clock, valid within one boot as everything here

    def blocks(self, size: int) -> Blocks:
        return self.bits if isinstance(self.bits, Blocks) else Blocks.unpack(size, self.bits)


@dataclass(slots=True)
class Book:
    """What one disk's tracker knows in one life. Its owner locks."""

    kind: str
    device: Device
    life: str = field(default_factory=lambda: uuid.uuid4().hex)
    first: int = 0  # the mark of the life's beginning
    now: int = 0  # the newest mark
    current: Blocks = field(init=False)
    generations: list[_Generation] = field(default_factory=list[_Generation])

    def __post_init__(self) -> None:
        self.current = Blocks(self.device.size)

    def mark(self) -> str:
        """End the current generation. Quick: it runs inside the freeze."""
        self.generations.append(_Generation(self.now, self.now + 1, self.current, time.monotonic()))
        self.current = Blocks(self.device.size)
        self.now += 1
        return self.id

    @property
    def id(self) -> str:
        return f"{self.kind}:{self.life}:{self.now}"

    def mark_of(self, tracker: str) -> int:
        """The mark that an id names, when it is of this life. NotKnown."""
        kind, life, mark = parse(tracker)
        if kind != self.kind:
            raise NotKnown(f"changes were tracked by {kind} then and are tracked by {self.kind} now")
        if life != self.life:
            raise NotKnown("change tracking began anew since the last point")
        if not self.first <= mark <= self.now:
            raise NotKnown("the last point is newer than what this agent remembers")
        return mark

    def changed(self, since: int, until: int | None, carry: float = 0.0) -> Blocks:
        """Blocks of all generations that reach into the time between two marks; None: until now."""
        found = Blocks(self.device.size)
        if carry:
            at = next((g.ended for g in self.generations if g.end == since), None)
            if at is not None:
                # A generation that ended before the window cannot hold a write of the window.
                since = min((g.begin for g in self.generations if g.ended > at - carry), default=since)
        for generation in self.generations:
            if generation.end > since and (until is None or generation.begin < until):
                found.update(generation.blocks(self.device.size))
        if until is None or until > self.now:
            found.update(self.current)
        return found

    def tidy(self) -> None:
        """Pack generations and join the oldest. Outside of any freeze."""
        for generation in self.generations:
            if isinstance(generation.bits, Blocks):
                generation.bits = generation.bits.pack()
        while len(self.generations) > KEPT:
            old, new = self.generations[0], self.generations[1]
            joined = old.blocks(self.device.size)
            joined.update(new.blocks(self.device.size))
            self.generations[:2] = [_Generation(old.begin, new.end, joined.pack(), new.ended)]

    def dump(self) -> dict[str, Any]:
        """JSON-ready. See `load`."""
        self.tidy()
        return {
            "device": self.device.dump(),
            "life": self.life,
            "first": self.first,
            "now": self.now,
            "current": base64.b64encode(self.current.pack()).decode(),
            "generations": [
                [g.begin, g.end, base64.b64encode(g.blocks(self.device.size).pack()).decode(), g.ended]
                for g in self.generations
            ],
        }

    @classmethod
    def load(cls, kind: str, device: Device, kept: Mapping[str, Any]) -> Book:
        """ValueError or KeyError when it does not fit the device."""
        if kept["device"] != device.dump():
            raise ValueError("the device is another one")
        book = cls(kind, device, life=str(kept["life"]), first=int(kept["first"]), now=int(kept["now"]))
        book.current = Blocks.unpack(device.size, base64.b64decode(kept["current"]))
        for begin, end, packed, ended in kept["generations"]:
            blocks = Blocks.unpack(device.size, base64.b64decode(packed))
            book.generations.append(_Generation(int(begin), int(end), blocks.pack(), float(ended)))
        return book
