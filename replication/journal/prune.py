"""Which entries of the log are still needed, and the deletion of the rest.

Needed are, with their segments:

* for every point that exists, or was removed less than a grace period ago: the entries from its base to it, for each disk.
  Bases younger than the grace period do not count yet, nor, for a held point, those younger than the hold less that
  period: a reader may have begun without them;
* the entries that the replica disks have not applied yet.

Needed bases are those from which one of these points starts, the newest one, and those that are younger than the grace
period. Everything else is deleted if it was removed for the grace period at least: segments, then the manifest that names
them, so that a death in between loses nothing and is taken up again. A base's entry is deleted before what it froze: what
no entry names is reaped by the next owner.

Segments of dead cycles are named by no manifest. They are deleted when their epoch ended the grace period ago, and may be
adopted by a new cycle only within half of it (`ADOPT`): the two cannot meet, however slow one of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Backend, parse_handle
from farshore.replication.journal import compose, entries
from farshore.replication.journal.compose import Journal
from farshore.replication.journal.entries import Base, Manifest
from farshore.replication.journal.log import Log, View

GRACE = 3600.0  # seconds
ADOPT = 0.5  # part of the grace period within which dead segments may be adopted
_OPENING_GRACE = 7 * 86400.0  # seconds an opening is kept after its epoch ended

Applied = Mapping[str, tuple[str, int, int]]
"""Disk key → life, applied point and size then, of the replica disks of the head."""


@dataclass(slots=True)
class Needs:
    """What may not be deleted."""

    cycles: set[int] = field(default_factory=set[int])
    bases: set[int] = field(default_factory=set[int])  # by number of their entry


def needs(
    view: View,
    applied: Applied,
    now: float,
    grace: float,
    avoid: Callable[[Base], bool] = lambda _: True,
) -> Needs:
    """See the module. `avoid` says which bases can be relied on."""
    found = Needs()
    gone = view.doomed
    for cycle, (manifest, _) in view.manifests.items():
        if cycle in gone and now - gone[cycle] >= grace:
            continue
        found.cycles.add(cycle)
        limit = min([now, *(hold.at for hold in view.held.get(cycle, ()))]) - grace
        for disk in manifest.disks:
            _from_base(
                view,
                found,
                cycle,
                disk.state.key,
                lambda b, limit=limit: avoid(b) and made(b) <= limit,
                avoid,
            )
    head = view.head
    for disk in head.disks if head is not None else ():
        life, done, size = applied.get(disk.state.key, ("", 0, 0))
        if head is not None and life == disk.life and done:
            _since(view, found, head.cycle, disk.state.key, done, size)
    for base in view.bases:
        if base is view.bases[-1] or now - made(base) < grace:
            found.bases.add(base.number)
    return found


def made(base: Base) -> float:
    """When, unix seconds."""
    return base.made_at.timestamp()


def _from_base(
    view: View,
    found: Needs,
    cycle: int,
    key: str,
    mature: Callable[[Base], bool],
    sound: Callable[[Base], bool],
) -> None:
    for usable in (mature, sound):
        try:
            line = compose.line(view, cycle, key, usable=usable)
        except FarshoreError as error:
            if error.code is not Code.REPLICA_DAMAGED:
                raise
            continue  # older bases may be gone, then the younger one has to do
        found.cycles.update(step.cycle for step in line.steps)
        # Also bases further up: a reader of a held point may have begun with one of them.
        above = {step.cycle for step in line.steps} | ({line.base_cycle} if line.base is not None else set())
        found.bases.update(
            base.number
            for base in view.bases
            if base.cycle in above and base.disk(key, line.life) is not None
        )
        return


def _since(view: View, found: Needs, cycle: int, key: str, applied: int, size: int) -> None:
    try:
        line = compose.line(view, cycle, key, stop_at=applied, stop_size=size)
    except FarshoreError as error:
        if error.code is not Code.REPLICA_DAMAGED:
            raise
        return  # the replica will be filled from a base, which `_from_base` of the head keeps
    if line.present:
        found.cycles.update(step.cycle for step in line.steps)


@dataclass(slots=True)
class Swept:
    """What a sweep deleted."""

    entries: int = 0
    segments: int = 0
    bases: int = 0
    orphans: int = 0
    images: int = 0


class Sweeper:
    """Deletes what is not needed, under an epoch."""

    def __init__(
        self,
        backend: Backend,
        log: Log,
        journal: Journal,
        epoch: int,
        *,
        grace: float,
        alive: Callable[[], None],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """`alive` raises ReplicaFenced when the epoch is over. `look` is called often and may raise to stop."""
        self._backend = backend
        self._log = log
        self._journal = journal
        self._epoch = epoch
        self._grace = grace
        self._alive = alive
        self._look = look

    def sweep(self, view: View, needed: Needs, now: float) -> Swept:
        """Entries with their segments, bases, dooms and openings."""
        done = Swept()
        self._alive()
        gone = view.doomed
        deleted: set[int] = set()
        for cycle, (manifest, _) in view.manifests.items():
            if cycle not in needed.cycles and cycle in gone:
                self._look()
                done.segments += self._delete_segments(manifest)
                self._log.delete(cycle)
                deleted.add(cycle)
        done.entries = len(deleted)
        for base in view.bases:
            if base.number not in needed.bases:
                self._look()
                self._delete_base(base)
                done.bases += 1
        for name, doom in view.dooms.items():
            if doom.decided and all(c in deleted or c not in view.manifests for c in doom.cycles):
                self._backend.delete(name)
        self._tidy_openings(view)
        return done

    def _delete_segments(self, manifest: Manifest) -> int:
        count = 0
        for disk in manifest.disks:
            for page in disk.pages:
                try:
                    rows = entries.read_page(self._backend, self._log.prefix, disk.state.key, page)
                except FarshoreError as error:
                    if error.code is not Code.REPLICA_DAMAGED:
                        raise
                    rows = []  # its segments are named by nothing then, and go as orphans
                for row in rows:
                    self._backend.delete(self._log.prefix + row.name)
                    count += 1
                self._backend.delete(self._log.prefix + page.name)
            for row in disk.segments:
                self._backend.delete(self._log.prefix + row.name)
                count += 1
        return count

    def _delete_base(self, base: Base) -> None:
        self._log.delete(base.number)
        for disk in base.disks:
            for text in (disk.snapshot, disk.table):
                self._backend.drop(*parse_handle(text))

    def _tidy_openings(self, view: View) -> None:
        used = {manifest.epoch for manifest, _ in view.manifests.values()} | {b.epoch for b in view.bases}
        for opening, successor in pairwise(view.openings):
            ended = self._openings_end(view) - successor.opened_at.timestamp()
            if opening.epoch not in used and ended > _OPENING_GRACE:
                self._log.delete(opening.number)

    def _openings_end(self, view: View) -> float:
        return view.openings[-1].opened_at.timestamp()

    def orphans(self, view: View, now: float) -> Swept:
        """Segments that no manifest names and images of lives that nothing needs. Looks at every name: do it seldom."""
        done = Swept()
        self._alive()
        if view.damaged:
            return done  # a damaged entry may be what names them
        ended = ends(view)
        origins: set[tuple[int, int]] = set()
        by_origin: dict[tuple[int, int], list[Manifest]] = {}
        for manifest, _ in view.manifests.values():
            pairs = {(manifest.epoch, manifest.cycle)}
            for disk in manifest.disks:
                pairs.update(disk.origins)
            origins |= pairs
            for pair in pairs:
                by_origin.setdefault(pair, []).append(manifest)
        named: dict[tuple[int, int], set[str]] = {}
        doomed: list[str] = []
        for kind in ("s/", "i/"):
            for stored in self._backend.list(self._log.prefix + kind):
                name = stored.name[len(self._log.prefix) :]
                where = entries.origin(name)
                if where is None:
                    continue
                pair = where[:2]
                over = ended.get(pair[0])
                if pair[0] >= self._epoch or over is None or now - over < self._grace:
                    continue
                if pair in origins:
                    if pair not in named:
                        named[pair] = self._names(by_origin[pair])
                    if name in named[pair]:
                        continue
                doomed.append(stored.name)
        if doomed:
            self._alive()
        for name in doomed:
            self._look()
            self._backend.delete(name)
            done.orphans += 1
        return done

    def _names(self, manifests: list[Manifest]) -> set[str]:
        found: set[str] = set()
        for manifest in manifests:
            for disk in manifest.disks:
                found.update(page.name for page in disk.pages)
                found.update(row.name for row in self._journal.refs(disk))
        return found


def ends(view: View) -> dict[int, float]:
    """Epoch → when the next one was opened (unix seconds), as far as openings are kept. Epochs whose opening is gone ended
    when the oldest opening was made, at the latest."""
    openings = view.openings
    found = {one.epoch: after.opened_at.timestamp() for one, after in pairwise(openings)}
    known = {opening.epoch for opening in openings}
    if openings:
        first = openings[0].opened_at.timestamp()
        for manifest, _ in view.manifests.values():
            for disk in manifest.disks:
                for epoch, _cycle in disk.origins:
                    if epoch not in known:
                        found.setdefault(epoch, first)
            if manifest.epoch not in known:
                found.setdefault(manifest.epoch, first)
    return found
