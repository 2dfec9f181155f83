"""The demo's application: three tiers whose disks are being written all the time, and the proof afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farshore.lab.azure.control import ResourceRow
from farshore.lab.guest import ledger
from farshore.lab.stack import Stack

MIB = 1 << 20
_WORK = {
    "records_per_second": 20,
    "churn_bytes_per_second": 512 << 10,
    "area_size": 4 << 20,
    "hot_size": 2 << 20,
}

MACHINES: tuple[dict[str, Any], ...] = (
    {
        "name": "crm-db01",
        "disks": [{"size": 64 * MIB, "label": "system"}, {"size": 96 * MIB, "label": "data"}],
        "networks": ["VM Network"],
        "power": "poweredOn",
        "workload": _WORK | {"churn_bytes_per_second": 1 << 20},
        "shutdown": {"seconds": 2},
    },
    {
        "name": "crm-app01",
        "disks": [{"size": 48 * MIB, "label": "system"}],
        "networks": ["VM Network"],
        "power": "poweredOn",
        "workload": _WORK,
        "shutdown": {"seconds": 2},
    },
    {
        "name": "crm-web01",
        "disks": [{"size": 48 * MIB, "label": "system"}],
        "networks": ["VM Network"],
        "power": "poweredOn",
        "workload": _WORK,
        "shutdown": {"seconds": 1},
    },
)
NAMES = tuple(m["name"] for m in MACHINES)


class FileDevice:
    """A recovered disk's file, read-only, as the ledger's checker wants it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.capacity = path.stat().st_size

    def read(self, offset: int, length: int, /) -> bytes:
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass(frozen=True)
class Proof:
    """What the disks of one recovered machine hold, compared with its source."""

    machine: str
    disks: int
    equal: bool  # every disk is, byte for byte, what the source's disk was at one instant
    snapshot: str  # the source snapshot of that instant; "" when compared with the powered-off source
    intact: bool  # the ledger is an unbroken prefix
    recovered: int  # last record that survived
    acknowledged: int  # last record that the source acknowledged
    lost: int
    lost_seconds: float
    problems: tuple[str, ...]


def recovered_disks(stack: Stack, machine: str, purpose: str) -> list[ResourceRow]:
    """The managed disks that Farshore made for a machine, boot disk first."""
    rows = [
        row
        for row in stack.azure.resources()
        if row.type.lower() == "microsoft.compute/disks"
        and row.tags.get("farshore-machine") == machine
        and row.tags.get("farshore-purpose") == purpose
    ]
    return sorted(rows, key=lambda row: row.id.lower())


def prove(stack: Stack, machine: str, purpose: str, *, against_live: bool) -> Proof:
    """Compare a recovered machine with its source.

    `against_live`: with the source's disks as they are now (it must be off); else with what the laboratory recorded of
    every snapshot: all disks must equal the same one.
    """
    rows = recovered_disks(stack, machine, purpose)
    found = [stack.azure.disk_sha256(row.id) for row in rows]
    vm = stack.vcenter.vm(machine)
    count = len(vm["disks"])
    snapshot = ""
    if against_live:
        wanted = [stack.vcenter.sha256(machine, index) for index in range(count)]
        equal = found == wanted
    else:
        by_snapshot: dict[str, dict[int, str]] = {}
        for entry in stack.vcenter.digests(machine):
            by_snapshot.setdefault(entry["snapshot"], {})[_index(entry, vm)] = entry["sha256"]
        matches = [
            name for name, disks in by_snapshot.items() if [disks.get(i) for i in range(count)] == found
        ]
        equal = bool(matches)
        snapshot = matches[-1] if matches else ""
    report = ledger.verify([FileDevice(stack.azure.disk_path(row.id)) for row in rows])
    acks = stack.vcenter.acks(machine, last=1)
    last = int(acks[-1]["number"]) if acks else 0
    last_ns = int(acks[-1]["time_ns"]) if acks else 0
    return Proof(
        machine=machine,
        disks=len(rows),
        equal=equal and len(rows) == count,
        snapshot=snapshot,
        intact=report.intact,
        recovered=report.prefix_end,
        acknowledged=last,
        lost=max(0, last - report.prefix_end),
        lost_seconds=max(0.0, (last_ns - report.last_time_ns) / 1e9),
        problems=report.problems,
    )


def _index(entry: dict[str, Any], vm: dict[str, Any]) -> int:
    keys = [disk["key"] for disk in vm["disks"]]
    return keys.index(entry["disk"]) if entry["disk"] in keys else int(entry["disk"])
