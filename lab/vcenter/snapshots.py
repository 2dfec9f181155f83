"""Snapshots of a machine: the tree, taking, removing, reverting, consolidating."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter import devices
from farshore.lab.vcenter.objects import Managed, wsdl
from farshore.lab.vcenter.vim import array, make_fault, utc, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.machine import Machine
    from farshore.lab.vcenter.tasks import Task

Spend = Callable[[float], None]


class Snapshot(Managed):
    """`view`: by device key (as text) the frozen link, its change id and the capacity."""

    vtype = vim.vm.Snapshot

    def __init__(self, machine: Machine, record: dict[str, Any]) -> None:
        super().__init__(machine.lab, record["moid"])
        self.machine = machine
        self.name: str = record["name"]
        self.description: str = record["description"]
        self.id: int = record["id"]
        self.time: float = record["time"]
        self.power: str = record["power"]
        self.quiesced: bool = record["quiesced"]
        self.parent_moid: str | None = record["parent"]
        self.view: dict[str, dict[str, Any]] = record["view"]

    def to_json(self) -> dict[str, Any]:
        return {
            "moid": self.moid,
            "name": self.name,
            "description": self.description,
            "id": self.id,
            "time": self.time,
            "power": self.power,
            "quiesced": self.quiesced,
            "parent": self.parent_moid,
            "view": self.view,
        }

    def p_config(self) -> Any:
        with self.lab.lock:
            return devices.config(self.machine, self.view, utc(self.time))

    def p_vm(self) -> Any:
        return self.machine.ref

    def p_childSnapshot(self) -> Any:
        return array(vim.vm.Snapshot, [s.ref for s in self.machine.tree.children(self.moid)])

    @wsdl
    def RemoveSnapshot_Task(self, removeChildren: bool, consolidate: bool | None = None) -> Any:
        machine = self.machine

        def work(task: Task) -> None:
            doomed: list[Snapshot] = machine.tree.subtree(self) if removeChildren else [self]
            machine.tree.remove(
                doomed,
                consolidate is not False,
                lambda seconds: task.wait(seconds, task.info_value.progress or 0, 99),
            )

        return self.lab.tasks.start(machine, "RemoveSnapshot_Task", work)

    @wsdl
    def RevertToSnapshot_Task(self, host: Any = None, suppressPowerOn: bool | None = None) -> Any:
        return self.lab.tasks.start(
            self.machine,
            "RevertToSnapshot_Task",
            lambda _task: self.machine.tree.revert(self, suppress_power_on=bool(suppressPowerOn)),
        )

    @wsdl
    def RenameSnapshot(self, name: str | None = None, description: str | None = None) -> None:
        self.name = name or self.name
        self.description = self.description if description is None else description
        self.machine.save()


class SnapshotTree:
    """The snapshots of one machine."""

    def __init__(self, machine: Machine, records: list[dict[str, Any]], current: str | None) -> None:
        self._machine = machine
        self._snapshots = {r["moid"]: Snapshot(machine, r) for r in records}
        self.current: Snapshot | None = self._snapshots.get(current) if current else None

    def to_json(self) -> list[dict[str, Any]]:
        return [s.to_json() for s in self._snapshots.values()]

    def all(self) -> list[Snapshot]:
        return list(self._snapshots.values())

    def roots(self) -> list[Snapshot]:
        return self.children(None)

    def children(self, moid: str | None) -> list[Snapshot]:
        return [s for s in self._snapshots.values() if s.parent_moid == moid]

    def by_name(self, name: str) -> Snapshot:
        """Raises `ValueError`."""
        found = next((s for s in self.all() if name in (s.name, s.moid)), None)
        if found is None:
            raise ValueError(f"{self._machine.name} has no snapshot {name!r}")
        return found

    def subtree(self, snapshot: Snapshot) -> list[Snapshot]:
        result = [snapshot]
        for child in self.children(snapshot.moid):
            result += self.subtree(child)
        return result

    def info(self) -> Any:
        """`vim.vm.SnapshotInfo`, None without snapshots."""
        if not self._snapshots:
            return None
        return vim.vm.SnapshotInfo(
            currentSnapshot=self.current.ref if self.current else None, rootSnapshotList=self._listing(None)
        )

    def _listing(self, parent: str | None) -> Any:
        return array(
            vim.vm.SnapshotTree,
            [
                vim.vm.SnapshotTree(
                    snapshot=s.ref,
                    vm=self._machine.ref,
                    name=s.name,
                    description=s.description,
                    id=s.id,
                    createTime=utc(s.time),
                    state=s.power,
                    quiesced=s.quiesced,
                    replaySupported=False,
                    childSnapshotList=self._listing(s.moid),
                )
                for s in self.children(parent)
            ],
        )

    # ------------------------------------------------------------------ operations

    def create(self, name: str, description: str, memory: bool, quiesce: bool) -> Snapshot:
        """Freeze all disks at one instant. Writes of the guest wait meanwhile."""
        machine, lab = self._machine, self._machine.lab
        self._check(quiesce)
        view: dict[str, dict[str, Any]] = {}
        with machine.io:
            moment = time.time()
            machine.stun(seal=False)
            for disk in machine.disks.values():
                if disk.mode.startswith("independent"):
                    continue
                change_id = disk.cbt.seal() if disk.cbt else None
                view[str(disk.key)] = {
                    "link": disk.freeze(),
                    "change_id": change_id,
                    "capacity": disk.capacity,
                }
            ledger_last = lab.guests.last_number(machine)
            number = lab.next_number()
            with lab.lock:
                snapshot = Snapshot(
                    machine,
                    {
                        "moid": f"snapshot-{number}",
                        "name": name,
                        "description": description,
                        "id": len(self._snapshots) + 1,
                        "time": moment,
                        "power": "poweredOn" if memory and machine.powered_on else "poweredOff",
                        "quiesced": quiesce and machine.powered_on,
                        "parent": self.current.moid if self.current else None,
                        "view": view,
                    },
                )
                self._snapshots[snapshot.moid] = snapshot
                self.current = snapshot
                lab.add(snapshot)
                machine.save()
        if lab.settings.digest_log:
            for disk in machine.disks.values():
                frozen = view.get(str(disk.key))
                if frozen is not None:
                    lab.store.add_digest(
                        {
                            "vm": machine.name,
                            "snapshot": name,
                            "moref": snapshot.moid,
                            "disk": disk.key,
                            "label": disk.label,
                            "bytes": disk.capacity,
                            "sha256": disk.sha256(frozen["link"]),
                            "time": moment,
                            "ledger_last": ledger_last,
                        }
                    )
        return snapshot

    def _check(self, quiesce: bool) -> None:
        machine = self._machine
        if self._depth() >= machine.lab.settings.snapshot_depth:
            raise make_fault("vim.fault.TooManySnapshotLevels", "Snapshot hierarchy is too deep.")
        if any(d.backing == "rdm_physical" for d in machine.disks.values()):
            raise make_fault(
                "vim.fault.SnapshotIncompatibleDeviceInVm",
                "A device in the machine prevents the snapshot.",
            )
        if quiesce and machine.powered_on and not machine.tools_running:
            raise make_fault(
                "vim.fault.FilesystemQuiesceFault",
                "Cannot create a quiesced snapshot because the create snapshot operation exceeded the time limit "
                "for holding off I/O in the frozen virtual machine, or the tools are not running.",
            )

    def _depth(self) -> int:
        depth, node = 0, self.current
        while node is not None:
            depth += 1
            node = self._snapshots.get(node.parent_moid) if node.parent_moid else None
        return depth

    def remove(self, doomed: list[Snapshot], consolidate: bool, spend: Spend) -> None:
        """Forget snapshots; with `consolidate` fold what they held into the chain."""
        machine, lab = self._machine, self._machine.lab
        with machine.io, lab.lock:
            gone = {s.moid for s in doomed}
            for snapshot in doomed:
                for child in self.children(snapshot.moid):
                    child.parent_moid = snapshot.parent_moid
                if self.current is snapshot:
                    self.current = self._snapshots.get(snapshot.parent_moid) if snapshot.parent_moid else None
                self._snapshots.pop(snapshot.moid, None)
                lab.forget(snapshot)
            for snapshot in self._snapshots.values():
                if snapshot.parent_moid in gone:
                    snapshot.parent_moid = None
            machine.save()
        if consolidate:
            self.consolidate(spend)

    @property
    def consolidation_needed(self) -> bool:
        return any(d.loose(self._owned(d.key)) for d in self._machine.disks.values())

    def consolidate(self, spend: Spend) -> None:
        """Fold every loose link, one after the other; the machine is stunned for each."""
        machine, settings = self._machine, self._machine.lab.settings
        if not self.consolidation_needed:
            return
        self._blind(settings.defect_under_report)
        try:
            if settings.consolidate_mib_per_s > 0:
                spend(
                    self._loose_bytes() / (settings.consolidate_mib_per_s * (1 << 20)) * settings.time_scale
                )
            for disk in machine.disks.values():
                while self._fold_one(disk.key):
                    pass
        finally:
            self._blind(False)
        with machine.io:
            machine.stun()
            machine.save()

    def _fold_one(self, key: int) -> bool:
        machine = self._machine
        disk = machine.disks[key]
        with machine.io:
            loose = disk.loose(self._owned(key))
            if not loose:
                return False
            disk.copy_down(loose[0])
            with machine.lab.lock:
                child, dead = disk.adopt(loose[0])
                if child is not None:
                    for snapshot in self._snapshots.values():
                        frozen = snapshot.view.get(str(key))
                        if frozen is not None and frozen["link"] == child:
                            frozen["link"] = loose[0]
                machine.save()
            dead.remove()
        return True

    def revert(self, snapshot: Snapshot, *, suppress_power_on: bool = False) -> None:
        """Go back to a snapshot: what the guest wrote since is gone. Without memory the machine ends powered off."""
        machine, settings = self._machine, self._machine.lab.settings
        if machine.powered_on:
            machine.power_off()
        with machine.io:
            machine.stun()
            for key, frozen in snapshot.view.items():
                disk = machine.disks[int(key)]
                differing = disk.differing(disk.live, frozen["link"])
                disk.revert(frozen["link"])
                if disk.cbt is not None:
                    if settings.revert_changes_epoch:
                        disk.start_tracking()
                    else:
                        disk.cbt.merge(differing)
            with machine.lab.lock:
                self.current = snapshot
                machine.save()
            for key in snapshot.view:
                disk = machine.disks[int(key)]
                for number in [
                    n for n in disk.loose(self._owned(disk.key)) if n and not disk.has_children(n)
                ]:
                    _, dead = disk.adopt(number)
                    machine.save()
                    dead.remove()
        if snapshot.power == "poweredOn" and not suppress_power_on:
            machine.power_on()

    def _owned(self, key: int) -> set[int]:
        views = [s.view.get(str(key)) for s in list(self._snapshots.values())]
        return {v["link"] for v in views if v is not None}

    def _loose_bytes(self) -> int:
        total = 0
        for disk in self._machine.disks.values():
            for number in disk.loose(self._owned(disk.key)):
                total += disk.fold_bytes(number)
        return total

    def _blind(self, on: bool) -> None:
        with self._machine.io:
            for disk in self._machine.disks.values():
                if disk.cbt is not None and not self._machine.lab.settings.defect_growth:
                    disk.cbt.blind = on
