"""The log of a machine: which entries count, who holds what, what is about to vanish.

Small objects below `<machine>/`, whose name is percent-encoded where needed:

    m/<number>.json            an entry, see `entries`
    h/<holder hash>-<cycle>    a hold: this point is in use, perhaps only until an instant (a lease)
    x/<epoch>-<n>              a doom: these points are removed

**A point exists if and only if** its entry exists, matches its digest, continues the entry before it (where that one is of
the same epoch and still kept), belongs to an epoch that was opened below it, and no doom names it. The same holds for
bases but for dooms.

**Why a stale writer never commits.** A writer gives its entries the numbers after its opening, one by one, and never reads
the log again to choose one. A new owner's opening takes the first free number, which is the former owner's next one:
creation-if-absent has one winner. If the opening wins, the former owner's next entry, point or base, finds the number
taken and stops for good. If the entry wins, it was in time: the opening goes one number further and the new owner starts
from there. Openings are kept for a week after their epoch ended, so the number does not become free again while any former
owner could still be asleep, and the newest one always is, so numbers never fall. Numbers of pruned points do become free,
but none of them is ever a former owner's next number. A machine that was removed and protected again gets new epochs, which
are never below the unix time: an entry from its former life belongs to no epoch of this one, and images carry higher
fences.

**Removal has two phases.** A doom takes points out of the lists at once; their entries and segments stay, because younger
points may need them, and because somebody may be reading: `prune` deletes them after a grace period. Holds and dooms cannot
miss each other. Remover: write the doom, open; look for holds; write it again, decided, without those that are held.
Holder: write the hold, then look for dooms. Whichever order they interleave in, at least one sees the other; when both do,
the point stays and the holder is told to choose again. A doom whose maker died while it was open is decided by the next
owner, and until then spares what is held. A decided one spares nothing: what it names may be gone already.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import RecoveryPoint
from farshore.replication.backend import Backend, Stored
from farshore.replication.journal.entries import (
    Base,
    Entry,
    Manifest,
    Opening,
    cycle_of,
    decode,
    encode,
    entry_name,
    point_id,
    safe_name,
    to_point,
)

_FETCH_AHEAD = 8  # requests at a time


@dataclass(frozen=True, slots=True)
class Hold:
    """Who uses a point, since when and until when (unix seconds, None: until it is given back)."""

    holder: str  # hash
    at: float
    until: float | None

    def counts(self, now: float) -> bool:
        return self.until is None or self.until > now


@dataclass(frozen=True, slots=True)
class Doom:
    """Points that are removed."""

    cycles: tuple[int, ...]
    decided: bool
    at: float  # unix seconds


@dataclass(frozen=True, slots=True)
class View:
    """The log as one listing showed it."""

    top: int  # highest number taken, 0 when empty
    entries: Mapping[int, tuple[Entry, str]]  # intact ones, with their digests
    damaged: frozenset[int]
    manifests: Mapping[int, tuple[Manifest, str]]  # valid ones, ascending; removed ones included
    bases: tuple[Base, ...]  # valid ones, ascending
    held: Mapping[int, tuple[Hold, ...]]  # those that count
    dooms: Mapping[str, Doom]

    @property
    def doomed(self) -> dict[int, float]:
        """Cycles that are no points any more, and since when."""
        found: dict[int, float] = {}
        for doom in self.dooms.values():
            for cycle in doom.cycles:
                if doom.decided or not self.held.get(cycle):
                    found[cycle] = max(doom.at, found.get(cycle, doom.at))
        return found

    @property
    def points(self) -> list[tuple[Manifest, str]]:
        """Those that exist, oldest first."""
        gone = self.doomed
        return [pair for cycle, pair in self.manifests.items() if cycle not in gone]

    @property
    def head(self) -> Manifest | None:
        """The newest point."""
        points = self.points
        return points[-1][0] if points else None

    @property
    def openings(self) -> list[Opening]:
        """Ascending by number."""
        return [entry for _, (entry, _) in sorted(self.entries.items()) if isinstance(entry, Opening)]

    def listed(self) -> list[RecoveryPoint]:
        """What users see, oldest first."""
        return [
            to_point(manifest, digest, pinned=bool(self.held.get(manifest.cycle)))
            for manifest, digest in self.points
        ]


class Log:
    """One machine's log in a backend. Safe to share between threads."""

    def __init__(self, backend: Backend, machine: str) -> None:
        self.machine = machine
        self.prefix = safe_name(machine) + "/"
        self._backend = backend
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[str, object]] = {}

    def name(self, number: int) -> str:
        return self.prefix + entry_name(number)

    def create(self, entry: Entry) -> bool:
        """Append if the entry's number is free."""
        return self._backend.create(self.name(entry.number), encode(entry))

    def get(self, at: int) -> bytes | None:
        return self._backend.get(self.name(at))

    def delete(self, at: int) -> None:
        self._backend.delete(self.name(at))

    def read(self, now: float) -> View:
        """Read everything. Only what is unknown so far is fetched. `now` (unix seconds) decides about leases."""
        entries: dict[int, tuple[Entry, str]] = {}
        damaged: set[int] = set()
        held: dict[int, list[Hold]] = {}
        dooms: dict[str, Doom] = {}
        top = 0
        listing = [stored for kind in "mhx" for stored in self._backend.list(f"{self.prefix}{kind}/")]
        self._fetch_ahead(listing)
        for stored in listing:
            kind, _, rest = stored.name[len(self.prefix) :].partition("/")
            found, present = self._parsed(stored)
            if kind == "m" and rest.endswith(".json") and rest[:-5].isdecimal():
                at = int(rest[:-5])
                top = max(top, at)
                if found is not None:
                    entries[at] = cast("tuple[Entry, str]", found)
                elif present:
                    damaged.add(at)
            elif kind == "h" and isinstance(found, Hold):
                cycle = rest.rpartition("-")[2]
                if cycle.isdecimal() and found.counts(now):
                    held.setdefault(int(cycle), []).append(found)
            elif kind == "x" and isinstance(found, Doom):
                dooms[stored.name] = found
        seen = {stored.name for stored in listing}
        with self._lock:
            for name in [name for name in self._cache if name not in seen]:
                del self._cache[name]
        manifests, bases = _valid(entries, damaged)
        return View(
            top=top,
            entries=entries,
            damaged=frozenset(damaged),
            manifests=manifests,
            bases=bases,
            held={cycle: tuple(holds) for cycle, holds in held.items()},
            dooms=dooms,
        )

    def _fetch_ahead(self, listing: Sequence[Stored]) -> None:
        """A new process knows nothing yet: fetch many at a time instead of one after the other."""
        with self._lock:
            unknown = [stored for stored in listing if stored.name not in self._cache]
        if len(unknown) < _FETCH_AHEAD:
            return
        with ThreadPoolExecutor(_FETCH_AHEAD, thread_name_prefix="log") as pool:
            for done in [pool.submit(self._parsed, stored) for stored in unknown]:
                done.result()

    def _parsed(self, stored: Stored) -> tuple[object, bool]:
        """What the object says (None when damaged), and whether it is still there."""
        with self._lock:
            known = self._cache.get(stored.name)
        if known is not None and known[0] == stored.version:
            return known[1], True
        data = self._backend.get(stored.name)
        if data is None:  # removed between listing and reading
            return None, False
        kind, _, rest = stored.name[len(self.prefix) :].partition("/")
        found: object = None
        if kind == "m":
            found = self._decode(stored.name, rest, data)
        elif kind == "h":
            found = _to_hold(rest, data)
        elif kind == "x":
            found = _to_doom(data)
        with self._lock:
            self._cache[stored.name] = (stored.version, found)
        return found, True

    def _decode(self, name: str, rest: str, data: bytes) -> tuple[Entry, str] | None:
        try:
            entry, digest = decode(data, name=name)
        except FarshoreError:
            return None
        if entry_name(entry.number) != f"m/{rest}" or entry.machine != self.machine:
            return None
        return entry, digest

    # points -------------------------------------------------------------------------------------------------------

    def manifest(self, id_of_point: str, view: View) -> Manifest:
        """PointNotFound, ReplicaDamaged."""
        cycle = cycle_of(id_of_point)
        if cycle is not None and cycle in view.damaged:
            raise FarshoreError(
                Code.REPLICA_DAMAGED,
                f"The manifest of point {id_of_point} of {self.machine} does not match its digest.",
                subject=self.machine,
            )
        for manifest, digest in view.points:
            if point_id(manifest.cycle, digest) == id_of_point:
                return manifest
        raise FarshoreError(
            Code.POINT_NOT_FOUND,
            f"{self.machine} has no recovery point {id_of_point!r}.",
            subject=self.machine,
        )

    # holds --------------------------------------------------------------------------------------------------------

    def hold(self, id_of_point: str, holder: str, now: float, seconds: float | None = None) -> None:
        """Hold a point, for so many seconds or until it is given back; again: renew. See the module for the order. A hold
        that is there already proves nothing, its maker may have died before it looked: put and look again."""
        cycle = self.manifest(id_of_point, self.read(now)).cycle
        name = f"{self.prefix}h/{holder_hash(holder)}-{cycle:010d}"
        since = self._held_since(name, now)
        body = {
            "holder": holder,
            "point": id_of_point,
            "at": since,
            "until": None if seconds is None else now + seconds,
        }
        self._backend.put(name, json.dumps(body).encode())
        view = self.read(now)
        condemned = {cycle for doom in view.dooms.values() for cycle in doom.cycles}
        if cycle in condemned or cycle not in view.manifests:
            self._backend.delete(name)
            raise FarshoreError(
                Code.POINT_EXPIRED,
                f"Retention removed point {id_of_point} of {self.machine} before it could be held.",
                subject=self.machine,
            )

    def _held_since(self, name: str, now: float) -> float:
        """A renewed hold keeps its age, unless it had run out."""
        data = self._backend.get(name)
        known = _to_hold(name.rpartition("/")[2], data) if data is not None else None
        return known.at if known is not None and known.counts(now) else now

    def release(self, holder: str) -> None:
        """Give back all holds of a holder."""
        for stored in self._backend.list(f"{self.prefix}h/{holder_hash(holder)}-"):
            self._backend.delete(stored.name)

    # removal ------------------------------------------------------------------------------------------------------

    def doom(self, name: str, cycles: Iterable[int], now: float) -> list[int]:
        """Remove points from the lists, but those that are held. Returns those that are removed now."""
        wanted = sorted(set(cycles))
        self._put_doom(name, wanted, decided=False, now=now)
        view = self.read(now)
        free = [cycle for cycle in wanted if not view.held.get(cycle)]
        if free:
            self._put_doom(name, free, decided=True, now=now)
        else:
            self._backend.delete(name)
        return free

    def _put_doom(self, name: str, cycles: Sequence[int], *, decided: bool, now: float) -> None:
        body = {"cycles": list(cycles), "decided": decided, "at": now}
        self._backend.put(name, json.dumps(body).encode())


def holder_hash(holder: str) -> str:
    """What stands for a holder in names."""
    return sha256(holder.encode()).hexdigest()[:16]


def _to_hold(rest: str, data: bytes) -> Hold:
    holder = rest.rpartition("-")[0]
    try:
        raw = cast("dict[str, Any]", json.loads(data))
        until = raw["until"]
        return Hold(holder, float(raw["at"]), None if until is None else float(until))
    except (ValueError, KeyError, TypeError):
        return Hold(holder, 0.0, None)  # unreadable: it holds until it is given back, and since ever


def _to_doom(data: bytes) -> Doom:
    try:
        raw = cast("dict[str, Any]", json.loads(data))
        cycles = tuple(int(cycle) for cycle in cast("Sequence[Any]", raw["cycles"]))
        return Doom(cycles, bool(raw["decided"]), float(raw["at"]))
    except (ValueError, KeyError, TypeError):
        return Doom((), False, 0.0)  # torn: its removal never began


def _valid(
    entries: Mapping[int, tuple[Entry, str]], damaged: set[int]
) -> tuple[dict[int, tuple[Manifest, str]], tuple[Base, ...]]:
    manifests: dict[int, tuple[Manifest, str]] = {}
    bases: list[Base] = []
    opened: set[int] = set()
    unknown_openings = False
    for at in sorted({*entries, *damaged}):
        if at in damaged:
            unknown_openings = True  # it may have been an opening: what follows must not vanish with it
            continue
        entry, digest = entries[at]
        if isinstance(entry, Opening):
            opened.add(entry.epoch)
            continue
        if entry.epoch not in opened and not unknown_openings:
            continue
        before = entries.get(at - 1)
        if before is not None and before[0].epoch == entry.epoch and before[1] != entry.parent:
            continue
        if isinstance(entry, Base):
            bases.append(entry)
        else:
            manifests[at] = (entry, digest)
    return manifests, tuple(bases)
