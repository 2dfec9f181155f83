"""All points of all machines of one backend: reading, holding, acquiring, removing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import RecoveryPoint
from farshore.replication.backend import Backend, fenced
from farshore.replication.journal import damage, keys
from farshore.replication.journal.compose import Journal
from farshore.replication.journal.damage import Finding, Part
from farshore.replication.journal.entries import Base, Manifest, Opening, encode, point_id, safe_name
from farshore.replication.journal.keys import Kek
from farshore.replication.journal.log import Log
from farshore.replication.journal.reader import PointReader
from farshore.replication.journal.writer import Options, Writer

_TOKEN = re.compile(r"#[0-9a-f]{12}$")  # what a leg adds to the owner that all attempts of its activity share


class JournalStore:
    """See the module."""

    def __init__(
        self,
        backend: Backend,
        *,
        kek: Kek | None = None,
        clock: Callable[[], float] = time.time,
        options: Options | None = None,
    ) -> None:
        """`clock` gives unix seconds."""
        self.backend = backend
        self.options = options or Options()
        self._kek = kek
        self._clock = clock
        self._logs: dict[str, Log] = {}
        self._journals: dict[str, Journal] = {}

    def log(self, machine: str) -> Log:
        """The machine's log; one object a machine, so that entries are fetched once."""
        return self._logs.setdefault(machine, Log(self.backend, machine))

    def journal(self, machine: str, *, make: bool = False) -> Journal:
        """The machine's segments and keys; `make` the keys if there are none."""
        known = self._journals.get(machine)
        if known is None:
            prefix = safe_name(machine) + "/"
            get = keys.load if make else keys.find
            found = (
                keys.load(self.backend, prefix, self._kek, random=self.options.random)
                if get is keys.load
                else keys.find(self.backend, prefix, self._kek)
            )
            known = self._journals[machine] = Journal(self.backend, prefix, machine, found)
        return known

    def acquire(
        self, machine: str, owner: str, *, succeeding: int | None = None, asked_at: datetime | None = None
    ) -> Writer:
        """Become the writer: raises the epoch, so that every earlier writer is fenced, and reaps what they left. Needs no
        consent of the former writer and never waits for it.

        With `succeeding` the epoch is taken only if the newest one is that epoch or was opened by the same `owner`; else
        ReplicaFenced. It is how a leg goes on after an error without stealing from a legitimate successor. A machine whose
        log is gone was removed: ReplicaFenced as well.

        `asked_at` is when the caller was asked to start. If another owner opened an epoch after that instant, the caller is
        late, e.g. a leg that slept over a promotion: ReplicaFenced. Other owners are those that are neither `owner` nor
        another attempt of the same activity (`owner` up to a leg's token). An opening without a token under the same name is
        another step of the run, not an attempt: it fences. What has to win whatever happens (the fencing step of a failover)
        passes None. Both instants are clock times: opener and asker may differ by the skew.
        """
        log = self.log(machine)
        for _ in range(16):
            now = self._clock()
            view = log.read(now)
            # Decided on the same view whose next number is taken: who opens in between makes us look again.
            openings = view.openings
            _check_turn(machine, openings, owner, succeeding, asked_at)
            epochs = [entry.epoch for entry, _ in view.entries.values()]
            before = view.entries.get(view.top)
            opening = Opening(
                machine=machine,
                number=view.top + 1,
                epoch=max([*(epoch + 1 for epoch in epochs), int(now)]),
                parent=before[1] if before is not None else "",
                owner=owner,
                opened_at=datetime.fromtimestamp(now, UTC),
            )
            if not log.create(opening) and log.get(opening.number) != encode(opening):
                continue
            journal = self.journal(machine, make=True)
            view = log.read(self._clock())
            if view.top != opening.number:
                # Either a still newer owner, or we slept and the number had become free again.
                raise fenced(machine, f"the log goes on to number {view.top}")
            writer = Writer(self.backend, log, journal, opening, view, self._clock, self.options)
            writer.take_over()
            return writer
        raise FarshoreError(
            Code.TARGET_BUSY,
            f"The log of {machine} grows faster than a new owner can enter it.",
            subject=machine,
        )

    def points(self, machine: str) -> list[RecoveryPoint]:
        """Committed points, oldest first. Needs no writer; works when the source site is gone."""
        return self.log(machine).read(self._clock()).listed()

    def manifest(self, machine: str, point: str) -> Manifest:
        """PointNotFound; ReplicaDamaged when the stored bytes do not match their digest."""
        log = self.log(machine)
        return log.manifest(point, log.read(self._clock()))

    def sound(self, machine: str) -> Callable[[Base], bool]:
        """Which bases are not known to be damaged."""
        bad = {f.subject for f in damage.read(self.backend, self.log(machine).prefix) if f.part is Part.BASE}
        return lambda base: not any(d.snapshot in bad or d.table in bad for d in base.disks)

    def read_point(self, machine: str, point: str, disk: str) -> PointReader:
        """The bytes of a disk of a point, for verification or restore. PointNotFound, ReplicaDamaged."""
        log = self.log(machine)
        view = log.read(self._clock())
        manifest = log.manifest(point, view)
        if manifest.disk(disk) is None:
            raise FarshoreError(
                Code.POINT_NOT_FOUND, f"Point {point} of {machine} has no disk {disk!r}.", subject=machine
            )
        return PointReader(
            self.backend,
            self.journal(machine),
            view,
            manifest,
            disk,
            self.sound(machine),
            workers=self.options.workers,
        )

    def damage(self, machine: str) -> dict[str, str]:
        """Points that are known to be damaged, by id, and why. Reads lists, no data."""
        log = self.log(machine)
        view = log.read(self._clock())
        findings = damage.read(self.backend, log.prefix)
        found: dict[str, str] = {}
        for manifest, digest in view.points:
            why = self._why(machine, manifest, findings)
            if why:
                found[point_id(manifest.cycle, digest)] = why
        return found

    def known_damage(self, machine: str) -> dict[str, str]:
        """As `damage`, but nothing is read where nothing is known to be damaged."""
        log = self.log(machine)
        if not log.read(self._clock()).damaged and not damage.read(self.backend, log.prefix):
            return {}
        return self.damage(machine)

    def _why(self, machine: str, manifest: Manifest, findings: Sequence[Finding]) -> str:
        log = self.log(machine)
        view = log.read(self._clock())
        for disk in manifest.disks:
            try:
                reader = PointReader(
                    self.backend,
                    self.journal(machine),
                    view,
                    manifest,
                    disk.state.key,
                    self.sound(machine),
                )
                why = reader.hurt_by([f for f in findings if f.disk == disk.state.key])
            except FarshoreError as error:
                if error.code is not Code.REPLICA_DAMAGED:
                    raise
                why = error.info.message
            if why:
                return why
        return ""

    def hold(self, machine: str, point: str, holder: str, seconds: float | None = None) -> None:
        """Protect a point while a run uses it: until it is given back, or as a lease for so many seconds, which the same call
        renews. Idempotent. PointExpired when retention was faster."""
        self.log(machine).hold(point, holder, self._clock(), seconds)

    def release(self, machine: str, holder: str) -> None:
        """Give back every hold of `holder`. Idempotent."""
        self.log(machine).release(holder)

    def keep_only(self, machine: str, point: str) -> list[str]:
        """Commit of a failover: fence the writer, remove all other points that no holder uses. Returns their ids."""
        self.manifest(machine, point)
        writer = self.acquire(machine, f"commit of {point}")
        try:
            ids = {known.cycle: known.id for known in writer.points() if known.id != point}
            removed = writer.remove_any(sorted(ids)) if ids else []
        finally:
            writer.close()
        return [ids[cycle] for cycle in removed]

    def remove_machine(self, machine: str) -> None:
        """Delete replica, journal, keys and all points. Idempotent."""
        log = self.log(machine)
        if not self.backend.list(log.prefix) and not self.backend.images(log.prefix):
            return
        writer = self.acquire(machine, "removal")
        writer.close()
        last = log.name(writer.cycle - 1)
        names = [stored.name for stored in self.backend.list(log.prefix) if stored.name != last]

        def order(name: str) -> tuple[int, str]:
            # Points first, so that none is listed without its bytes; the key, without which nothing can be read, late.
            return {"m": 0, "k": 2}.get(name[len(log.prefix)], 1), name

        for name in sorted(names, key=order):
            self.backend.delete(name)
        for image in self.backend.images(log.prefix):
            self.backend.delete_image(image.name, writer.epoch)
        # Our opening last, so that a crash can be repeated.
        self.backend.delete(last)
        self._journals.pop(machine, None)

    def close(self) -> None:
        self.backend.close()


def same_activity(mine: str, other: str) -> bool:
    """Whether `other` is the owner string of a leg, i.e. has a token, and of the same activity as `mine`."""
    return bool(_TOKEN.search(other)) and _TOKEN.sub("", other) == _TOKEN.sub("", mine)


def _check_turn(
    machine: str, openings: Sequence[Opening], owner: str, succeeding: int | None, asked_at: datetime | None
) -> None:
    """ReplicaFenced unless it is this owner's turn. See `JournalStore.acquire`."""
    if not openings:
        if succeeding is not None:
            raise fenced(machine, f"its log, in which epoch {succeeding} was opened, was removed")
        return
    newest = openings[-1]
    if newest.owner == owner or newest.epoch == succeeding:
        return
    if succeeding is not None:
        raise fenced(machine, f"epoch {newest.epoch} was opened by {newest.owner}")
    if asked_at is None:
        return
    for opening in reversed(openings):
        if opening.opened_at > asked_at and not same_activity(owner, opening.owner):
            raise fenced(
                machine,
                f"a newer owner came after this leg was asked for, {opening.owner} at {opening.opened_at}",
            )
