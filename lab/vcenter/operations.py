"""What the control API can do: one public method each, called with JSON values and answering with them.

This is the hand of the test, not of a client: guest I/O, faults, other people's actions, and looking inside.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import TYPE_CHECKING, Any

from farshore.lab.guest import ledger
from farshore.lab.vcenter import provision
from farshore.lab.vcenter.collector import ContainerView, Filter
from farshore.lab.vcenter.collector import PropertyCollector as Collector
from farshore.lab.vcenter.faults import FaultRule
from farshore.lab.vcenter.guests import GuestDisk
from farshore.lab.vcenter.inventory import DATASTORE_KINDS
from farshore.lab.vcenter.tasks import Task

if TYPE_CHECKING:
    from farshore.lab.vcenter.machine import Machine
    from farshore.lab.vcenter.service import LabVCenter

TASK_DEADLINE = 120.0
_STEP = 4 << 20


class Operations:
    """Every method without a leading underscore is served under `/control/<name>`. Bad arguments raise `ValueError`."""

    def __init__(self, lab: LabVCenter) -> None:
        self._lab = lab

    # ------------------------------------------------------------------ machines

    def info(self) -> dict[str, Any]:
        return {**self._lab.describe(), "machines": [m.name for m in self._lab.machines()]}

    def create_vm(self, **spec: Any) -> dict[str, Any]:
        return self._shown(self._lab.create_machine(spec))

    def vm(self, name: str) -> dict[str, Any]:
        return self._shown(self._lab.machine(name))

    def vms(self) -> list[dict[str, Any]]:
        return [self._shown(m) for m in self._lab.machines()]

    def destroy_vm(self, name: str) -> None:
        machine = self._lab.machine(name)
        if machine.powered_on:
            machine.power_off()
        self._lab.destroy(machine)

    def add_disk(self, name: str, size: int, label: str | None = None, **fields: Any) -> dict[str, Any]:
        disk = provision.add_disk(self._lab.machine(name), {"size": size, "label": label, **fields})
        return {"key": disk.key, "label": disk.label}

    def set_vm(self, name: str, **fields: Any) -> dict[str, Any]:
        """Change `tools`, `shutdown` ({seconds, hangs}), `template`, `hostname`, `annotation`."""
        machine = self._lab.machine(name)
        for field, value in fields.items():
            if field not in ("tools", "shutdown", "template", "hostname", "annotation"):
                raise ValueError(f"cannot set {field!r}")
            setattr(machine, field, value)
        machine.save()
        return self._shown(machine)

    def set_disk(self, name: str, disk: int | str, **fields: Any) -> None:
        """Change `mode` (persistent, independent_persistent) or `backing` (flat, sesparse, flat_v1, rdm_physical)."""
        machine = self._lab.machine(name)
        target = machine.disk(disk)
        for field, value in fields.items():
            if field not in ("mode", "backing"):
                raise ValueError(f"cannot set {field!r}")
            setattr(target, field, value)
        machine.save()

    def hold_extent(self, name: str, disk: int | str, held: bool = True) -> None:
        """As if another reader held the extents open: /folder answers 500."""
        machine = self._lab.machine(name)
        key = machine.disk(disk).key
        (machine.held_extents.add if held else machine.held_extents.discard)(key)

    # ------------------------------------------------------------------ guests

    def guest_write(self, name: str, disk: int | str, offset: int, data: str) -> None:
        """`data` in base64."""
        machine = self._lab.machine(name)
        machine.guest_write(machine.disk(disk), offset, base64.b64decode(data))

    def guest_fill(self, name: str, disk: int | str, offset: int, length: int, seed: int = 0) -> None:
        """Write reproducible pseudo-random bytes (`random.Random(seed).randbytes`, in steps of 4 MiB)."""
        import random

        source = random.Random(seed)
        machine = self._lab.machine(name)
        target = machine.disk(disk)
        for start in range(offset, offset + length, _STEP):
            machine.guest_write(target, start, source.randbytes(min(_STEP, offset + length - start)))

    def guest_read(self, name: str, disk: int | str, offset: int, length: int) -> str:
        machine = self._lab.machine(name)
        return base64.b64encode(machine.guest_read(machine.disk(disk), offset, length)).decode()

    def set_workload(self, name: str, workload: dict[str, Any] | None) -> None:
        self._lab.guests.set_workload(self._lab.machine(name), workload)

    def pause_guests(self) -> None:
        self._lab.guests.pause()

    def resume_guests(self) -> None:
        self._lab.guests.resume()

    def acks(self, name: str, last: int | None = None) -> list[dict[str, Any]]:
        """Acknowledged records, oldest first; the `last` ones only if given."""
        path = self._lab.acks_path / f"{self._lab.machine(name).name}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [line.split() for line in (lines[-last:] if last else lines)]
        return [{"number": int(r[0]), "time_ns": int(r[1]), "kind": r[2]} for r in rows if len(r) == 3]

    def verify_ledger(self, name: str) -> dict[str, Any]:
        """Check the ledger on the live disks at one instant."""
        machine = self._lab.machine(name)
        with machine.io:
            report = ledger.verify([GuestDisk(machine, d) for d in self._tracked(machine)])
        return {**dataclasses.asdict(report), "last_time": report.last_time}

    # ------------------------------------------------------------------ power and other people's actions

    def power_on(self, name: str) -> None:
        self._task(self._lab.machine(name).PowerOnVM_Task())

    def power_off(self, name: str) -> None:
        self._task(self._lab.machine(name).PowerOffVM_Task())

    def power_loss(self, name: str | None = None) -> list[str]:
        """The host of a machine (or of all) fails: off at once, whatever was going on."""
        doomed = [m for m in self._lab.machines() if m.powered_on and name in (None, m.name, m.moid)]
        for machine in doomed:
            machine.power_off(crash=True)
        return [m.name for m in doomed]

    def extend(self, name: str, disk: int | str, capacity: int) -> None:
        machine = self._lab.machine(name)
        machine.extend(machine.disk(disk), capacity)

    def set_cbt(self, name: str, enabled: bool) -> None:
        self._lab.machine(name).set_change_tracking(enabled)

    def reset_cbt(self, name: str) -> None:
        self._lab.machine(name).reset_change_tracking()

    def snapshot(self, name: str, snapshot: str = "foreign", quiesce: bool = False) -> str:
        """Somebody else's snapshot; returns its moid."""
        machine = self._lab.machine(name)
        task = self._task(machine.CreateSnapshot_Task(name=snapshot, memory=False, quiesce=quiesce))
        return task.info_value.result._moId

    def remove_snapshot(self, name: str, snapshot: str, consolidate: bool = True) -> None:
        found = self._lab.machine(name).tree.by_name(snapshot)
        self._task(found.RemoveSnapshot_Task(removeChildren=False, consolidate=consolidate))

    def revert(self, name: str, snapshot: str) -> None:
        self._task(self._lab.machine(name).tree.by_name(snapshot).RevertToSnapshot_Task())

    def set_datastore(self, name: str, kind: str) -> None:
        """Make a datastore `vmfs`, `nfs_whole`, `vsan` or `vvol`."""
        if kind not in DATASTORE_KINDS:
            raise ValueError(f"no datastore kind {kind!r}; there are {', '.join(DATASTORE_KINDS)}")
        for datacenter in self._lab.tree.datacenters.values():
            if name in datacenter.datastores:
                datacenter.datastores[name].kind = kind
                datacenter.datastores[name].touch()
                kinds: dict[str, str] = self._lab.store.get("lab", "datastore_kinds") or {}
                self._lab.store.put("lab", "datastore_kinds", {**kinds, name: kind})
                return
        raise ValueError(f"no datastore {name!r}")

    # ------------------------------------------------------------------ sessions and rights

    def sessions(self) -> list[dict[str, Any]]:
        """Open sessions and what they hold open."""
        return [
            {
                "key": s.key,
                "user": s.user,
                "agent": s.agent,
                "calls": s.calls,
                "views": sum(isinstance(o, ContainerView) for o in s.objects.values()),
                "filters": sum(isinstance(o, Filter) for o in s.objects.values()),
                "collectors": sum(
                    isinstance(o, Collector) and o.moid != "propertyCollector" for o in s.objects.values()
                ),
            }
            for s in self._lab.sessions.all()
        ]

    def kill_sessions(self, user: str | None = None) -> int:
        return self._lab.sessions.kill(user)

    def advance_clock(self, seconds: float) -> None:
        """Move the sessions' clock forward; idle sessions expire."""
        self._lab.sessions.offset += seconds

    def set_denials(self, denials: list[dict[str, str]]) -> None:
        """Take privileges away: [{what: method or `System.Read`, vm?, user?, path?}]. An empty list gives them back."""
        for denial in denials:
            if not denial.get("what") or set(denial) - {"what", "vm", "user", "path"}:
                raise ValueError(f"not a denial: {denial}")
        self._lab.set_denials(denials)

    def cut_connections(self) -> None:
        self._lab.cut_connections()

    # ------------------------------------------------------------------ behaviour

    def settings(self, **values: Any) -> dict[str, Any]:
        """Change settings (see `settings.Settings`); returns all of them."""
        if values:
            self._lab.settings.update(**values)
            self._lab.save_settings()
        return self._lab.settings.to_json()

    def add_fault(self, **rule: Any) -> int:
        """Add a fault rule (see `faults.FaultRule`); returns its id."""
        try:
            return self._lab.faults.add(FaultRule(**rule))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a fault rule: {error}") from error

    def faults(self) -> list[dict[str, Any]]:
        return self._lab.faults.listing()

    def clear_faults(self, id: int | None = None) -> None:
        self._lab.faults.remove(id)

    # ------------------------------------------------------------------ looking inside

    def sha256(self, name: str, disk: int | str, snapshot: str | None = None) -> str:
        """Digest of a disk, live (at one instant) or as of a snapshot."""
        machine = self._lab.machine(name)
        target = machine.disk(disk)
        with machine.io:
            if snapshot is None:
                return target.sha256()
            return target.sha256(machine.tree.by_name(snapshot).view[str(target.key)]["link"])

    def digests(self, name: str | None = None, snapshot: str | None = None) -> list[dict[str, Any]]:
        """The digest log; entries outlive their snapshots."""
        return self._lab.store.digests(name, snapshot)

    def requests(self, method: str | None = None) -> list[dict[str, Any]]:
        return [r for r in self._lab.requests() if method in (None, r["method"])]

    def clear_requests(self) -> None:
        self._lab.clear_requests()

    def leaks(self) -> dict[str, Any]:
        """What clients left behind: snapshots by machine, open sessions with views, filters or collectors."""
        return {
            "snapshots": {
                m.name: [s.name for s in m.tree.all()] for m in self._lab.machines() if m.tree.all()
            },
            "consolidation_needed": [m.name for m in self._lab.machines() if m.tree.consolidation_needed],
            "sessions": [s for s in self.sessions() if s["views"] or s["filters"] or s["collectors"]],
            "open_sessions": len(self.sessions()),
        }

    # ------------------------------------------------------------------ details

    def _tracked(self, machine: Machine) -> list[Any]:
        return [d for d in machine.disks.values() if not d.mode.startswith("independent")]

    def _task(self, ref: Any) -> Task:
        """Wait for a task; its fault becomes a `ValueError`."""
        task = self._lab.find(ref)
        assert isinstance(task, Task)
        if not task.done.wait(TASK_DEADLINE):
            raise ValueError(f"{task.moid} did not end in {TASK_DEADLINE:.0f} s")
        if task.info_value.error is not None:
            raise ValueError(task.info_value.error.msg)
        return task

    def _shown(self, machine: Machine) -> dict[str, Any]:
        return {
            "name": machine.name,
            "moid": machine.moid,
            "uuid": machine.uuid,
            "instance_uuid": machine.instance_uuid,
            "path": machine.path(),
            "power": machine.power,
            "tools_running": machine.tools_running,
            "cbt": machine.cbt,
            "disks": [
                {
                    "key": d.key,
                    "label": d.label,
                    "capacity": d.capacity,
                    "file": machine.file_name(d, d.live),
                    "change_id": d.cbt.change_id if d.cbt else None,
                }
                for d in machine.disks.values()
            ],
            "nics": machine.nics,
            "addresses": machine.addresses(),
            "snapshots": [s.name for s in machine.tree.all()],
            "workload": machine.workload,
            "last_record": self._lab.guests.last_number(machine),
        }
