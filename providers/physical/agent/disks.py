"""What block devices and mounts this machine has, from /sys and /proc.

`Device.sequence` is the kernel's `diskseq` (5.15 and newer): it rises whenever other media appear behind the same number,
so a replaced disk is noticed although name, number and size are the same.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SYS = Path("/sys")
PROC = Path("/proc")


class DiskGone(Exception):
    """A configured disk is not there, or is no block device."""


@dataclass(frozen=True, slots=True)
class Device:
    """A block device as the kernel shows it now."""

    path: str
    major: int
    minor: int
    size: int
    identity: str  # stable over reboots: serial or WWN, else the partition table's or device's own name
    sequence: str  # changes with the media; "" on old kernels
    read_only: bool = False

    @property
    def number(self) -> str:
        return f"{self.major}:{self.minor}"

    def dump(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system and the whole disks below it."""

    path: str
    kind: str  # ext4, xfs …
    source: str
    number: str  # of its super block
    read_only: bool
    disks: frozenset[str]  # numbers


def boot_id() -> str:
    """Changes with every boot of the machine."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def device(path: str) -> Device:
    """The device behind a path (links are followed). DiskGone."""
    try:
        real = os.path.realpath(path, strict=True)
        stat = os.stat(real)
    except OSError as error:
        raise DiskGone(f"{path} is not there: {error.strerror}") from error
    major, minor = os.major(stat.st_rdev), os.minor(stat.st_rdev)
    folder = SYS / "dev/block" / f"{major}:{minor}"
    if not folder.exists():
        raise DiskGone(f"{path} is no block device")
    size = int(_read(folder / "size") or 0) * 512
    read_only = _read(folder / "ro") == "1"
    return Device(path, major, minor, size, _identity(folder, path), _read(folder / "diskseq"), read_only)


def _identity(folder: Path, path: str) -> str:
    for name in ("device/wwid", "wwid", "device/serial", "serial", "dm/uuid", "md/uuid", "loop/backing_file"):
        found = _read(folder / name)
        if found:
            return f"{name.rpartition('/')[2]}={found}"
    return f"path={path}"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def below(number: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """A device and all devices that it stands on: its whole disk, the members of a volume or array."""
    if number in seen:
        return frozenset()
    folder = SYS / "dev/block" / number
    found = {number}
    seen = seen | {number}
    if (folder / "partition").exists():
        parent = _read(folder.resolve().parent / "dev")
        if parent:
            found |= below(parent, seen)
    slaves = folder / "slaves"
    if slaves.is_dir():
        for slave in slaves.iterdir():
            found |= below(_read(slave / "dev"), seen)
    return frozenset(found)


def mounts(table: str | None = None) -> list[Mount]:
    """Mounted file systems that live on block devices, one entry a super block, in mounting order."""
    text = (PROC / "self/mountinfo").read_text(errors="surrogateescape") if table is None else table
    found: dict[str, Mount] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        kind, source, options = tail[0], _unescape(tail[1]), tail[2].split(",")
        number = _number_of(source) or fields[2]  # btrfs shows an anonymous number: ask the device itself
        if number.startswith("0:"):
            continue
        path = _unescape(fields[4])
        known = found.get(number)
        # One super block may be mounted often; any of its folders freezes it. A root of a whole file system is preferred.
        if known is None or (fields[3] == "/" and len(path) < len(known.path)):
            found[number] = Mount(path, kind, source, number, "ro" in options, below(number))
    return list(found.values())


def _number_of(source: str) -> str:
    if not source.startswith("/dev/"):
        return ""
    try:
        stat = os.stat(source)
    except OSError:
        return ""
    return f"{os.major(stat.st_rdev)}:{os.minor(stat.st_rdev)}" if stat.st_rdev else ""


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def mounts_on(devices: Iterable[Device], table: Sequence[Mount] | None = None) -> list[Mount]:
    """Mounts with a byte on one of the devices, innermost first: the order of freezing."""
    numbers = {one.number for one in devices}
    found = [one for one in (mounts() if table is None else table) if one.disks & numbers]
    return sorted(found, key=lambda one: one.path.rstrip("/").count("/"), reverse=True)


def writes(one: Device) -> tuple[int, ...]:
    """Counters of a device that move with every write and discard, and how many writes are under way (last).

    Of `stat`: writes and discards with their merges and sectors, counted when they are done (see the kernel's iostats).
    """
    folder = SYS / "dev/block" / one.number
    fields = [int(value) for value in _read(folder / "stat").split()]
    under_way = [int(value) for value in _read(folder / "inflight").split()]
    return (*fields[4:7], *fields[11:14], under_way[1])


def machine() -> Mapping[str, str]:
    """Name, kernel and ids of this machine."""
    return {
        "name": platform.node(),
        "kernel": platform.release(),
        "machine_id": _read(Path("/etc/machine-id")) or _read(SYS / "class/dmi/id/product_uuid"),
        "boot_id": boot_id(),
        "firmware": "efi" if (SYS / "firmware/efi").exists() else "bios",
        "cpus": str(os.cpu_count() or 1),
        "memory_kib": next(
            (
                line.split()[1]
                for line in _read(PROC / "meminfo").splitlines()
                if line.startswith("MemTotal:")
            ),
            "0",
        ),
    }
