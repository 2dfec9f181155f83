"""A QEMU machine as a source of the replication engine: one transaction over all disks, dirty bitmaps, reads over NBD.

How a cut comes about (dataplane reference, §12): the fleeces are made while the guest runs; one transaction starts a new
bitmap, stops the one before and starts the fleeces, for all disks in the same instant; then the fleeces are exported.
Nothing is read inside a freeze. See `bitmaps` for what tracking promises, `fleece` for what is in QEMU meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.nbd import bitmaps, fleece
from farshore.providers.nbd.cut import Piece, QemuCut, open_monitor
from farshore.providers.nbd.disks import CutName, QemuDisk, find, item, run_of
from farshore.providers.nbd.keeper import HELD, Keeper, KeeperFailed
from farshore.providers.nbd.qmp import Monitor, action
from farshore.providers.nbd.settings import QemuSettings
from farshore.replication.ports import LEAF, DiskState

log = logging.getLogger(__name__)


class QemuSource:
    """Fills `replication.ports.Source`, and `barrier.BarrierSource` there, for one machine. Blocking; not for two threads at
    once (its cuts are)."""

    def __init__(self, settings: QemuSettings, *, machine: str) -> None:
        self._settings = settings
        self._machine = machine

    @property
    def machine(self) -> str:
        return self._machine

    @property
    def cannot_hold(self) -> str:
        """Nothing: QEMU stops its processors when it is told to."""
        return ""

    def cut(self, name: str, *, want: Consistency) -> QemuCut:
        """Take one snapshot over all disks, after removing what a predecessor left.

        A guest agent that refuses or is late costs the label, not the point. SourceUnreachable, SourceNotEligible,
        SourceBusy, SnapshotFailed.
        """
        with self.prepare(name, want=want) as prepared:
            try:
                prepared.quiesce()
                prepared.take()
            finally:
                prepared.resume()
            return prepared.finish()

    def prepare(self, name: str, *, want: Consistency) -> Prepared:
        """All of a cut that may be slow and that the guest does not feel. See `replication.barrier`."""
        cut = CutName.parse(name)
        with self._monitor() as monitor:
            self._clear(monitor, cut)
            disks = find(monitor, self._machine, self._settings.disks)
            run = run_of(monitor)
            self._room()
            stem = cut.stem(secrets.token_hex(2))
            try:
                for index, disk in enumerate(disks):
                    fleece.build(
                        monitor,
                        self._settings.fleece_folder,
                        item(stem, index),
                        disk,
                        self._settings.settle_timeout,
                    )
            except BaseException:  # also a cancel: nothing may stay
                self._remove(monitor, stem)
                raise
        return Prepared(self._settings, cut, stem, disks, run, want)

    def reap(self, upto: str = "") -> list[str]:
        """Let the machine run, thaw it and remove every cut of ours; returns their names. SourceBusy: see `Source.reap`."""
        with self._monitor() as monitor:
            self._thaw()
            return self._clear(monitor, CutName.parse(upto) if upto else None)

    def close(self) -> None:
        """Nothing is held: connections are opened for each step."""

    # -- inside --------------------------------------------------------------------------------------------------

    def _monitor(self) -> Monitor:
        return open_monitor(self._settings, self._machine)

    def _clear(self, monitor: Monitor, upto: CutName | None) -> list[str]:
        found = fleece.cuts(monitor, self._machine)
        if upto is not None:
            for cut in found.values():
                if cut.epoch > upto.epoch:
                    raise FarshoreError(
                        Code.SOURCE_BUSY,
                        f"A newer worker is at work on {self._machine}: it made {cut}.",
                        subject=self._machine,
                    )
        if fleece.resume_held(monitor):
            log.warning("%s had been stopped by a worker that died; it runs again", self._machine)
        if found:  # a cut's images are made before the guest is frozen
            self._thaw()
        for stem in found:
            fleece.remove(monitor, stem, self._settings.settle_timeout)
        return sorted({str(cut) for cut in found.values()})

    def _thaw(self) -> None:
        """A guest must not stay frozen because worker and guardian died together, with their host for instance."""
        if self._settings.guest_agent is None:
            return
        keeper = Keeper("agent", self._settings.guest_agent)
        try:
            if keeper.run("guest-fsfreeze-status", answer=2.0) != "thawed":
                keeper.undo()
                log.warning("%s had been left frozen; it is thawed", self._machine)
        except KeeperFailed as exc:
            log.info("the guest agent of %s cannot be asked: %s", self._machine, exc)
        finally:
            keeper.close()

    def _room(self) -> None:
        free = fleece.room(self._settings.fleece_folder)
        if free < self._settings.fleece_free:
            raise FarshoreError(
                Code.SNAPSHOT_FAILED,
                f"{self._settings.fleece_folder} has {free >> 20} MiB free; a cut of {self._machine} needs "
                f"{self._settings.fleece_free >> 20} MiB.",
                subject=self._machine,
                causes=(
                    "Another program filled the file system.",
                    "It is too small for this machine's writes.",
                ),
                action="Make room in the fleece folder; the cycle is tried again.",
            )

    def _remove(self, monitor: Monitor, stem: str) -> None:
        try:
            fleece.remove(monitor, stem, self._settings.settle_timeout)
        except FarshoreError as exc:
            log.warning("what a failed cut of %s left is for the next one to remove: %s", self._machine, exc)


class Prepared:
    """A cut that lacks only its instant; fills `replication.barrier.PreparedCut`. In this order: quiesce → [hold] → take → resume → finish.

    `resume` must be called whatever happened, and at once; leaving the context without `finish` removes everything.
    """

    def __init__(
        self,
        settings: QemuSettings,
        cut: CutName,
        stem: str,
        disks: Sequence[QemuDisk],
        run: str,
        want: Consistency,
    ) -> None:
        self._settings, self._cut, self._stem, self._disks = settings, cut, stem, list(disks)
        self._agent: Keeper | None = None
        self._holder: Keeper | None = None
        self._frozen = 0  # file systems
        self._held = False
        self._taken_at: datetime | None = None
        self._off = False
        self._label = Consistency.CRASH
        self._finished = False
        self._lines = {disk.key: bitmaps.line_of(disk.bitmaps) for disk in self._disks}
        self._fresh: dict[str, tuple[str, int, str]] = {}  # line, number and mark of each disk's new bitmap
        for disk in self._disks:
            line = self._lines[disk.key][0]
            word, number = (line.word, line.next) if line else (secrets.token_hex(4), 1)
            self._fresh[disk.key] = (word, number, bitmaps.marked(word, number, run))
        if want is not Consistency.CRASH and settings.guest_agent is not None:
            self._agent = Keeper("agent", settings.guest_agent)

    @property
    def name(self) -> str:
        return str(self._cut)

    def quiesce(self) -> None:
        """Freeze the guest's file systems if that is wanted and possible. Never raises for the guest's sake."""
        if self._agent is None:
            return
        try:
            if self._agent.run("guest-fsfreeze-status", answer=3.0) != "thawed":
                raise KeeperFailed("it is frozen already, by somebody else")
            windows = self._windows()
            self._agent.arm(self._settings.freeze_limit)
            self._frozen = int(
                self._agent.run("guest-fsfreeze-freeze", answer=self._settings.freeze_limit) or 0
            )
            self._label = (
                Consistency.APPLICATION if windows or self._settings.hooks else Consistency.FILE_SYSTEM
            )
        except KeeperFailed as exc:
            log.warning("%s is cut crash-consistent: the guest agent: %s", self._cut.machine, exc)
            self._frozen = 0

    def hold(self) -> None:
        """Stop the machine for a group's instant. SnapshotFailed; it is resumed by itself after `hold_limit`."""
        try:
            holder = self._holder = Keeper("monitor", self._settings.qmp)
            state = holder.run("query-status", answer=self._settings.connect_timeout)["status"]
            if state != "running":
                self._off = state == "shutdown"
                return  # it writes nothing: there is nothing to be stopped
            holder.arm(self._settings.hold_limit)
            # The mark comes first: whoever finds a stopped machine with it may let it run.
            holder.run("object-add", {"qom-type": "throttle-group", "id": HELD})
            holder.run("stop", answer=self._settings.hold_limit)
            self._held = True
        except KeeperFailed as exc:
            raise self._missed(f"it could not be stopped: {exc}") from exc

    def take(self) -> None:
        """The instant: one transaction over all disks. SnapshotFailed, SourceBusy, SourceUnreachable."""
        actions = self._actions()
        if self._holder is not None:
            self._take_held(self._holder, actions)
            return
        with open_monitor(self._settings, self._cut.machine) as monitor:
            before = monitor("query-status").get("status")
            taken_at = datetime.now(UTC)
            monitor.transaction(actions)
            self._taken_at = taken_at
            self._off = before == monitor("query-status").get("status") == "shutdown"

    def _take_held(self, holder: Keeper, actions: list[dict[str, Any]]) -> None:
        taken_at = datetime.now(UTC)
        try:
            holder.run("transaction", {"actions": actions}, answer=self._settings.hold_limit)
            state = holder.run("query-status")["status"]
            marked = any(entry["name"] == HELD for entry in holder.run("qom-list", {"path": "/objects"}))
        except KeeperFailed as exc:
            raise self._missed(str(exc)) from exc
        # Somebody else may have let it run: then the instants of the group are not one.
        if self._held and not (state == "paused" and marked):
            raise self._missed("it did not stay stopped")
        if not self._held and state == "running":
            raise self._missed("it was started meanwhile")
        self._taken_at = taken_at

    def resume(self) -> None:
        """Let the guest run and write again. Idempotent. A late thaw voids the label; a late resume is SnapshotFailed."""
        late = ""
        try:
            if self._holder is not None:
                try:
                    if self._held:
                        still, in_time = self._holder.undo()
                        if not (still and in_time):
                            late = "it was resumed before its time"
                except KeeperFailed as exc:
                    late = f"it could not be resumed: {exc}"
                finally:
                    self._held = False
                    self._holder.close()  # undoes what is left, and frees the monitor
                    self._holder = None
        finally:
            self._thaw()
        if late:
            self._taken_at = None
            raise self._missed(late)

    def _thaw(self) -> None:
        agent, self._agent = self._agent, None
        if agent is None:
            return
        try:
            if self._label is not Consistency.CRASH:
                thawed, in_time = agent.undo()
                if not in_time or not thawed or not self._frozen:
                    self._label = Consistency.CRASH
                    log.warning("%s was thawed too early or too late: crash-consistent", self._cut.machine)
        except KeeperFailed as exc:
            self._label = Consistency.CRASH
            log.error("%s may still be frozen: %s", self._cut.machine, exc)
        finally:
            agent.close()

    def finish(self) -> QemuCut:
        """Export the fleeces: the cut can be read. Leaving the context no longer removes anything."""
        if self._taken_at is None:
            raise self._missed("no instant was taken")
        pieces = {
            disk.key: Piece(
                DiskState(
                    disk.key,
                    disk.key,
                    disk.size,
                    disk.identity,
                    bitmaps.tracker(*self._fresh[disk.key]),
                    boot=index == 0,
                ),
                disk.node,
                item(self._stem, index),
                *self._lines[disk.key],
            )
            for index, disk in enumerate(self._disks)
        }
        cut = QemuCut(
            self._settings,
            self._cut,
            self._stem,
            pieces,
            taken_at=self._taken_at,
            consistency=self._label,
            powered_off=self._off,
        )
        cut.export()
        self._finished = True
        return cut

    def abandon(self) -> None:
        """Resume and remove everything. Idempotent; what cannot be removed now is left to the next cut."""
        with contextlib.suppress(FarshoreError):
            self.resume()
        if self._finished:
            return
        self._finished = True
        try:
            with open_monitor(self._settings, self._cut.machine) as monitor:
                fleece.remove(monitor, self._stem, self._settings.settle_timeout)
        except FarshoreError as exc:
            log.warning("what a failed cut of %s left is for the next one: %s", self._cut.machine, exc)

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    # -- inside --------------------------------------------------------------------------------------------------

    def _actions(self) -> list[dict[str, Any]]:
        actions: list[dict[str, Any]] = []
        for disk in self._disks:
            line, _ = self._lines[disk.key]
            word, number, mark = self._fresh[disk.key]
            actions.append(
                action(
                    "block-dirty-bitmap-add",
                    node=disk.node,
                    name=bitmaps.name(self._cut.machine, word, number, number, mark),
                    granularity=LEAF,
                    persistent=self._settings.persistent and disk.format == "qcow2",
                )
            )
            if line is not None:
                actions.append(
                    action("block-dirty-bitmap-disable", node=disk.node, name=line.bitmaps[-1].name)
                )
        for index, disk in enumerate(self._disks):
            name = item(self._stem, index)
            actions.append(action("blockdev-backup", job_id=name, device=disk.node, target=name, sync="none"))
        return actions

    def _windows(self) -> bool:
        assert self._agent is not None  # noqa: S101  for the type checker
        try:
            return self._agent.run("guest-get-osinfo", answer=3.0).get("id") == "mswindows"
        except KeeperFailed:
            return False  # old agents do not know the command

    def _missed(self, why: str) -> FarshoreError:
        return FarshoreError(
            Code.SNAPSHOT_FAILED,
            f"{self._cut.machine} missed the instant of {self._cut}: {why}.",
            subject=self._cut.machine,
        )
