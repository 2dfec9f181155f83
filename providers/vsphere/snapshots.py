"""Snapshots of one machine: taken, found again after a lost answer, removed; never two by accident.

The outcome of a call whose answer was lost is read from the server (running tasks of the machine, then its snapshot
tree), never guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.vsphere import machine as machines
from farshore.providers.vsphere.client import Client, Tick, no_tick
from farshore.providers.vsphere.errors import NETWORK_ERRORS, classify, vim, vmodl
from farshore.providers.vsphere.inventory import Entry
from farshore.providers.vsphere.machine import SIGNATURE, SnapshotEntry, epoch_of, utc

CREATE = "createsnapshot"  # part of Task.info.descriptionId, lower case
DISK_TASKS = ("snapshot", "consolidate")  # parts of descriptionIds of tasks that change the chain of links
TRIES = 3

# A quiesced snapshot that failed with one of these would fail without quiescing as well.
_NOT_QUIESCING = (
    vim.fault.NoPermission,
    vim.fault.TaskInProgress,
    vim.fault.FileFault,
    vim.fault.InvalidPowerState,
    vmodl.fault.HostCommunication,
    vmodl.fault.ManagedObjectNotFound,
    vmodl.fault.RequestCanceled,
)

log = logging.getLogger(__name__)


class Snapshots:
    """Takes and removes the snapshots of one machine."""

    def __init__(self, client: Client, entry: Entry, *, tick: Tick = no_tick) -> None:
        self._client, self._entry, self._tick = client, entry, tick
        self._machine: Any = entry.reference

    def tree(self) -> list[SnapshotEntry]:
        """The snapshot tree now."""
        values = self._client.read(
            self._machine, ("snapshot", "name"), doing="reading the snapshots", subject=self._entry.name
        )
        return machines.Machine(self._entry, values).snapshots

    def settle(self, parts: Sequence[str] = DISK_TASKS) -> None:
        """Wait until no task of the machine changes its chain of links (a predecessor may have started one).

        SourceBusy when that takes long: a consolidation may last for hours.
        """
        doing = "waiting for another snapshot task of the machine"
        for task in self._running(parts):
            try:
                self._wait(task, doing, self._client.settings.settle_timeout)
            except vmodl.MethodFault as exc:
                # Its failure was its issuer's business; the tree is read afterwards.
                log.info("an earlier task on %s ended with %s", self._entry.name, type(exc).__name__)
            except FarshoreError as exc:
                if exc.code is not Code.SOURCE_MACHINE_NOT_FOUND:  # the task object is gone: it ended
                    raise

    def clear(self, own: str = "") -> list[str]:
        """Remove snapshots of ours that a predecessor left; returns their names. Those of people stay.

        With `own` (the name of the snapshot to come), one of a higher epoch is another, newer writer's, who works
        now: SourceBusy, and nothing is touched. Without, the caller knows that nobody replicates the machine.
        """
        self.settle()
        stale = [s for s in self.tree() if s.ours]
        mine = epoch_of(own)
        for snapshot in stale:
            epoch = epoch_of(snapshot.name)
            if mine is not None and epoch is not None and epoch > mine:
                raise FarshoreError(
                    Code.SOURCE_BUSY,
                    f"A newer writer holds {self._entry.name} with snapshot {snapshot.name}; {own} has no right to it.",
                    subject=self._entry.name,
                    causes=(
                        "Another worker took the replication over.",
                        "A former protection left the snapshot.",
                    ),
                    action="None needed in the first case. In the second, delete the snapshot in vSphere.",
                )
        for snapshot in reversed(stale):  # children first
            self.remove(snapshot.reference, snapshot.name)
        return [snapshot.name for snapshot in stale]

    def create(self, name: str, description: str, *, quiesce: bool) -> SnapshotEntry:
        """Take a snapshot without memory. With `quiesce`, one without follows if quiescing fails; the entry tells.

        The caller made sure that no snapshot of this name existed. ValueError when the description lacks our signature:
        nobody could tell then that the snapshot is ours.
        """
        if not description.startswith(SIGNATURE):
            raise ValueError(f"the description of snapshot {name!r} does not begin with {SIGNATURE!r}")
        if quiesce:
            try:
                return self._create(name, description, quiesce=True)
            except vmodl.MethodFault as exc:
                if isinstance(exc, _NOT_QUIESCING):
                    raise self._failed(exc) from exc
                log.warning("%s: quiescing failed (%s), trying without", self._entry.name, type(exc).__name__)
            left = self._find(name)
            if left is not None:
                self.remove(left.reference, name)
        try:
            return self._create(name, description, quiesce=False)
        except vmodl.MethodFault as exc:
            raise self._failed(exc) from exc

    def remove(self, reference: Any, name: str) -> None:
        """Remove one snapshot, keeping its children, and fold its links. A snapshot that is gone is removed."""
        doing = f"removing snapshot {name}"
        snapshot = self._client.bind(reference)
        for attempt in range(1, TRIES + 1):
            try:
                self._remove(snapshot, doing)
                break
            except vmodl.fault.ManagedObjectNotFound:
                break
            except (vim.fault.TaskInProgress, vim.fault.InvalidState, *NETWORK_ERRORS) as exc:
                # Busy, or sent and not answered: wait for what runs, look, and ask again if it is still there.
                self.settle(("",))
                if not self._exists(snapshot):
                    break
                if attempt == TRIES:
                    raise classify(exc, doing=doing, subject=self._entry.name) from exc
            except vmodl.MethodFault as exc:
                raise classify(exc, doing=doing, subject=self._entry.name) from exc
        self.consolidate()

    def _remove(self, snapshot: Any, doing: str) -> None:
        client = self._client
        task = client.call(
            doing, lambda: snapshot.RemoveSnapshot_Task(False, True), subject=self._entry.name, reading=False
        )
        try:
            self._wait(task, doing, client.settings.removal_timeout)
        except FarshoreError as exc:
            # The task object may be gone with a restart of the server: then the tree knows.
            if exc.code is not Code.SOURCE_MACHINE_NOT_FOUND or self._exists(snapshot):
                raise

    def _exists(self, snapshot: Any) -> bool:
        return any(s.reference._GetMoId() == snapshot._GetMoId() for s in self.tree())

    def history(self, begin: datetime) -> list[tuple[datetime, str]]:
        """(time, descriptionId) of tasks of the machine since `begin` by the server's clock, as far as it remembers."""
        doing = "reading the machine's history"
        found: list[tuple[datetime, str]] = []
        for info in self._recent(("info.descriptionId", "info.queueTime"), doing).values():
            if "info.queueTime" in info and utc(info["info.queueTime"]) >= begin:
                found.append((utc(info["info.queueTime"]), str(info.get("info.descriptionId", ""))))
        manager = self._client.content.eventManager
        if manager is None:
            return found
        spec = vim.event.EventFilterSpec
        wanted = spec(
            entity=spec.ByEntity(entity=self._machine, recursion="self"), time=spec.ByTime(beginTime=begin)
        )
        events = self._client.call(doing, lambda: manager.QueryEvents(wanted), subject=self._entry.name)
        for event in events or ():
            info = getattr(event, "info", None)  # of a TaskEvent
            found.append(
                (utc(event.createdTime), str(getattr(info, "descriptionId", "") or type(event).__name__))
            )
        return found

    def consolidate(self) -> None:
        """Fold links that a removal left behind. A failure is logged: the next cycle begins with it again."""
        doing = "consolidating disks"
        subject = self._entry.name
        values = self._client.read(
            self._machine, ("runtime.consolidationNeeded",), doing=doing, subject=subject
        )
        if not values.get("runtime.consolidationNeeded"):
            return
        try:
            task = self._client.call(
                doing, self._machine.ConsolidateVMDisks_Task, subject=subject, reading=False
            )
            self._wait(task, doing, self._client.settings.removal_timeout)
        except (vmodl.MethodFault, *NETWORK_ERRORS) as exc:
            log.warning("%s needs consolidation, which failed: %s", subject, classify(exc, doing=doing))

    # -- inside --------------------------------------------------------------------------------------------------

    def _create(self, name: str, description: str, *, quiesce: bool) -> SnapshotEntry:
        doing = f"taking snapshot {name}"
        subject = self._entry.name
        lost: BaseException | None = None
        for _ in range(2):
            try:
                task = self._client.call(
                    doing,
                    lambda: self._machine.CreateSnapshot_Task(name, description, False, quiesce),
                    subject=subject,
                    reading=False,
                )
                self._wait(task, doing, self._client.settings.snapshot_timeout, Code.SNAPSHOT_FAILED)
            except NETWORK_ERRORS as exc:  # the answer was lost: the snapshot may be there, or come
                log.info("%s: the answer was lost while %s: %s", subject, doing, exc)
                lost = exc
                self.settle((CREATE,))
            except FarshoreError as exc:
                if exc.code is not Code.SOURCE_MACHINE_NOT_FOUND:
                    raise
                lost = exc  # the task object is gone: the server was restarted
            found = self._find(name)
            if found is not None:
                return found
            if lost is None:
                break
        if isinstance(lost, NETWORK_ERRORS):
            raise classify(lost, doing=doing, subject=subject) from lost
        reason = str(lost) if lost else "the task succeeded, but the snapshot is not in the tree"
        raise FarshoreError(
            Code.SNAPSHOT_FAILED, f"Snapshot {name} did not come to be: {reason}.", subject=subject
        ) from lost

    def _find(self, name: str) -> SnapshotEntry | None:
        found = [s for s in self.tree() if s.name == name and s.ours]
        return found[-1] if found else None

    def _running(self, parts: Sequence[str]) -> list[Any]:
        """Running tasks of the machine whose descriptionId holds one of `parts` (lower case)."""
        infos = self._recent(("info.state", "info.descriptionId"), "looking for running tasks")
        return [vim.Task(moid) for moid, info in infos.items() if _runs(info, parts)]

    def _recent(self, paths: Sequence[str], doing: str) -> dict[str, dict[str, Any]]:
        """Properties of the machine's recent tasks, by moid."""
        values = self._client.read(self._machine, ("recentTask",), doing=doing, subject=self._entry.name)
        tasks = list(values.get("recentTask") or ())
        try:
            return self._client.read_many(tasks, paths, doing=doing)
        except FarshoreError as exc:
            if exc.code is not Code.SOURCE_MACHINE_NOT_FOUND:
                raise
            return self._one_by_one(tasks, paths, doing)  # one of them ended long ago and is gone

    def _one_by_one(self, tasks: list[Any], paths: Sequence[str], doing: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for task in tasks:
            try:
                found[task._GetMoId()] = self._client.read(task, paths, doing=doing)
            except FarshoreError as exc:
                if exc.code is not Code.SOURCE_MACHINE_NOT_FOUND:
                    raise
        return found

    def _wait(self, task: Any, doing: str, timeout: float, fallback: Code = Code.SOURCE_BUSY) -> Any:
        return self._client.wait_task(
            task, doing=doing, subject=self._entry.name, timeout=timeout, tick=self._tick, fallback=fallback
        )

    def _failed(self, exc: BaseException) -> FarshoreError:
        return classify(
            exc, doing="taking a snapshot", subject=self._entry.name, fallback=Code.SNAPSHOT_FAILED
        )


def _runs(info: Mapping[str, Any], parts: Sequence[str]) -> bool:
    kind = str(info.get("info.descriptionId", "")).lower()
    return str(info.get("info.state")) in ("running", "queued") and any(part in kind for part in parts)


def best_effort(do: Callable[[], object], what: str) -> None:
    """For clean-up on the way out of another error, which must not be hidden by this one."""
    try:
        do()
    except FarshoreError as exc:
        log.warning("%s failed and is left to the next cycle: %s", what, exc)
