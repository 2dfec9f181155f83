"""One machine as it was read in one round trip, and what follows from it. No calls are made here but `read`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from farshore.providers.ports import Power, SourceNic
from farshore.providers.vsphere.client import Client
from farshore.providers.vsphere.errors import vim
from farshore.providers.vsphere.inventory import Entry

PREFIX = "farshore-"  # of every snapshot of ours
ENABLING = f"{PREFIX}enable-tracking"  # the one snapshot that is of no cycle
SIGNATURE = "Farshore "  # what the description of every snapshot of ours begins with
_NAME = re.compile(rf"{re.escape(PREFIX)}.+-(\d+)-(\d+)")
PATHS = (
    "name",
    "config.template",
    "config.uuid",
    "config.instanceUuid",
    "config.firmware",
    "config.guestId",
    "config.changeTrackingEnabled",
    "config.bootOptions",
    "config.hardware",
    "runtime.powerState",
    "runtime.connectionState",
    "runtime.consolidationNeeded",
    "runtime.host",
    "guest.toolsRunningStatus",
    "guest.guestFamily",
    "guest.net",
    "capability.changeTrackingSupported",
    "snapshot",
    "datastore",
    "network",
)
_POWER = {"poweredOn": Power.ON, "poweredOff": Power.OFF, "suspended": Power.SUSPENDED}


def epoch_of(name: str) -> int | None:
    """The epoch in `farshore-<machine>-<epoch>-<cycle>`; None for all other names."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """A node of the snapshot tree."""

    reference: Any
    name: str
    description: str
    number: int  # grows with every snapshot of the machine
    created: datetime  # by the server's clock
    quiesced: bool
    depth: int
    children: int

    @property
    def ours(self) -> bool:
        """Whether Farshore took it and may remove it. A person may choose a name like ours: both marks must be there."""
        named = self.name == ENABLING or epoch_of(self.name) is not None
        return named and self.description.startswith(SIGNATURE)


@dataclass(frozen=True, slots=True)
class Machine:
    """What one read showed."""

    entry: Entry
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def power(self) -> Power:
        return _POWER.get(str(self.values.get("runtime.powerState")), Power.UNKNOWN)

    @property
    def connected(self) -> bool:
        """Whether vCenter talks to the machine's host; if not, all it shows may be old."""
        return str(self.values.get("runtime.connectionState", "connected")) == "connected"

    @property
    def tools_running(self) -> bool:
        status = str(self.values.get("guest.toolsRunningStatus", ""))
        return status in ("guestToolsRunning", "guestToolsExecutingScripts")

    @property
    def windows(self) -> bool:
        family = str(self.values.get("guest.guestFamily") or "")
        return (
            family == "windowsGuest"
            if family
            else str(self.values.get("config.guestId", "")).lower().startswith("win")
        )

    @property
    def tracking(self) -> bool:
        return bool(self.values.get("config.changeTrackingEnabled", False))

    @property
    def trackable(self) -> bool:
        return bool(self.values.get("capability.changeTrackingSupported", False))

    @property
    def template(self) -> bool:
        return bool(self.values.get("config.template", False))

    @property
    def consolidation_needed(self) -> bool:
        return bool(self.values.get("runtime.consolidationNeeded", False))

    @property
    def devices(self) -> list[Any]:
        hardware = self.values.get("config.hardware")
        return list(hardware.device) if hardware is not None else []

    @property
    def snapshots(self) -> list[SnapshotEntry]:
        """All snapshots, parents before children."""
        info = self.values.get("snapshot")
        return list(_walk(info.rootSnapshotList, 0)) if info is not None else []

    @property
    def foreign_snapshots(self) -> list[SnapshotEntry]:
        return [s for s in self.snapshots if not s.ours]

    def nics(self, networks: Mapping[str, str]) -> tuple[SourceNic, ...]:
        """Network adapters with the addresses that the guest reports (nothing when tools are not running).

        `networks`: name by moid, for adapters on distributed port groups, which are named by key.
        """
        reported = {
            str(net.macAddress).lower(): net for net in self.values.get("guest.net") or () if net.macAddress
        }
        found: list[SourceNic] = []
        for device in self.devices:
            if not isinstance(device, vim.vm.device.VirtualEthernetCard):
                continue
            mac = str(device.macAddress or "").lower()
            net = reported.get(mac)
            addresses = tuple(str(a) for a in (net.ipAddress or ())) if net is not None else ()
            name = _network_name(device.backing, networks) or (
                str(net.network or "") if net is not None else ""
            )
            found.append(SourceNic(label=label(device), mac=mac, network=name, addresses=addresses))
        return tuple(found)

    @property
    def boot_key(self) -> int | None:
        """Device key of the boot disk: as configured, else the first disk on the first controller."""
        options = self.values.get("config.bootOptions")
        for item in getattr(options, "bootOrder", None) or ():
            if isinstance(item, vim.vm.BootOptions.BootableDiskDevice):
                return int(item.deviceKey)
        ordered = sorted(
            disks_of(self.devices), key=lambda d: (d.controllerKey or 0, d.unitNumber or 0, d.key)
        )
        return int(ordered[0].key) if ordered else None


def read(client: Client, entry: Entry, *, doing: str) -> Machine:
    """The machine as it is now. SourceMachineNotFound when it vanished."""
    return Machine(entry, client.read(entry.reference, PATHS, doing=doing, subject=entry.name))


def disks_of(devices: list[Any]) -> list[Any]:
    """The virtual disks among devices, by key."""
    return sorted((d for d in devices if isinstance(d, vim.vm.device.VirtualDisk)), key=lambda d: d.key)


def label(device: Any) -> str:
    """The name that the vSphere client shows."""
    info = device.deviceInfo
    return str(info.label) if info is not None and info.label else f"device {device.key}"


def base_of(backing: Any) -> Any:
    """The lowest link of a chain: what holds the bytes when only our own snapshot stands on it."""
    while getattr(backing, "parent", None) is not None:
        backing = backing.parent
    return backing


def capacity(disk: Any) -> int:
    """Bytes of a virtual disk."""
    return int(disk.capacityInBytes or 0) or int(disk.capacityInKB) * 1024


def utc(moment: datetime) -> datetime:
    """An aware UTC time, whatever the codec made of it."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _network_name(backing: Any, networks: Mapping[str, str]) -> str:
    if isinstance(backing, vim.vm.device.VirtualEthernetCard.DistributedVirtualPortBackingInfo):
        key = str(backing.port.portgroupKey or "")
        return networks.get(key, key)
    if isinstance(backing, vim.vm.device.VirtualEthernetCard.OpaqueNetworkBackingInfo):
        return str(backing.opaqueNetworkId or "")
    return str(getattr(backing, "deviceName", "") or "")


def _walk(nodes: Any, depth: int) -> Iterator[SnapshotEntry]:
    for node in nodes or ():
        children = node.childSnapshotList or ()
        yield SnapshotEntry(
            node.snapshot,
            str(node.name),
            str(node.description or ""),
            int(node.id),
            utc(node.createTime),
            bool(node.quiesced),
            depth,
            len(children),
        )
        yield from _walk(children, depth + 1)
