"""A virtual machine: power, guest, reconfiguration, change queries. Snapshots are in `snapshots`, hardware in `devices`.

Locks: `io` is held for every guest write and across a stun (outer); the laboratory's lock guards metadata (inner).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter import change_query, devices, machine_view
from farshore.lab.vcenter.disks import Disk
from farshore.lab.vcenter.objects import Entity, wsdl
from farshore.lab.vcenter.snapshots import SnapshotTree
from farshore.lab.vcenter.vim import array, invalid_argument, make_fault, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.inventory import Datacenter, Datastore, Host
    from farshore.lab.vcenter.service import LabVCenter
    from farshore.lab.vcenter.tasks import Task

ON, OFF = "poweredOn", "poweredOff"


class Machine(Entity):
    """`record` is what the store keeps; see `to_json`."""

    vtype = vim.VirtualMachine

    def __init__(self, lab: LabVCenter, record: dict[str, Any], parent: Entity, host: Host) -> None:
        super().__init__(lab, record["moid"], record["name"], parent)
        self.host = host
        self.number = int(self.moid.rpartition("-")[2])
        self.io = threading.RLock()
        self.busy: Task | None = None
        self.directory: str = record["directory"]
        self.datastore: str = record["datastore"]
        self.uuid: str = record["uuid"]
        self.instance_uuid: str = record["instance_uuid"]
        self.guest_id: str = record.get("guest_id", "ubuntu64Guest")
        self.guest_full_name: str = record.get("guest_full_name", "Ubuntu Linux (64-bit)")
        self.firmware: str = record.get("firmware", "efi")
        self.num_cpu: int = record.get("num_cpu", 2)
        self.memory_mb: int = record.get("memory_mb", 4096)
        self.template: bool = record.get("template", False)
        self.annotation: str = record.get("annotation", "")
        self.extra: dict[str, str] = record.get("extra", {})
        self.nics: list[dict[str, Any]] = record.get("nics", [])
        self.cbt: bool = record.get("cbt", False)
        self.power: str = record.get("power", OFF)
        self.tools: str = record.get("tools", "running")
        self.hostname: str = record.get("hostname", self.name)
        self.shutdown: dict[str, Any] = record.get("shutdown", {})
        self.workload: dict[str, Any] | None = record.get("workload")
        self.registered: bool = record.get("registered", True)
        self.boot_until = 0.0
        self.held_extents: set[int] = set()
        """Keys of disks whose extents something else holds open (NFC): /folder refuses them."""
        self.disks: dict[int, Disk] = {}
        for item in record["disks"]:
            self.disks[item["key"]] = Disk(self.store_path(item["datastore"]), self.state_path, item)
        self.tree = SnapshotTree(self, record.get("snapshots", []), record.get("current"))

    # ------------------------------------------------------------------ facts

    @property
    def state_path(self) -> Path:
        return self.lab.root / "state" / self.moid

    def store_path(self, datastore: str) -> Path:
        return self.lab.root / "datastores" / datastore / self.directory

    @property
    def vmx(self) -> str:
        return f"[{self.datastore}] {self.directory}/{self.directory}.vmx"

    @property
    def datacenter(self) -> Datacenter:
        return self.host.cluster.datacenter

    @property
    def powered_on(self) -> bool:
        return self.power == ON

    @property
    def tools_running(self) -> bool:
        return self.powered_on and self.tools == "running" and time.monotonic() >= self.boot_until

    def datastores(self) -> list[Datastore]:
        names = dict.fromkeys([self.datastore, *(d.datastore for d in self.disks.values())])
        return [self.datacenter.datastores[n] for n in names]

    def datastore_of(self, disk: Disk) -> Datastore:
        return self.datacenter.datastores[disk.datastore]

    def file_name(self, disk: Disk, link: int) -> str:
        return f"[{disk.datastore}] {self.directory}/{disk.descriptor_name(link)}"

    def addresses(self) -> list[str]:
        return [n["ip"] for n in self.nics if n.get("ip")]

    def disk(self, which: int | str) -> Disk:
        """By index from 0, device key or label. Raises `ValueError`."""
        if isinstance(which, str):
            found = next((d for d in self.disks.values() if d.label == which), None)
        else:
            found = self.disks.get(which) or dict(enumerate(self.disks.values())).get(which)
        if found is None:
            raise ValueError(f"{self.name} has no disk {which!r}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "moid": self.moid,
            "name": self.name,
            "folder": self.parent.moid if self.parent else None,
            "host": self.host.moid,
            "directory": self.directory,
            "datastore": self.datastore,
            "uuid": self.uuid,
            "instance_uuid": self.instance_uuid,
            "guest_id": self.guest_id,
            "guest_full_name": self.guest_full_name,
            "firmware": self.firmware,
            "num_cpu": self.num_cpu,
            "memory_mb": self.memory_mb,
            "template": self.template,
            "annotation": self.annotation,
            "extra": self.extra,
            "nics": self.nics,
            "cbt": self.cbt,
            "power": self.power,
            "tools": self.tools,
            "hostname": self.hostname,
            "shutdown": self.shutdown,
            "workload": self.workload,
            "registered": self.registered,
            "disks": [d.to_json() for d in self.disks.values()],
            "snapshots": self.tree.to_json(),
            "current": self.tree.current.moid if self.tree.current else None,
        }

    def save(self) -> None:
        """Persist the metadata and tell collectors."""
        with self.lab.lock:
            self.lab.store.put("vm", self.moid, self.to_json())
            for disk in self.disks.values():
                disk.sweep()
        self.touch()

    # ------------------------------------------------------------------ properties

    def p_config(self) -> Any:
        with self.lab.lock:
            return devices.config(self)

    def p_resourcePool(self) -> Any:
        return self.host.cluster.pool.ref

    def p_datastore(self) -> Any:
        return array(vim.Datastore, [d.ref for d in self.datastores()])

    def p_network(self) -> Any:
        return array(vim.Network, [vim.Network(n["network"]) for n in self.nics])

    def p_snapshot(self) -> Any:
        with self.lab.lock:
            return self.tree.info()

    def p_rootSnapshot(self) -> Any:
        return array(vim.vm.Snapshot, [s.ref for s in self.tree.roots()])

    def p_capability(self) -> Any:
        return machine_view.capability(self)

    def p_runtime(self) -> Any:
        return machine_view.runtime(self)

    def p_guest(self) -> Any:
        return machine_view.guest(self)

    def p_guestHeartbeatStatus(self) -> Any:
        return "green" if self.tools_running else "gray"

    def p_summary(self) -> Any:
        return machine_view.summary(self)

    def p_layoutEx(self) -> Any:
        return machine_view.layout(self)

    # ------------------------------------------------------------------ power and guest

    @wsdl
    def PowerOnVM_Task(self, host: Any = None) -> Any:
        return self.lab.tasks.start(self, "PowerOnVM_Task", lambda _task: self.power_on())

    @wsdl
    def PowerOffVM_Task(self) -> Any:
        return self.lab.tasks.start(self, "PowerOffVM_Task", lambda _task: self.power_off())

    @wsdl
    def ResetVM_Task(self) -> Any:
        def work(_task: Task) -> None:
            self.power_off()
            self.power_on()

        return self.lab.tasks.start(self, "ResetVM_Task", work)

    @wsdl
    def ShutdownGuest(self) -> None:
        if not self.powered_on:
            raise self._wrong_power(ON)
        if not self.tools_running:
            raise make_fault(
                "vim.fault.ToolsUnavailable",
                "Cannot complete operation because VMware Tools is not running in this virtual machine.",
            )
        self.lab.guests.shut_down(self)

    @wsdl
    def RebootGuest(self) -> None:
        if not self.powered_on:
            raise self._wrong_power(ON)
        if not self.tools_running:
            raise make_fault("vim.fault.ToolsUnavailable", "VMware Tools is not running.")
        self.lab.guests.shut_down(self, reboot=True)

    def power_on(self) -> None:
        if self.powered_on:
            raise self._wrong_power(ON)
        if self.template:
            raise make_fault("vmodl.fault.NotSupported", "A template cannot be powered on.")
        with self.io:
            for disk in self.disks.values():
                disk.links[disk.live].generation += 1
            self.stun(power_cycle=True)
            self.power = ON
            seconds = self.lab.settings.boot_seconds * self.lab.settings.time_scale
            self.boot_until = time.monotonic() + seconds
            self.save()
        self.lab.guests.power_on(self, seconds)

    def power_off(self, *, crash: bool = False) -> None:
        """Hard power off; `crash`: the host failed."""
        if not self.powered_on:
            raise self._wrong_power(OFF)
        self.lab.guests.stop(self)
        with self.io:
            if crash and self.lab.settings.crash_changes_epoch:
                for disk in self.disks.values():
                    if disk.cbt is not None:
                        disk.start_tracking()
            self.power = OFF
            self.save()

    def _wrong_power(self, wanted: str) -> Any:
        shown = "Powered on" if self.powered_on else "Powered off"
        return make_fault(
            "vim.fault.InvalidPowerState",
            f"The attempted operation cannot be performed in the current state ({shown}).",
            requestedState=wanted,
            existingState=self.power,
        )

    def stun(self, *, power_cycle: bool = False, seal: bool = True) -> None:
        """What every stun does to change tracking: pending wishes come true, the current map is sealed."""
        may_start = power_cycle or not self.powered_on or self.lab.settings.cbt_activation == "stun"
        for disk in self.disks.values():
            if disk.cbt is not None and not self.cbt:
                disk.stop_tracking()
            elif disk.cbt is None and self.cbt and may_start and disk.trackable:
                disk.start_tracking()
            elif disk.cbt is not None and seal:
                disk.cbt.seal()

    # ------------------------------------------------------------------ guest I/O

    def guest_write(self, disk: Disk, offset: int, data: bytes) -> None:
        """A write from inside the guest."""
        with self.io:
            disk.write(offset, data)

    def guest_read(self, disk: Disk, offset: int, length: int) -> bytes:
        with self.io:
            return disk.read(offset, length)

    # ------------------------------------------------------------------ configuration

    @wsdl
    def ReconfigVM_Task(self, spec: Any) -> Any:
        from farshore.lab.vcenter import provision

        return self.lab.tasks.start(self, "ReconfigVM_Task", lambda _task: provision.reconfigure(self, spec))

    def set_change_tracking(self, wanted: bool) -> None:
        """Takes effect at once when powered off, at the next stun otherwise."""
        with self.io:
            self.cbt = wanted
            if not self.powered_on:
                self.stun(seal=False)
            self.save()

    def reset_change_tracking(self) -> None:
        """New epoch for every tracked disk."""
        with self.io:
            for disk in self.disks.values():
                if disk.cbt is not None:
                    disk.start_tracking()
            self.save()

    def extend(self, disk: Disk, capacity: int, *, offline: bool = False) -> None:
        """Grow a disk. Refused with snapshots, when shrinking, and (over VirtualDiskManager) while powered on."""
        if offline and self.powered_on:
            raise make_fault(
                "vim.fault.FileLocked", "Unable to access file since it is locked", file=disk.stem
            )
        if self.tree.all() or len(disk.links) > 1:
            raise make_fault(
                "vim.fault.InvalidDeviceOperation",
                "Invalid operation for device: a disk of a machine with snapshots cannot be extended.",
                deviceIndex=0,
            )
        if capacity < disk.capacity or capacity % 512:
            raise invalid_argument("capacity")
        settings = self.lab.settings
        with self.io:
            disk.extend(capacity)
            if disk.cbt is not None and settings.extend_changes_epoch:
                disk.start_tracking()
            if disk.cbt is not None and settings.defect_growth:
                disk.cbt.blind = True
            self.save()

    @wsdl
    def UnregisterVM(self) -> None:
        if self.powered_on:
            raise self._wrong_power(OFF)
        self.registered = False
        self.save()
        self.lab.withdraw(self)

    @wsdl
    def Destroy_Task(self) -> Any:
        def work(_task: Task) -> None:
            if self.powered_on:
                raise self._wrong_power(OFF)
            self.lab.destroy(self)

        return self.lab.tasks.start(self, "Destroy_Task", work)

    def _rename(self, name: str) -> None:
        super()._rename(name)
        self.save()

    # ------------------------------------------------------------------ snapshots

    @wsdl
    def CreateSnapshot_Task(
        self, name: str, memory: bool, quiesce: bool, description: str | None = None
    ) -> Any:
        return self.lab.tasks.start(
            self,
            "CreateSnapshot_Task",
            lambda _task: self.tree.create(name, description or "", memory, quiesce).ref,
        )

    @wsdl
    def CreateSnapshotEx_Task(
        self, name: str, memory: bool, description: str | None = None, quiesceSpec: Any = None
    ) -> Any:
        return self.lab.tasks.start(
            self,
            "CreateSnapshotEx_Task",
            lambda _task: self.tree.create(name, description or "", memory, quiesceSpec is not None).ref,
        )

    @wsdl
    def RemoveAllSnapshots_Task(self, consolidate: bool | None = None, spec: Any = None) -> Any:
        def work(task: Task) -> None:
            self.tree.remove(list(self.tree.all()), consolidate is not False, _progress(task))

        return self.lab.tasks.start(self, "RemoveAllSnapshots_Task", work)

    @wsdl
    def RevertToCurrentSnapshot_Task(self, host: Any = None, suppressPowerOn: bool | None = None) -> Any:
        def work(_task: Task) -> None:
            if self.tree.current is None:
                raise make_fault("vim.fault.NotFound", "The machine has no snapshot.")
            self.tree.revert(self.tree.current, suppress_power_on=bool(suppressPowerOn))

        return self.lab.tasks.start(self, "RevertToCurrentSnapshot_Task", work)

    @wsdl
    def ConsolidateVMDisks_Task(self) -> Any:
        return self.lab.tasks.start(
            self, "ConsolidateVMDisks_Task", lambda task: self.tree.consolidate(_progress(task))
        )

    # ------------------------------------------------------------------ change queries

    @wsdl
    def QueryChangedDiskAreas(
        self, deviceKey: int, startOffset: int, changeId: str, snapshot: Any = None
    ) -> Any:
        return change_query.answer(self, deviceKey, startOffset, changeId, snapshot)


def _progress(task: Task) -> Callable[[float], None]:
    """Spend the seconds that a consolidation takes, with progress."""
    return lambda seconds: task.wait(seconds, task.info_value.progress or 0, 99)
