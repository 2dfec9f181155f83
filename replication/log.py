"""The log of a machine: which entries count, who holds what, what is about to vanish.

Small objects below `<machine>/`, whose name is percent-encoded where needed:

    m/<number>.json            an entry: a recovery point, or the opening of an epoch
    h/<holder hash>-<cycle>    a hold: this point is in use
    x/<epoch>-<n>              a doom: these points are being removed
    w/<cycle>/<disk>/<n>       a window: these extents of a replica disk are being written (see `replica`)

**A point exists if and only if** its entry exists, matches its digest, continues the entry before it (where that one is
of the same epoch and still kept) and belongs to an epoch that was opened below it.

**Why a stale writer never commits.** A writer gives its points the numbers after its opening, one by one, and never
reads the log again to choose one. A new owner's opening takes the first free number, which is the former owner's next
one: creation-if-absent has one winner. If the opening wins, the former owner's next commit finds the number taken and
stops for good. If the commit wins, it was in time: the opening goes one number further and the new owner starts from
that point. Openings are kept for a week after their epoch ended, so the number does not become free again while any
former owner could still be asleep. Numbers of pruned points do become free, but none of them is ever a former owner's
next number; an opening that a dreaming owner puts there is not the newest entry, which it notices, and hurts nobody.
A machine that was removed and protected again gets new epochs, which are never below the unix time: an entry from its
former life belongs to no epoch of this one, and images carry higher fences.

**Holds and removal** cannot miss each other. Remover: write the doom, then look for holds, then delete. Holder: write
the hold, then look for the doom and the entry. Whichever order they interleave in, at least one sees the other; when
both do, the point stays and the holder is told to choose again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast
from urllib.parse import quote

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import RecoveryPoint
from farshore.replication.backend import Backend, Stored
from farshore.replication.manifest import Entry, Opening, cycle_of, decode, encode, number, point_id, to_point
from farshore.replication.ports import Manifest

_FETCH_AHEAD = 8  # requests at a time


def safe_name(text: str) -> str:
    """A machine's or disk's name as one component of a path or blob name; different names stay different."""
    if not text:
        raise FarshoreError(Code.INVALID_INPUT, "A machine or disk without a name cannot be replicated.")
    quoted = quote(text, safe="")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


@dataclass(frozen=True, slots=True)
class View:
    """The log as one listing showed it."""

    top: int  # highest number taken, 0 when empty
    entries: Mapping[int, tuple[Entry, str]]  # intact ones, with their digests
    damaged: frozenset[int]
    points: tuple[tuple[Manifest, str], ...]  # those that exist, ascending; doomed ones included
    doomed: frozenset[int]  # being removed: no longer listed
    held: Mapping[int, frozenset[str]]  # cycle → hashes of holders
    dooms: Mapping[str, tuple[int, ...]]  # name → cycles

    @property
    def head(self) -> Manifest | None:
        """The newest point."""
        live = [manifest for manifest, _ in self.points if manifest.cycle not in self.doomed]
        return live[-1] if live else None

    @property
    def openings(self) -> list[Opening]:
        """Ascending by number."""
        return [entry for _, (entry, _) in sorted(self.entries.items()) if isinstance(entry, Opening)]

    def listed(self) -> list[RecoveryPoint]:
        """What users see, oldest first."""
        return [
            to_point(manifest, digest, pinned=bool(self.held.get(manifest.cycle)))
            for manifest, digest in self.points
            if manifest.cycle not in self.doomed
        ]


class Log:
    """One machine's log in a backend. Safe to share between threads."""

    def __init__(self, backend: Backend, machine: str) -> None:
        self.machine = machine
        self.prefix = safe_name(machine) + "/"
        self._backend = backend
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[str, tuple[Entry, str] | None]] = {}

    def entry_name(self, at: int) -> str:
        return f"{self.prefix}m/{at:010d}.json"

    def create(self, entry: Entry) -> bool:
        """Append if the entry's number is free."""
        return self._backend.create(self.entry_name(number(entry)), encode(entry))

    def get(self, at: int) -> bytes | None:
        return self._backend.get(self.entry_name(at))

    def delete(self, at: int) -> None:
        self._backend.delete(self.entry_name(at))

    def read(self) -> View:
        """Read everything. Entries are immutable, so only those unknown so far are fetched."""
        entries: dict[int, tuple[Entry, str]] = {}
        damaged: set[int] = set()
        held: dict[int, set[str]] = {}
        dooms: dict[str, tuple[int, ...]] = {}
        top = 0
        seen: set[str] = set()
        listing = self._backend.list(self.prefix)
        self._fetch_ahead(listing)
        for stored in listing:
            kind, _, rest = stored.name[len(self.prefix) :].partition("/")
            if kind == "m" and rest.endswith(".json") and rest[:-5].isdecimal():
                at = int(rest[:-5])
                top = max(top, at)
                seen.add(stored.name)
                found, present = self._entry(stored, at)
                if found is not None:
                    entries[at] = found
                elif present:
                    damaged.add(at)
            elif kind == "h":
                holder, _, cycle = rest.rpartition("-")
                if cycle.isdecimal():
                    held.setdefault(int(cycle), set()).add(holder)
            elif kind == "x":
                data = self._backend.get(stored.name)
                if data is not None:
                    dooms[stored.name] = _cycles(data)
        with self._lock:
            for name in [name for name in self._cache if name not in seen]:
                del self._cache[name]
        return View(
            top=top,
            entries=entries,
            damaged=frozenset(damaged),
            points=tuple(_valid_points(entries, damaged)),
            # A hold that a removal met on its way is respected, also if the remover died before it could say so.
            doomed=frozenset(c for cycles in dooms.values() for c in cycles if not held.get(c)),
            held={cycle: frozenset(holders) for cycle, holders in held.items()},
            dooms=dooms,
        )

    def _fetch_ahead(self, listing: Sequence[Stored]) -> None:
        """A new process knows no entry yet: fetch many at a time instead of one after the other."""
        prefix = f"{self.prefix}m/"
        with self._lock:
            unknown = [s for s in listing if s.name.startswith(prefix) and s.name not in self._cache]
        if len(unknown) < _FETCH_AHEAD:
            return
        with ThreadPoolExecutor(_FETCH_AHEAD, thread_name_prefix="log") as pool:
            wanted = [(s, s.name[len(prefix) :].removesuffix(".json")) for s in unknown]
            for done in [pool.submit(self._entry, s, int(at)) for s, at in wanted if at.isdecimal()]:
                done.result()

    def _entry(self, stored: Stored, at: int) -> tuple[tuple[Entry, str] | None, bool]:
        """The entry (None when damaged), and whether it is still there."""
        with self._lock:
            known = self._cache.get(stored.name)
        if known is not None and known[0] == stored.version:
            return known[1], True
        data = self._backend.get(stored.name)
        if data is None:  # removed between listing and reading
            return None, False
        found = self._decode(stored.name, at, data)
        with self._lock:
            self._cache[stored.name] = (stored.version, found)
        return found, True

    def _decode(self, name: str, at: int, data: bytes) -> tuple[Entry, str] | None:
        try:
            entry, digest = decode(data, name=name)
        except FarshoreError:
            return None
        if number(entry) != at or entry.machine != self.machine:
            return None
        return entry, digest

    # points -------------------------------------------------------------------------------------------------------

    def manifest(self, id_of_point: str) -> Manifest:
        """PointNotFound, ReplicaDamaged."""
        cycle = cycle_of(id_of_point)
        view = self.read()
        if cycle is not None and cycle in view.damaged:
            raise FarshoreError(
                Code.REPLICA_DAMAGED,
                f"The manifest of point {id_of_point} of {self.machine} does not match its digest.",
                subject=self.machine,
            )
        for manifest, digest in view.points:
            if point_id(manifest.cycle, digest) == id_of_point and manifest.cycle not in view.doomed:
                return manifest
        raise FarshoreError(
            Code.POINT_NOT_FOUND,
            f"{self.machine} has no recovery point {id_of_point!r}.",
            subject=self.machine,
        )

    # holds --------------------------------------------------------------------------------------------------------

    def hold(self, id_of_point: str, holder: str) -> None:
        """See the module for the order. A hold that is there already proves nothing, its maker may have died before it
        looked: put and look again."""
        manifest = self.manifest(id_of_point)
        name = f"{self.prefix}h/{holder_hash(holder)}-{manifest.cycle:010d}"
        self._backend.put(name, json.dumps({"holder": holder, "point": id_of_point}).encode())
        view = self.read()
        condemned = {cycle for cycles in view.dooms.values() for cycle in cycles}
        if manifest.cycle in condemned or manifest not in (entry for entry, _ in view.points):
            self._backend.delete(name)
            raise FarshoreError(
                Code.POINT_EXPIRED,
                f"Retention removed point {id_of_point} of {self.machine} before it could be held.",
                subject=self.machine,
            )

    def release(self, holder: str) -> None:
        """Give back all holds of a holder."""
        for stored in self._backend.list(f"{self.prefix}h/{holder_hash(holder)}-"):
            self._backend.delete(stored.name)

    # removal ------------------------------------------------------------------------------------------------------

    def doom(self, name: str, cycles: Iterable[int]) -> tuple[list[int], View]:
        """First half of a removal: the points leave the lists, but those that are held. Returns what may be deleted."""
        wanted = sorted(set(cycles))
        self._backend.put(name, json.dumps({"cycles": wanted}).encode())
        view = self.read()
        free = [cycle for cycle in wanted if not view.held.get(cycle)]
        if free != wanted:
            self._backend.put(name, json.dumps({"cycles": free}).encode())
        return free, view

    def undoom(self, name: str) -> None:
        """Last step of a removal."""
        self._backend.delete(name)


def holder_hash(holder: str) -> str:
    """What stands for a holder in names."""
    return sha256(holder.encode()).hexdigest()[:16]


def _cycles(data: bytes) -> tuple[int, ...]:
    try:
        raw = cast("dict[str, Any]", json.loads(data))
        return tuple(int(cycle) for cycle in cast("Sequence[Any]", raw["cycles"]))
    except (ValueError, KeyError, TypeError):
        return ()  # torn: its removal never began


def _valid_points(entries: Mapping[int, tuple[Entry, str]], damaged: set[int]) -> list[tuple[Manifest, str]]:
    valid: list[tuple[Manifest, str]] = []
    opened: set[int] = set()
    unknown_openings = False
    for at in sorted({*entries, *damaged}):
        if at in damaged:
            unknown_openings = (
                True  # it may have been an opening: points of its epoch must not vanish with it
            )
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
        valid.append((entry, digest))
    return valid
