"""Which machines and disks qualify, and why not: the table of the vSphere reference, A.2, as findings.

Pure but for the descriptors: those are fetched by the caller, who hands over what came or why it did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farshore.domain.errors import Code
from farshore.providers.ports import Finding, Power, Severity, SourceDisk
from farshore.providers.vsphere.errors import vim
from farshore.providers.vsphere.machine import Machine, base_of, capacity, disks_of, label

CODE_ELIGIBLE = Code.SOURCE_NOT_ELIGIBLE.value
CODE_TRACKING = Code.CHANGE_TRACKING_NOT_READY.value


@dataclass(frozen=True, slots=True)
class DiskVerdict:
    """What the device list says about one disk. `skipped`: not part of snapshots, so not protected."""

    device: Any
    reason: str = ""  # why it cannot be replicated; "" when it can
    warning: str = ""
    skipped: bool = False

    @property
    def eligible(self) -> bool:
        return not self.reason and not self.skipped


def judge(device: Any, datastore_types: Mapping[str, str]) -> DiskVerdict:
    """One virtual disk, by its base link. `datastore_types`: type ("VMFS", "vsan" …) by datastore name.

    Links above the base are judged by `machine_reason` (snapshots of others) and at the cut (the frozen link).
    """
    kinds = vim.vm.device.VirtualDisk
    backing = base_of(device.backing)
    mode = str(getattr(device.backing, "diskMode", "") or "")
    if mode.startswith("independent"):
        return DiskVerdict(device, "it is an independent disk: snapshots leave it out", skipped=True)
    if isinstance(backing, (kinds.RawDiskMappingVer1BackingInfo, kinds.RawDiskVer2BackingInfo)):
        return DiskVerdict(
            device, "it is a raw device mapping: its bytes cannot be read through the datastore"
        )
    if isinstance(backing, (kinds.FlatVer1BackingInfo, kinds.SparseVer1BackingInfo)):
        return DiskVerdict(device, "its backing is of version 1, which has no change tracking")
    if isinstance(backing, (kinds.SeSparseBackingInfo, kinds.SparseVer2BackingInfo)):
        return DiskVerdict(device, "its file is sparse: offsets in the file are not offsets of the disk")
    if not isinstance(backing, kinds.FlatVer2BackingInfo):
        return DiskVerdict(
            device, f"its backing ({type(backing).__name__.rpartition('.')[2]}) is not known to be readable"
        )
    sharing = str(getattr(backing, "sharing", "") or "")
    if sharing == "sharingMultiWriter":
        return DiskVerdict(device, "several machines may write to it at once (multi-writer)")
    name = str(backing.fileName).partition("]")[0].lstrip("[")
    kind = datastore_types.get(name, "")
    if kind.lower() in ("vsan", "vvol"):
        return DiskVerdict(device, f"datastore {name} is of type {kind}: only a descriptor can be read there")
    if kind and kind.upper() != "VMFS":
        return DiskVerdict(
            device, warning=f"datastore {name} is of type {kind}: change tracking may report whole disks"
        )
    return DiskVerdict(device)


def machine_reason(machine: Machine) -> str:
    """Why the machine as a whole cannot be replicated; "" when it can."""
    if machine.template:
        return "it is a template"
    if not machine.trackable:
        return "its virtual hardware or host does not support change tracking (needs hardware version 7 or newer)"
    foreign = machine.foreign_snapshots
    if foreign:
        names = ", ".join(repr(s.name) for s in foreign[:3]) + (" …" if len(foreign) > 3 else "")
        return f"it has {'a snapshot' if len(foreign) == 1 else f'{len(foreign)} snapshots'} of somebody else ({names})"
    return ""


def assess(
    machine: Machine, datastore_types: Mapping[str, str], unreadable: Mapping[int, str]
) -> tuple[tuple[SourceDisk, ...], tuple[Finding, ...]]:
    """Disks and findings of a machine. `unreadable`: by device key, why a descriptor cannot be used."""
    found: list[Finding] = []
    disks: list[SourceDisk] = []
    name = machine.name

    def say(severity: Severity, code: str, message: str, action: str) -> None:
        found.append(Finding(severity, code, name, message, action))

    reason = machine_reason(machine)
    if reason:
        say(
            Severity.ERROR,
            CODE_ELIGIBLE,
            f"{name} cannot be replicated: {reason}.",
            "Delete the snapshot in vSphere."
            if machine.foreign_snapshots
            else "Convert or upgrade the machine, or take it out of the plan.",
        )
    verdicts = [judge(device, datastore_types) for device in disks_of(machine.devices)]
    for verdict in verdicts:
        device = verdict.device
        why = verdict.reason or unreadable.get(device.key, "")
        where = f"{label(device)} ({getattr(device.backing, 'fileName', '')})"
        if verdict.skipped:
            say(
                Severity.WARNING,
                CODE_ELIGIBLE,
                f"{where} of {name} is not protected: {why}.",
                "Make the disk dependent if its content is needed after a failover.",
            )
        elif why:
            say(
                Severity.ERROR,
                CODE_ELIGIBLE,
                f"{where} of {name} cannot be replicated: {why}.",
                "Move or convert the disk.",
            )
        elif verdict.warning:
            say(
                Severity.WARNING,
                CODE_TRACKING,
                f"{where} of {name}: {verdict.warning}.",
                "None needed; cycles cost more.",
            )
        disks.append(
            SourceDisk(
                key=str(device.key),
                label=label(device),
                size=capacity(device),
                eligible=not why,
                reason=why or verdict.warning,
            )
        )
    if not any(disk.eligible for disk in disks):
        say(
            Severity.ERROR,
            CODE_ELIGIBLE,
            f"{name} has no disk that can be replicated.",
            "Take it out of the plan.",
        )
    if not machine.connected:
        say(
            Severity.ERROR,
            Code.SOURCE_UNREACHABLE.value,
            f"vCenter has no connection to the host of {name}: what it shows may be old.",
            "Reconnect the host.",
        )
    if machine.tracking and not reason and machine.power is not Power.OFF:
        untracked = [
            v.device for v in verdicts if v.eligible and getattr(v.device.backing, "changeId", None) is None
        ]
        if untracked:
            say(
                Severity.WARNING,
                CODE_TRACKING,
                f"{', '.join(label(d) for d in untracked)} of {name} has no change tracking yet: each cycle compares in full.",
                "Power-cycle the machine when convenient.",
            )
    if machine.power is Power.ON and not machine.tools_running:
        say(
            Severity.WARNING,
            "GuestToolsNotRunning",
            f"VMware Tools are not running in {name}: points are crash-consistent and a planned shutdown needs force.",
            "Install or start VMware Tools.",
        )
    if machine.consolidation_needed:
        say(
            Severity.WARNING,
            "ConsolidationNeeded",
            f"{name} has disks that need consolidation.",
            "None needed: the next cycle does it.",
        )
    return tuple(disks), tuple(found)
