"""A vSphere machine as a source of the replication engine: snapshot, changed areas, bytes.

The rules are those of the vSphere reference, A.4 to A.6. The frozen links under our snapshot are what is read, and the
device list of the *snapshot* names them: the machine's own list names the live links and their change ids.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.ports import Power
from farshore.providers.vsphere import areas, descriptor, readiness
from farshore.providers.vsphere import machine as machines
from farshore.providers.vsphere.client import Client, Tick, no_tick
from farshore.providers.vsphere.errors import fault_text, vim, vmodl
from farshore.providers.vsphere.folder import Folder, Place
from farshore.providers.vsphere.inventory import Entry, Inventory
from farshore.providers.vsphere.machine import Machine, SnapshotEntry, epoch_of
from farshore.providers.vsphere.snapshots import Snapshots, best_effort
from farshore.replication.ports import DiskState, Extent, FullCopyNeeded, NoCommonInstant

_ASK_EVERY = 5.0  # seconds between two looks for the snapshot in a long copy
EVENTS = 1000  # the most that one question to the event log answers
CLOCKS_APART = timedelta(minutes=5)  # a snapshot's time is its host's, that of tasks and events is vCenter's

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Disk:
    """A frozen disk: its state, its device and where its bytes are."""

    state: DiskState
    device_key: int
    extents: tuple[descriptor.FlatExtent, ...]
    place: Place


class VSphereSource:
    """Fills `replication.ports.Source` for one machine. Blocking; not for two threads at once (its cuts are)."""

    def __init__(
        self,
        client: Client,
        inventory: Inventory,
        folder: Folder,
        *,
        machine: str,
        source: str,
        datastore_types: Callable[[Machine], dict[str, str]],
        tick: Tick = no_tick,
    ) -> None:
        self._client, self._inventory, self._folder = client, inventory, folder
        self._name, self._source, self._tick = machine, source, tick
        self._datastore_types = datastore_types
        self._descriptors: dict[tuple[str, str, int], tuple[descriptor.FlatExtent, ...]] = {}

    def cut(self, name: str, *, want: Consistency) -> VSphereCut:
        """Take one snapshot over all disks, after removing what a predecessor left.

        A snapshot of the same name that is already there is *not* used: it may be older than this call, and a cut
        must not be older than the moment it was asked for.

        SourceNotEligible names disk and reason; SnapshotFailed, SourceBusy, SourceUnreachable, AccessDenied.
        """
        if epoch_of(name) is None:
            raise ValueError(f"snapshot name {name!r} is not farshore-<machine>-<epoch>-<cycle>")
        entry = self._inventory.find(self._source)
        snapshots = Snapshots(self._client, entry, tick=self._tick)
        snapshots.clear(name)
        machine = machines.read(self._client, entry, doing="preparing a snapshot")
        if machine.consolidation_needed:
            snapshots.consolidate()
            machine = machines.read(self._client, entry, doing="preparing a snapshot")
        self._check(machine)
        quiesce = want is not Consistency.CRASH and machine.power is Power.ON and machine.tools_running
        asked = datetime.now(UTC)
        node = snapshots.create(
            name, f"Farshore replicates {self._name}; removed by itself.", quiesce=quiesce
        )
        try:
            off = self._still_off(machine)
            taken = self._taken_at(node, asked)
            disks, left_out = self._freeze(machine, node)
        except BaseException:  # also a cancel: the snapshot must not stay
            best_effort(lambda: snapshots.remove(node.reference, name), f"removal of snapshot {name}")
            raise
        return VSphereCut(
            self._client,
            self._folder,
            snapshots,
            entry=entry,
            node=node,
            taken_at=taken,
            consistency=_achieved(node, machine),
            powered_off=off,
            disks=disks,
            left_out=left_out,
        )

    @property
    def cannot_hold(self) -> str:
        """See `replication.barrier.BarrierSource`."""
        return (
            "vSphere takes each machine's snapshot by itself and has none over several machines, and this source does not "
            "suspend machines to make one"
        )

    def prepare(self, name: str, *, want: Consistency) -> NoReturn:
        """NoCommonInstant, always: a snapshot by itself is a point of one machine."""
        raise NoCommonInstant({self._name: self.cannot_hold})

    def reap(self, upto: str = "") -> list[str]:
        """Remove the snapshots of ours from this machine; returns their names. SourceBusy: see `Source.reap`."""
        return Snapshots(self._client, self._inventory.find(self._source), tick=self._tick).clear(upto)

    def close(self) -> None:
        """Nothing is held: the session belongs to the site."""
        self._descriptors.clear()

    # -- inside --------------------------------------------------------------------------------------------------

    def _check(self, machine: Machine) -> None:
        name = machine.name
        if not machine.connected:
            raise FarshoreError(
                Code.SOURCE_UNREACHABLE, f"vCenter has no connection to the host of {name}.", subject=name
            )
        reason = readiness.machine_reason(machine)
        if reason:
            # A backup product's snapshot goes away by itself: the cycle is tried again, protection does not end.
            passing = bool(machine.foreign_snapshots)
            raise FarshoreError(
                Code.SOURCE_NOT_ELIGIBLE,
                f"{name} cannot be replicated: {reason}.",
                subject=name,
                retryable=passing,
                retry_after=60.0 if passing else None,
            )
        if machine.consolidation_needed:
            raise FarshoreError(
                Code.SOURCE_BUSY, f"The disks of {name} need consolidation, which did not work.", subject=name
            )

    def _still_off(self, before: Machine) -> bool:
        """Whether the machine was off at the cut: it was so just before it, and is so after it.

        The tree's own `state` does not tell: it is what a revert would lead to, so a snapshot without memory of a running
        machine says "poweredOff". A host that vCenter has lost proves nothing.
        """
        if before.power is not Power.OFF or not before.connected:
            return False
        paths = ("runtime.powerState", "runtime.connectionState")
        now = Machine(
            before.entry,
            self._client.read(
                before.entry.reference, paths, doing="looking whether it is off", subject=before.name
            ),
        )
        return now.power is Power.OFF and now.connected

    def _freeze(self, machine: Machine, node: SnapshotEntry) -> tuple[dict[str, _Disk], dict[str, str]]:
        """The frozen disks, and why others are left out."""
        values = self._client.read(
            node.reference, ("config.hardware",), doing="reading the frozen disks", subject=machine.name
        )
        devices = list(values["config.hardware"].device)
        types = self._datastore_types(machine)
        found: dict[str, _Disk] = {}
        left_out: dict[str, str] = {}
        for device in machines.disks_of(devices):
            verdict = readiness.judge(device, types)
            if verdict.skipped:
                left_out[str(device.key)] = verdict.reason
                continue
            where = f"{machines.label(device)} ({device.backing.fileName}) of {machine.name}"
            reason = verdict.reason
            if not reason and device.backing.parent is not None:
                # What stood above it is removed with our snapshot, and the next cut begins with a consolidation.
                raise FarshoreError(
                    Code.SOURCE_NOT_ELIGIBLE,
                    f"{where} cannot be replicated now: its frozen link lies on top of another one.",
                    subject=machine.name,
                    causes=(
                        "A consolidation is unfinished, for instance after a snapshot whose creation was lost.",
                        "Somebody took a snapshot in the same moment.",
                    ),
                    retryable=True,
                    retry_after=30.0,
                )
            extents: tuple[descriptor.FlatExtent, ...] = ()
            if not reason:
                try:
                    extents = self._extents(machine.entry, device)
                except descriptor.UnreadableDisk as exc:
                    reason = str(exc)
            if reason:
                raise FarshoreError(
                    Code.SOURCE_NOT_ELIGIBLE, f"{where} cannot be replicated: {reason}.", subject=machine.name
                )
            state = state_of(device, boot=device.key == machine.boot_key, created=node.created)
            found[state.key] = _Disk(
                state,
                int(device.key),
                extents,
                Place.parse(machine.entry.datacenter, str(device.backing.fileName)),
            )
        if not found:
            raise FarshoreError(
                Code.SOURCE_NOT_ELIGIBLE,
                f"{machine.name} has no disk that snapshots include.",
                subject=machine.name,
            )
        return found, left_out

    def _extents(self, entry: Entry, device: Any) -> tuple[descriptor.FlatExtent, ...]:
        key = (str(device.backing.fileName), str(device.backing.uuid or ""), machines.capacity(device))
        known = self._descriptors.get(key)
        if known is None:
            known = read_descriptor(self._folder, entry, device)
            self._descriptors[key] = known
        return known

    @staticmethod
    def _taken_at(node: SnapshotEntry, asked: datetime) -> datetime:
        """The instant of the cut by this worker's clock, never later than the truth.

        The server's time is used when its clock can be right; else the moment of the request.
        """
        return node.created if asked <= node.created <= datetime.now(UTC) else asked


class VSphereCut:
    """Fills `replication.ports.SourceCut`. Reads may come from several threads."""

    def __init__(
        self,
        client: Client,
        folder: Folder,
        snapshots: Snapshots,
        *,
        entry: Entry,
        node: SnapshotEntry,
        taken_at: datetime,
        consistency: Consistency,
        powered_off: bool,
        disks: dict[str, _Disk],
        left_out: dict[str, str],
    ) -> None:
        self._client, self._folder, self._snapshots = client, folder, snapshots
        self._entry, self._node = entry, node
        self._snapshot: Any = client.bind(node.reference)
        self._taken_at, self._consistency = taken_at, consistency
        self._powered_off = powered_off
        self._disks = disks
        self._left_out = left_out
        self._released = False
        self._release_lock = threading.Lock()
        self._frozen_lock = threading.Lock()
        self._frozen_until = time.monotonic()  # the snapshot was seen to exist at this moment or later

    @property
    def name(self) -> str:
        return self._node.name

    @property
    def taken_at(self) -> datetime:
        return self._taken_at

    @property
    def consistency(self) -> Consistency:
        return self._consistency

    @property
    def powered_off(self) -> bool:
        """Read from vCenter on both sides of the snapshot's creation. See `SourceCut.powered_off`."""
        return self._powered_off

    @property
    def disks(self) -> Sequence[DiskState]:
        return [disk.state for disk in self._disks.values()]

    @property
    def whole(self) -> bool:
        return True

    @property
    def left_out(self) -> Mapping[str, str]:
        return self._left_out

    def changed(self, disk_key: str, since: DiskState | None) -> Iterator[Extent]:
        """All answers are read and checked before the first extent is handed out. See `SourceCut.changed`."""
        disk = self._disks[disk_key]
        size = disk.state.size
        if since is None:
            return iter([Extent(0, size)] if size else [])
        reason = resync_reason(disk.state, since) or self._reverted(since)
        if reason:
            raise FullCopyNeeded(reason)
        change_id, _ = parse_tracker(since.tracker or "")
        try:
            return iter(areas.collect(size, lambda offset: self._query(disk, offset, change_id)))
        except areas.NotCovered as exc:
            raise FullCopyNeeded(f"the answer of change tracking has a gap: {exc}") from exc

    def _reverted(self, since: DiskState) -> str:
        """That the machine was reverted after the cut of `since`, and when; "" when it was not.

        What a revert does to change ids is not documented, so it means a full comparison. The machine's recent tasks
        (about ten minutes) and the event log are asked, from a little before the cut on because two clocks are compared;
        a revert just before the cut costs comparisons that were not needed, one that was missed would cost bytes.
        """
        _, begin = parse_tracker(since.tracker or "")
        if begin is None:
            return f"the last point of {since.label} does not say when it was taken"
        history = self._snapshots.history(begin - CLOCKS_APART)
        for moment, kind in history:
            if "revert" in kind.lower():
                return f"the machine was reverted to a snapshot at {moment:%Y-%m-%d %H:%M:%S} UTC"
        if len(history) >= EVENTS:
            return "the event log since the last point is too long to be searched for reverts"
        return ""

    def _query(self, disk: _Disk, offset: int, change_id: str) -> areas.Window:
        doing = f"asking for changed areas of {disk.state.label}"

        def ask() -> Any:
            try:
                return self._entry.reference.QueryChangedDiskAreas(
                    self._snapshot, disk.device_key, offset, change_id
                )
            except (vmodl.fault.InvalidArgument, vim.fault.FileFault) as exc:
                raise FullCopyNeeded(f"change tracking cannot answer: {fault_text(exc)}") from exc

        info = self._client.call(doing, ask, subject=self._entry.name)
        return areas.Window(
            int(info.startOffset), int(info.length), [(int(a.start), int(a.length)) for a in info.changedArea]
        )

    def read(self, disk_key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. They are of the frozen disk if `confirm` says so after the last read; every few seconds a
        read asks by itself, so that a long copy ends early. SourceReadFailed."""
        disk = self._disks[disk_key]
        if offset < 0 or length < 0 or offset + length > disk.state.size:
            raise ValueError(
                f"range {offset}+{length} is outside {disk.state.label} ({disk.state.size} bytes)"
            )
        found = [
            self._folder.read(disk.place.sibling(file), start, size, subject=self._entry.name)
            for file, start, size in descriptor.pieces(disk.extents, offset, length)
        ]
        if time.monotonic() - self._frozen_until > _ASK_EVERY:
            self.confirm()
        return found[0] if len(found) == 1 else b"".join(found)

    def confirm(self) -> None:
        """What was read is of this cut only if the snapshot still exists *after* the last read.

        Somebody else may remove it at any time ("delete all snapshots"), and then the same file holds newer bytes.
        Threads that wait here share one question, if it was asked after their read.
        """
        read_at = time.monotonic()
        with self._frozen_lock:
            if self._frozen_until >= read_at:
                return
            asked = time.monotonic()
            try:
                self._client.read(self._snapshot, ("vm",), doing=f"reading under snapshot {self.name}")
            except FarshoreError as exc:
                if exc.code is not Code.SOURCE_MACHINE_NOT_FOUND:
                    raise
                raise FarshoreError(
                    Code.SOURCE_READ_FAILED,
                    f"Snapshot {self.name} of {self._entry.name} vanished while it was read; nothing read is used.",
                    subject=self._entry.name,
                    causes=("Somebody deleted the snapshots of the machine.",),
                ) from exc
            self._frozen_until = asked

    def release(self) -> None:
        """Remove the snapshot and fold its links. Idempotent."""
        with self._release_lock:
            if not self._released:
                self._snapshots.remove(self._node.reference, self.name)
                self._released = True


# -- rules -------------------------------------------------------------------------------------------------------


def state_of(device: Any, *, boot: bool, created: datetime) -> DiskState:
    """The state of a frozen disk. The frozen link under our snapshot is the base, so its path is stable.

    The tracker is the change id with the time of the cut by the server's clock: `<change id>@<time>`.
    """
    backing = device.backing
    change_id = getattr(backing, "changeId", None)
    return DiskState(
        key=str(device.key),
        label=machines.label(device),
        size=machines.capacity(device),
        identity=f"{backing.uuid or ''}|{backing.fileName}|{device.key}",
        tracker=f"{change_id}@{created.isoformat()}" if change_id else None,
        boot=boot,
    )


def parse_tracker(tracker: str) -> tuple[str, datetime | None]:
    """Change id and time of the cut out of a tracker."""
    change_id, _, moment = tracker.rpartition("@")
    try:
        return (change_id, datetime.fromisoformat(moment)) if change_id else (tracker, None)
    except ValueError:
        return tracker, None


def resync_reason(now: DiskState, since: DiskState) -> str:
    """Why deltas since `since` cannot be trusted (reference, A.6); "" when they can."""
    label = now.label
    if not since.tracker:
        return f"{label} had no change id at the last point"
    if not now.tracker:
        return f"change tracking of {label} is off or not ready"
    if now.size != since.size:
        return f"the size of {label} changed from {since.size} to {now.size} bytes"
    if now.identity != since.identity:
        return f"{label} is another disk or was moved: {since.identity} became {now.identity}"
    if areas.epoch(parse_tracker(now.tracker)[0]) != areas.epoch(parse_tracker(since.tracker)[0]):
        return f"change tracking of {label} was reset"
    return ""


def read_descriptor(folder: Folder, entry: Entry, device: Any) -> tuple[descriptor.FlatExtent, ...]:
    """The extents of a disk's base link, out of its descriptor. UnreadableDisk with a reason for a person."""
    place = Place.parse(entry.datacenter, str(machines.base_of(device.backing).fileName))
    _, extents = descriptor.parse(folder.text(place, subject=entry.name))
    covered = extents[-1].start + extents[-1].length
    if covered != machines.capacity(device):
        raise descriptor.UnreadableDisk(
            f"its descriptor names {covered} bytes, the disk has {machines.capacity(device)}"
        )
    return extents


def _achieved(node: SnapshotEntry, machine: Machine) -> Consistency:
    """The label says what was achieved: VSS quiesces applications on Windows, elsewhere file systems are frozen."""
    if not node.quiesced:
        return Consistency.CRASH
    return Consistency.APPLICATION if machine.windows else Consistency.FILE_SYSTEM
