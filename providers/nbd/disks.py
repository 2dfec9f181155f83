"""The disks of a QEMU machine, as its monitor describes them, and the names of what a cut makes in QEMU."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.nbd import bitmaps
from farshore.providers.nbd.bitmaps import Bitmap
from farshore.providers.nbd.qmp import Monitor

_RUN = "farshore-run-"
_LONGEST_NODE = 31  # QEMU's limit for names of nodes
_NODE = re.compile(
    r"fs(?P<machine>[0-9a-f]{6})-(?P<epoch>[0-9a-f]+)-(?P<cycle>[0-9a-f]+)-(?P<try>[0-9a-f]{4})\."
)


@dataclass(frozen=True, slots=True)
class QemuDisk:
    """A disk that a device of the machine writes to. `size` in bytes."""

    key: str
    node: str
    size: int
    identity: str
    format: str
    bitmaps: tuple[Bitmap, ...]


@dataclass(frozen=True, slots=True)
class CutName:
    """`farshore-<machine>-<epoch>-<cycle>`, taken apart."""

    machine: str
    epoch: int
    cycle: int

    @classmethod
    def parse(cls, name: str) -> CutName:
        parts = name.removeprefix("farshore-").rsplit("-", 2)
        if not name.startswith("farshore-") or len(parts) != 3 or not (parts[1] + parts[2]).isdecimal():
            raise ValueError(f"cut name {name!r} is not farshore-<machine>-<epoch>-<cycle>")
        return cls(parts[0], int(parts[1]), int(parts[2]))

    def __str__(self) -> str:
        return f"farshore-{self.machine}-{self.epoch}-{self.cycle}"

    def stem(self, attempt: str) -> str:
        """How the nodes, jobs and exports of a cut begin. `attempt` is random: no two cuts ever share a name, so that a
        reader of one can never be given the bytes of another."""
        return f"fs{_hash(self.machine)}-{self.epoch:x}-{self.cycle:x}-{attempt}"


def owner_of(item: str, machine: str) -> tuple[str, CutName] | None:
    """Stem and cut of a node, job or export of ours for `machine`; None for anybody else's."""
    match = _NODE.match(item)
    if match is None or match["machine"] != _hash(machine):
        return None
    cut = CutName(machine, int(match["epoch"], 16), int(match["cycle"], 16))
    return match[0].removesuffix("."), cut


def item(stem: str, index: int, what: str = "") -> str:
    """The name of a node, job or export of disk number `index`."""
    name = f"{stem}.{index:x}{what}"
    if len(name) > _LONGEST_NODE:
        raise FarshoreError(Code.INTERNAL, f"{name!r} is too long for QEMU.")
    return name


def run_of(monitor: Monitor) -> str:
    """A random word that this process of QEMU keeps until it ends, and that no other process has."""
    for _ in range(2):
        words = sorted(
            str(entry["name"])
            for entry in monitor("qom-list", path="/objects")
            if str(entry["name"]).startswith(_RUN)
        )
        if words:
            return words[0].removeprefix(_RUN)
        monitor("object-add", qom_type="throttle-group", id=f"{_RUN}{secrets.token_hex(8)}")
    raise FarshoreError(Code.INTERNAL, "QEMU forgot an object at once.")


def find(monitor: Monitor, machine: str, wanted: Sequence[str]) -> list[QemuDisk]:
    """The machine's disks in QEMU's order; `wanted` keys only, if there are any. SourceNotEligible."""
    nodes = {str(node.get("node-name")): node for node in monitor("query-named-block-nodes", flat=True)}
    found: list[QemuDisk] = []
    for device in monitor("query-block"):
        inserted = device.get("inserted")
        key = _key(device)
        if not key or not inserted or (wanted and key not in wanted):
            continue
        if not wanted and (inserted.get("ro") or device.get("removable")):
            continue
        image = inserted.get("image", {})
        node = str(inserted.get("node-name", ""))
        found.append(
            QemuDisk(
                key,
                node,
                int(image.get("virtual-size", 0)),
                f"{key}|{inserted.get('drv')}|{_hash(str(inserted.get('file')), 16)}",
                str(inserted.get("drv")),
                tuple(bitmaps.read(nodes.get(node, {}).get("dirty-bitmaps", ()), machine)),
            )
        )
    missing = sorted(set(wanted) - {disk.key for disk in found})
    twice = sorted({disk.key for disk in found if sum(d.key == disk.key for d in found) > 1})
    reason = ""
    if missing:
        reason = f"it has no disk {', '.join(missing)}"
    elif twice:
        reason = f"several of its disks are called {', '.join(twice)}: give their devices ids"
    elif not found:
        reason = "it has no disk that it writes to"
    elif any(not disk.node or disk.size <= 0 for disk in found):
        reason = "QEMU does not describe all its disks"
    if reason:
        raise FarshoreError(
            Code.SOURCE_NOT_ELIGIBLE, f"{machine} cannot be replicated: {reason}.", subject=machine
        )
    return found


def _key(device: dict[str, Any]) -> str:
    """A name that stays: the device's id, else the drive's, else its place. "" for firmware and unplugged drives."""
    path = str(device.get("qdev") or "")
    if not path or "flash" in path or "flash" in str(device.get("device")):
        return ""
    match = re.match(r"/machine/peripheral/([^/]+)", path)
    if match:
        name = match[1]
    elif device.get("device"):
        name = str(device["device"])
    else:
        name = path.removeprefix("/machine/").removesuffix("/virtio-backend")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")


def _hash(text: str, digits: int = 6) -> str:
    """Of names that may hold secrets (addresses of network disks) or be too long."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
