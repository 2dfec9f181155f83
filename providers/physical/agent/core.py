"""The agent of one machine: trackers, cuts, seeds. What the service offers, without the network.

Memory over restarts: the trace tracker's own file (valid after a clean stop in the same boot only), hash tables, and the
consumer's last known state of each disk, which is a hint: it decides what a cut keeps, never what is reported as changed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from farshore.providers.physical.agent import disks, dmera, lvm
from farshore.providers.physical.agent.blocks import BLOCK, Blocks
from farshore.providers.physical.agent.config import MIB, Config
from farshore.providers.physical.agent.cuts import CARRY, Cut, CutDisk, CutFailed, Cutter, Snapshots
from farshore.providers.physical.agent.disks import Device, DiskGone, Mount
from farshore.providers.physical.agent.freeze import FreezeFailed, Freezer, thaw_noted
from farshore.providers.physical.agent.hashing import HashTracker
from farshore.providers.physical.agent.holding import DirectReader
from farshore.providers.physical.agent.tracing import TraceTracker, TraceUnavailable, find_tracefs
from farshore.providers.physical.agent.tracking import ChangeSource, NotKnown

TIGHT = 4096  # marks remembered
NAME = re.compile(r"^[A-Za-z0-9._-]{1,200}$")

log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that cannot be served. `code` is one of wire.STATUS; the text is for a person."""

    def __init__(self, code: str, text: str, **details: Any) -> None:
        super().__init__(text)
        self.code, self.details = code, details


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """How a disk is tracked, and why so."""

    kind: str
    reason: str


class Agent:
    """All operations may come from several threads; cuts and barriers are made one at a time."""

    def __init__(self, config: Config, *, mounts: Callable[[], list[Mount]] = disks.mounts) -> None:
        self.config = config
        self._mounts = mounts
        config.state.mkdir(parents=True, exist_ok=True)
        config.run.mkdir(parents=True, exist_ok=True)
        self._note = config.run / "frozen"
        thawed = thaw_noted(self._note)
        if thawed:
            log.warning("a dead predecessor left frozen, now thawed: %s", ", ".join(thawed))
        self.thawed_at_start = thawed
        self._freezer = Freezer(self._note)
        self._making = threading.Lock()
        self._cuts: dict[str, Cut] = {}
        self._cuts_lock = threading.Lock()
        self._tight: dict[
            str, None
        ] = {}  # newest marks that were taken under a freeze of everything, oldest first
        self._floors: dict[str, str] = {}  # the consumer's last known state of each disk
        self._load_memory()
        self._refuse_spool_on_disk()
        self.plans = {disk.key: self._plan(disk.path, disk.tracking) for disk in config.disks}
        self._trackers: dict[str, ChangeSource] = {}
        self._snapshots: dict[str, Snapshots] = {}
        try:
            for kind in sorted({plan.kind for plan in self.plans.values()}):
                self._trackers[kind] = self._make_tracker(kind)
            self._devices()
        except BaseException:
            self._freezer.close()
            raise
        self._cutter = Cutter(config, self._freezer, self._mounted)

    # -- set-up --------------------------------------------------------------------------------------------------

    def _plan(self, path: str, wanted: str) -> DiskPlan:
        if wanted != "auto":
            return DiskPlan(wanted, "as configured")
        if lvm.is_thin(path):
            return DiskPlan("thin", "it is a thin logical volume: snapshots and exact differences")
        try:
            tracefs = find_tracefs(self.config.tracefs)
            if (tracefs / "events/block/block_bio_queue").is_dir():
                return DiskPlan("trace", "the kernel has block trace events")
            return DiskPlan("hash", "the kernel has no block trace events")
        except TraceUnavailable as error:
            return DiskPlan("hash", str(error))

    def _make_tracker(self, kind: str) -> ChangeSource:
        config = self.config
        if kind == "trace":
            return TraceTracker(
                find_tracefs(config.tracefs),
                f"farshore-{config.name}",
                config.state / "trace.json",
                buffer_kib=config.trace_buffer_kib,
            )
        if kind == "thin":
            thin = lvm.ThinTracker()
            self._snapshots["thin"] = thin
            return thin
        if kind == "era":
            return dmera.EraTracker()
        return HashTracker(config.state / "hashes")

    def _refuse_spool_on_disk(self) -> None:
        try:
            protected = {disks.device(disk.path).number for disk in self.config.disks}
        except DiskGone:
            return  # told by every cut
        stat = self.config.spool.stat()
        number = f"{os.major(stat.st_dev)}:{os.minor(stat.st_dev)}"
        if disks.below(number) & protected:
            raise Refused(
                "not-eligible",
                f"The spool {self.config.spool} lies on a protected disk: use tmpfs or another disk.",
            )

    def _devices(self) -> dict[str, Device]:
        """The configured disks as they are now, told to their trackers. Refused("not-eligible")."""
        found: dict[str, Device] = {}
        try:
            for disk in self.config.disks:
                found[disk.key] = disks.device(disk.path)
        except DiskGone as error:
            raise Refused("not-eligible", f"{error}.") from error
        for kind, tracker in self._trackers.items():
            tracker.watch({key: one for key, one in found.items() if self.plans[key].kind == kind})
        return found

    def _mounted(self) -> list[Mount]:
        with suppress(DiskGone):
            return disks.mounts_on([disks.device(disk.path) for disk in self.config.disks], self._mounts())
        return []

    # -- cuts ----------------------------------------------------------------------------------------------------

    def cut(self, name: str, want: str, bases: Mapping[str, str]) -> Cut:
        """One instant of all disks; cuts of this and of earlier epochs are released. Refused, CutFailed, SeedNeeded."""
        if not NAME.match(name):
            raise Refused("bad-request", f"{name!r} is no name for a cut.")
        if not self._making.acquire(timeout=1.0):
            raise Refused("busy", "Another cut is being made.")
        try:
            self._reap(name)
            devices = self._devices()
            given = {key: value for key, value in {**self._floors, **bases}.items() if key in devices}
            parts = {
                disk.key: CutDisk(
                    key=disk.key,
                    device=devices[disk.key],
                    tracker=self._trackers[self.plans[disk.key].kind],
                    reader=DirectReader(devices[disk.key]),
                    base=given.get(disk.key, ""),
                    base_carry=0.0 if given.get(disk.key) in self._tight else CARRY,
                )
                for disk in self.config.disks
            }
            made = self._cutter.take(name, want, parts, self._snapshots)
            self._note_tight(disk.mark for disk in made.disks.values() if not disk.loose)
            with self._cuts_lock:
                self._cuts[name] = made
            return made
        finally:
            self._making.release()

    def _note_tight(self, marks: Iterable[str]) -> None:
        """A mark that is not noted (any more) counts as taken without a freeze: more is told, never less."""
        self._tight.update(dict.fromkeys(marks))
        while len(self._tight) > TIGHT:
            del self._tight[next(iter(self._tight))]

    def find(self, name: str) -> Cut:
        with self._cuts_lock:
            cut = self._cuts.get(name)
        if cut is None:
            raise Refused("gone", f"There is no cut {name}: it was released, or the agent was started anew.")
        return cut

    def changed(self, name: str, key: str, since: str) -> Blocks:
        """Blocks that differ between the state `since` and the cut. NotKnown, also for "": no state.

        The answer is remembered: the next cut keeps what changed since this state, or everything.
        """
        cut = self.find(name)
        disk = self._disk(cut, key)
        carry = 0.0 if since in self._tight else CARRY
        self._floors.pop(key, None)
        if not since:
            raise NotKnown("there is no earlier state")
        found = disk.tracker.changed(key, since, disk.mark, carry=carry)
        self._floors[key] = since
        return found

    def held(self, name: str, key: str) -> Blocks:
        """Blocks whose bytes the cut keeps."""
        cut = self.find(name)
        disk = self._disk(cut, key)
        return cut.spool.held(key, disk.device.size)

    def read(self, name: str, key: str, offset: int, length: int) -> bytes:
        cut = self.find(name)
        disk = self._disk(cut, key)
        if offset < 0 or length < 1 or offset + length > disk.device.size:
            raise Refused("bad-request", f"{offset}+{length} is outside {key} ({disk.device.size} bytes).")
        return cut.read(key, offset, length)

    def release(self, name: str) -> None:
        with self._cuts_lock:
            cut = self._cuts.pop(name, None)
        if cut is not None:
            cut.close()

    def reap(self, upto: str) -> list[str]:
        """Release what dead consumers left. Refused("busy") when a cut of a later epoch than `upto`'s is there."""
        with self._making:
            return self._reap(upto)

    def _reap(self, upto: str) -> list[str]:
        with self._cuts_lock:
            names = sorted(self._cuts)
        later = [name for name in names if upto and epoch_of(name) > epoch_of(upto)]
        if later:
            raise Refused("busy", f"{later[0]} belongs to a later epoch than {upto}.")
        for name in names:
            self.release(name)
        return names

    @staticmethod
    def _disk(cut: Cut, key: str) -> CutDisk:
        disk = cut.disks.get(key)
        if disk is None:
            raise Refused("bad-request", f"Cut {cut.name} has no disk {key}.")
        return disk

    # -- copying in advance --------------------------------------------------------------------------------------

    def seed_mark(self) -> dict[str, str]:
        """A barrier without a cut: what is read from the running disks after it and is not reported as changed since is as
        it was. Tracker ids by disk. Refused."""
        with self._making:
            devices = self._devices()
            marks: dict[str, str] = {}
            try:
                with self._freezer.frozen(self._mounted(), self.config.freeze_limit) as frozen:
                    for tracker in self._trackers.values():
                        marks.update(tracker.mark())
            except FreezeFailed as error:
                raise Refused("snapshot-failed", f"No barrier: {error}.") from error
            if not frozen.late and not frozen.unfreezable:
                covered = {number for m in self._mounted() if m.path in frozen.frozen for number in m.disks}
                self._note_tight(marks[key] for key, one in devices.items() if one.number in covered)
            for tracker in self._trackers.values():
                tracker.tidy()
            return {key: marks[key] for key in devices}

    def seed_changed(self, key: str, since: str, until: str) -> Blocks:
        """NotKnown."""
        plan = self.plans.get(key)
        if plan is None:
            raise Refused("bad-request", f"There is no disk {key}.")
        carry = 0.0 if since in self._tight else CARRY
        return self._trackers[plan.kind].changed(key, since, until, carry=carry)

    def read_live(self, key: str, offset: int, length: int) -> bytes:
        """Bytes of the running disk: of no instant. Only for copies in advance; offset and length are whole blocks."""
        if key not in self.plans:
            raise Refused("bad-request", f"There is no disk {key}.")
        path = next(disk.path for disk in self.config.disks if disk.key == key)
        one = disks.device(path)
        if offset < 0 or offset % BLOCK or length < 1 or offset + length > one.size:
            raise Refused("bad-request", f"{offset}+{length} is outside {key} ({one.size} bytes).")
        reader = DirectReader(one)
        try:
            return bytes(reader.read(offset, length))
        finally:
            reader.close()

    # -- what there is -------------------------------------------------------------------------------------------

    def inventory(self) -> dict[str, Any]:
        """JSON-ready."""
        found: list[dict[str, Any]] = []
        for disk in self.config.disks:
            plan = self.plans[disk.key]
            entry: dict[str, Any] = {
                "key": disk.key,
                "path": disk.path,
                "boot": disk.boot,
                "tracking": plan.kind,
                "tracking_reason": plan.reason,
            }
            try:
                one = disks.device(disk.path)
                mounted = disks.mounts_on([one], self._mounts())
                entry |= {
                    "size": one.size,
                    "identity": one.identity,
                    "read_only": one.read_only,
                    "mounts": [[m.path, m.kind, "ro" if m.read_only else "rw"] for m in mounted],
                    "error": "",
                }
            except DiskGone as error:
                entry |= {"size": 0, "identity": "", "read_only": False, "mounts": [], "error": str(error)}
            found.append(entry)
        return {
            **disks.machine(),
            "agent": self.config.name,
            "platform": "linux",
            "disks": found,
            "abilities": {"lvm": lvm.available(), "era": dmera.available(), "hooks": len(self.config.hooks)},
        }

    def status(self) -> dict[str, Any]:
        """JSON-ready."""
        with self._cuts_lock:
            cuts = [
                {"name": cut.name, "taken_at": cut.taken_at.isoformat(), "kept_bytes": cut.spool.bytes}
                for cut in self._cuts.values()
            ]
        return {
            "now": datetime.now(UTC).isoformat(),
            "cuts": cuts,
            "spool_bytes": self.config.spool_mib * MIB,
            "thawed_at_start": self.thawed_at_start,
            "watchdog_pid": self._freezer.watchdog_pid,
            "tracking": {key: plan.kind for key, plan in self.plans.items()},
        }

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self, *, clean: bool = True) -> None:
        with self._making:
            for name in list(self._cuts):
                self.release(name)
            for tracker in self._trackers.values():
                tracker.stop(clean=clean)
            if clean:
                memory = {"floors": self._floors, "tight": list(self._tight)}
                (self.config.state / "memory.json").write_text(json.dumps(memory))
            self._freezer.close()

    def _load_memory(self) -> None:
        path = self.config.state / "memory.json"
        try:
            kept = json.loads(path.read_text())
            self._floors.update({str(key): str(value) for key, value in kept["floors"].items()})
            self._note_tight(str(mark) for mark in kept["tight"])
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return
        path.unlink()  # an unclean stop must not find it again: marks of its own would be missing in it


def epoch_of(name: str) -> int:
    """The epoch in a cut's name `farshore-<machine>-<epoch>-<cycle>`; -1 for other names: nobody owns them."""
    parts = name.rsplit("-", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else -1


__all__ = ["Agent", "CutFailed", "DiskPlan", "NotKnown", "Refused", "epoch_of"]
