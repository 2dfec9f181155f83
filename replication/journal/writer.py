"""The one owner of a machine's log, journal and replica disks, under an epoch. Made by `Store.acquire`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint
from farshore.replication.backend import Backend, Image, fenced, parse_handle
from farshore.replication.journal import damage, entries, prune
from farshore.replication.journal.compose import Journal
from farshore.replication.journal.damage import Finding, Part
from farshore.replication.journal.disks import Disks, OpenDisk
from farshore.replication.journal.entries import (
    Base,
    BaseDisk,
    Manifest,
    Opening,
    digest_of,
    to_point,
)
from farshore.replication.journal.keys import Random
from farshore.replication.journal.log import Log, View
from farshore.replication.journal.mirror import Mirror, names
from farshore.replication.journal.packer import Packer
from farshore.replication.journal.scrub import Coverage, Scrub, Scrubbed
from farshore.replication.ports import DiskState


@dataclass(frozen=True, slots=True)
class Options:
    """How a store works. Seconds and threads."""

    grace: float = prune.GRACE
    workers: int = 2  # of redo and materialisation; 0: the calling thread, in one fixed order
    cache: Path | None = None  # folder for leaf tables; None: temporary files
    random: Random = os.urandom
    adopt: bool = True  # whether segments of dead cycles are used again


@dataclass(frozen=True, slots=True)
class Frozen:
    """Frozen replica disks that are no base yet."""

    cycle: int
    disks: tuple[BaseDisk, ...]


class Writer:
    """See the module. One thread at a time, but that `advance` or `cool` may run beside everything else."""

    def __init__(
        self,
        backend: Backend,
        log: Log,
        journal: Journal,
        opening: Opening,
        view: View,
        clock: Callable[[], float],
        options: Options,
    ) -> None:
        self.backend = backend
        self.log = log
        self.journal = journal
        self.options = options
        self.clock = clock
        self._opening = opening
        self._next = opening.number + 1
        self._parent = digest_of(opening)
        self._head = view.head
        self._dooms = 0
        self._unknown = False
        self._adrift = False
        self._disks = Disks(self)

    @property
    def machine(self) -> str:
        return self.log.machine

    @property
    def epoch(self) -> int:
        return self._opening.epoch

    @property
    def cycle(self) -> int:
        """The number the next entry will have."""
        return self._next

    @property
    def parent(self) -> str:
        """Digest of the newest entry."""
        return self._parent

    def head(self) -> Manifest | None:
        """The newest committed point."""
        return self._head

    def view(self) -> View:
        """The log now."""
        return self.log.read(self.clock())

    def sound(self) -> Callable[[Base], bool]:
        """Which bases are not known to be damaged."""
        bad = {f.subject for f in damage.read(self.backend, self.log.prefix) if f.part is Part.BASE}
        return lambda base: not any(d.snapshot in bad or d.table in bad for d in base.disks)

    # disks --------------------------------------------------------------------------------------------------------

    def open_disk(self, state: DiskState) -> OpenDisk:
        """The leaf table of a disk as of the head, and what has to be shipped whatever it says."""
        self._check_known()
        return self._disks.open(state)

    def packer(self, opened: OpenDisk, take: Callable[[int], None] | None = None) -> Packer:
        """Where the chunks of this cycle go."""
        return self._disks.packer(opened, take)

    def forget(self) -> None:
        """A cycle failed: the tables go back to the head."""
        self._disks.forget()

    def note(self, error: FarshoreError) -> None:
        """Keep what an error says about damage."""
        finding = damage.of_error(error, self.clock())
        self._disks.look_again()
        if finding is not None:
            damage.note(self.backend, self.log.prefix, finding)

    # commit -------------------------------------------------------------------------------------------------------

    def _check_known(self) -> None:
        if self._unknown:
            raise fenced(
                self.machine, "the outcome of the last commit is unknown, the epoch has to be taken again"
            )

    def commit(self, manifest: Manifest) -> RecoveryPoint:
        """Create the manifest if absent. ReplicaFenced if another writer won the number."""
        if manifest.cycle != self._next or manifest.epoch != self.epoch or manifest.parent != self._parent:
            raise fenced(self.machine, "the manifest does not continue the log of this epoch")
        entry_digest = self._append(manifest)
        self._head = manifest
        self._disks.committed(manifest)
        return to_point(manifest, entry_digest)

    def _append(self, entry: Manifest | Base) -> str:
        self._check_known()
        data = entries.encode(entry)
        try:
            created = self.log.create(entry)
        except FarshoreError:
            # The answer was lost, or the request. Only finding our own bytes proves anything: a request that is still
            # under way may arrive later, so absence proves nothing, and this epoch must not use the number again.
            self._unknown = True
            if self.log.get(entry.number) != data:
                raise
            self._unknown = False
            created = True
        if not created and self.log.get(entry.number) != data:
            self._unknown = True
            raise fenced(self.machine, f"number {entry.number} of the log is taken")
        self._parent = digest_of(entry)
        self._next = entry.number + 1
        return self._parent

    def keep_alive(self) -> None:
        """ReplicaFenced when a newer epoch exists."""
        self._check_known()
        if self.log.get(self._next) is not None:
            raise fenced(self.machine, f"number {self._next} of the log is taken")

    # points -------------------------------------------------------------------------------------------------------

    def points(self) -> list[RecoveryPoint]:
        """Committed points, oldest first."""
        return self.view().listed()

    def remove_points(self, cycles: Sequence[int]) -> list[int]:
        """Take points out of the lists at once; those in use, the newest one and the newest app-consistent one stay.
        Returns what was removed. Their bytes go with `sweep`."""
        self.keep_alive()
        points = self.view().points
        keep = {points[-1][0].cycle} if points else set[int]()
        consistent = [m.cycle for m, _ in points if m.consistency is Consistency.APPLICATION]
        keep.update(consistent[-1:])
        wanted = [cycle for cycle in cycles if cycle not in keep]
        return self.remove_any(wanted) if wanted else []

    def remove_any(self, cycles: Sequence[int]) -> list[int]:
        """As `remove_points`, any of them."""
        name = f"{self.log.prefix}x/{self.epoch}-{self._dooms:06d}"
        self._dooms += 1
        return self.log.doom(name, cycles, self.clock())

    # the other layers ---------------------------------------------------------------------------------------------

    def mirror(
        self, look: Callable[[], None] = lambda: None, take: Callable[[int], None] | None = None
    ) -> Mirror:
        """The replica disks."""
        return Mirror(
            self.backend,
            self.journal,
            self.epoch,
            workers=self.options.workers,
            look=look,
            avoid=self.sound(),
            take=take,
        )

    def advance(
        self, look: Callable[[], None] = lambda: None, take: Callable[[int], None] | None = None
    ) -> int:
        """Bring the replica disks to the head; returns its number, 0 when there is no point. ReplicaDamaged: what is
        damaged is kept as a finding, the next cycle ships it again."""
        self._check_known()
        head = self._head
        if head is None:
            return 0
        self._bring(self.mirror(look, take), head)
        return head.cycle

    def _bring(self, mirror: Mirror, head: Manifest) -> None:
        self._check_known()
        if self._adrift:
            raise fenced(
                self.machine,
                "the outcome of a write to a replica disk is unknown, the epoch has to be taken again",
            )
        view = self.view()
        try:
            mirror.advance(view, head)
        except FarshoreError as error:
            # A write without an answer may still arrive, and this epoch's number would be good enough for it: what it
            # overwrote then would be younger. Only a higher number helps.
            self._adrift = error.code is not Code.REPLICA_DAMAGED
            self.note(error)
            raise
        self._settle(head)

    @property
    def adrift(self) -> bool:
        """Whether this epoch may write to replica disks no more."""
        return self._adrift

    def _settle(self, head: Manifest) -> None:
        """Findings about replicas that a later point healed are over."""
        with contextlib.suppress(FarshoreError):  # they are looked at again next time
            for finding in damage.read(self.backend, self.log.prefix):
                if finding.part is Part.REPLICA and 0 < finding.healed <= head.cycle:
                    damage.forget(self.backend, self.log.prefix, finding)

    def freeze(self) -> Base | None:
        """Freeze the replica disks as the base of the head, to which they are brought first. None without a point."""
        frozen = self.cool()
        return self.add_base(frozen) if frozen is not None else None

    def cool(
        self, look: Callable[[], None] = lambda: None, take: Callable[[int], None] | None = None
    ) -> Frozen | None:
        """First half of `freeze`, which may run beside a cycle: bring the replica disks to the head and freeze them."""
        head = self._head
        if head is None:
            return None
        mirror = self.mirror(look, take)
        self._bring(mirror, head)
        wrong = [disk for disk in head.disks if not mirror.table_is_true(disk)]
        if wrong:
            # Nothing may be frozen that cannot be verified later. The replica is filled anew, from a base and the journal.
            for disk in wrong:
                mirror.reset(disk)
            self._bring(mirror, head)
        disks = tuple(
            BaseDisk(disk.state.key, disk.life, disk.state.size, disk.root, image, table)
            for disk, image, table in mirror.freeze(head)
        )
        return Frozen(head.cycle, disks)

    def add_base(self, frozen: Frozen) -> Base:
        """Second half: the entry that makes it a base. A stale owner froze who knows what, but its number is taken."""
        made = datetime.fromtimestamp(self.clock(), UTC)
        base = Base(self.machine, self._next, self.epoch, self._parent, frozen.cycle, made, frozen.disks)
        self._append(base)
        return base

    def sweep(self, *, thorough: bool = False, look: Callable[[], None] = lambda: None) -> prune.Swept:
        """Delete what no point needs any more and was removed the grace period ago; `thorough`: also what dead cycles
        left."""
        now = self.clock()
        view, needed = self._needed(now)
        sweeper = prune.Sweeper(
            self.backend,
            self.log,
            self.journal,
            self.epoch,
            grace=self.options.grace,
            alive=self.keep_alive,
            look=look,
        )
        done = sweeper.sweep(view, needed, now)
        if thorough:
            done.orphans = sweeper.orphans(view, now).orphans
            done.images = self._drop_lives(view, needed)
        self._forget_findings(self.view())
        return done

    def scrub(
        self,
        *,
        budget: int | None = None,
        look: Callable[[], None] = lambda: None,
        take: Callable[[int], None] = lambda _: None,
    ) -> Scrubbed:
        """A part of a round of scrub, replica disks included."""
        self._check_known()
        self._disks.look_again()
        scrub = Scrub(self.backend, self.journal, self.clock, look=look, take=take)
        view, needed = self._needed(self.clock())
        return scrub.run(view, needed, replicas=True, budget=budget)

    def _needed(self, now: float) -> tuple[View, prune.Needs]:
        """The log, and what of it counts: the rest may be half gone already, where a sweep died."""
        view = self.view()
        return view, prune.needs(view, self._applied(view), now, self.options.grace, self.sound())

    def coverage(self) -> Coverage:
        """How far scrub is."""
        return Scrub(self.backend, self.journal, self.clock).coverage()

    def examine(self, look: Callable[[], None] = lambda: None) -> list[Finding]:
        """Read what the newest point needs, so that a resync ships again what is damaged."""
        self._check_known()
        self._disks.look_again()
        return Scrub(self.backend, self.journal, self.clock, look=look).examine(self.view())

    def _applied(self, view: View) -> dict[str, tuple[str, int, int]]:
        head = view.head
        images = {image.name for image in self.backend.images(self.log.prefix)}
        mirror = Mirror(self.backend, self.journal, self.epoch)
        found: dict[str, tuple[str, int, int]] = {}
        for disk in head.disks if head is not None else ():
            header = mirror.applied(disk, images)
            if header is not None:
                found[disk.state.key] = (header.life, header.applied, header.size)
        return found

    def _drop_lives(self, view: View, needed: prune.Needs) -> int:
        """Images of lives that are over and of which no base is needed."""
        head = view.head
        if view.damaged or head is None:
            return 0
        live = {name for d in head.disks for name in names(self.log.prefix, d.state.key, d.life)}
        for base in view.bases:
            if base.number in needed.bases:
                live |= {parse_handle(text)[0] for d in base.disks for text in (d.snapshot, d.table)}
        count = 0
        for image in self.backend.images(self.log.prefix):
            if image.name not in live:
                self.backend.delete_image(image.name, self.epoch)
                count += 1
        return count

    def _forget_findings(self, view: View) -> None:
        bases = {text for base in view.bases for d in base.disks for text in (d.snapshot, d.table)}
        for finding in damage.read(self.backend, self.log.prefix):
            gone = (
                (finding.part is Part.BASE and finding.subject not in bases)
                or (finding.part is Part.SEGMENT and self._all_gone(finding, view))
                or (finding.part is Part.ENTRY and int(finding.subject) not in view.damaged)
            )
            if gone:
                damage.forget(self.backend, self.log.prefix, finding)

    def _all_gone(self, finding: Finding, view: View) -> bool:
        """Whether nothing names a damaged segment any more."""
        where = entries.origin(finding.subject)
        if where is None:
            return True
        pairs = {(m.epoch, m.cycle) for m, _ in view.manifests.values()}
        pairs |= {pair for m, _ in view.manifests.values() for d in m.disks for pair in d.origins}
        return where[:2] not in pairs and not view.damaged

    # taking over --------------------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Fence every image, then clean up after former owners. Reading has to succeed, removing need not."""
        images = self.backend.images(self.log.prefix)
        for image in images:
            self.backend.raise_fence(image.name, self.epoch)
        view = self.view()
        for name, doom in view.dooms.items():
            if not doom.decided:
                with tidying():
                    self.log.doom(name, doom.cycles, self.clock())
        self._head = self.view().head if view.dooms else view.head
        with tidying():
            self._reap(images, view)

    def _reap(self, images: Sequence[Image], view: View) -> None:
        """Frozen states that no base names. Stops at the first error: where one removal fails, hundreds would."""
        if view.damaged:
            return
        named = {text for base in view.bases for d in base.disks for text in (d.snapshot, d.table)}
        for image in images:
            for frozen in image.snapshots:
                if f"{image.name}@{frozen.id}" not in named and frozen.epoch < self.epoch:
                    self.backend.drop(image.name, frozen.id)

    def close(self) -> None:
        """Give back files. The epoch stays taken."""
        self._disks.close()


@contextlib.contextmanager
def tidying() -> Generator[None]:
    """What is done here the next owner can do as well, so a failure does not count; being fenced does."""
    try:
        yield
    except FarshoreError as error:
        if error.code is Code.REPLICA_FENCED:
            raise
