"""QEMU with disks and no guest: what a guest would write is written through its devices by the monitor."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from farshore.domain.errors import FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.nbd import QemuSettings, QemuSource
from farshore.providers.nbd.cut import QemuCut
from farshore.providers.nbd.qmp import Monitor
from farshore.replication.ports import LEAF, Extent, FullCopyNeeded

MIB = 1 << 20


class QuietMachine:
    """A QEMU that never runs its processor. `model` is what each disk holds."""

    def __init__(self, folder: Path, sizes: Sequence[int], *, persistent: bool = False) -> None:
        folder.mkdir()
        self.folder = folder
        self.qmp = folder / "qmp"
        self.model: dict[str, bytearray] = {}
        self.images: dict[str, Path] = {}
        self.persistent = persistent
        for index, size in enumerate(sizes):
            self._image(f"disk{index}", size)
        self.start()

    def _image(self, key: str, size: int) -> Path:
        path = self.folder / f"{key}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
        self.images[key] = path
        self.model[key] = bytearray(size)
        return path

    def start(self) -> None:
        command = ["qemu-system-x86_64", "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-m", "32"]
        command += ["-qmp", f"unix:{self.qmp},server=on,wait=off"]
        for key, path in self.images.items():
            command += ["-blockdev", f"driver=qcow2,node-name=n-{key},file.driver=file,file.filename={path}"]
            command += ["-device", f"virtio-blk-pci,drive=n-{key},id={key},share-rw=on"]
        self.qmp.unlink(missing_ok=True)
        self.process = subprocess.Popen(command)
        until = time.monotonic() + 60
        while True:
            assert time.monotonic() < until and self.process.poll() is None, "QEMU does not start"
            try:
                self.monitor().close()
                break
            except FarshoreError:  # its socket is not there yet, or does not listen yet
                time.sleep(0.02)
        self.source = QemuSource(self.settings(), machine="vm")

    def settings(self, **more) -> QemuSettings:
        values = {
            "qmp": self.qmp,
            "fleece_folder": self.folder,
            "nbd": str(self.folder / "nbd"),
            "persistent": self.persistent,
            "fleece_free": MIB,
        }
        return QemuSettings(**(values | more))

    def monitor(self) -> Monitor:
        return Monitor(self.qmp, subject="vm", timeout=30)

    def run(self, command: str, **arguments):
        with self.monitor() as monitor:
            return monitor(command, **arguments)

    def write(self, key: str, offset: int, length: int, value: int) -> None:
        """As the guest would: through the device, so that filters and trackers see it."""
        said = self.run(
            "human-monitor-command",
            command_line=f'qemu-io -d /machine/peripheral/{key}/virtio-backend "write -P {value} {offset} {length}"',
        )
        assert "rror" not in said and "nable" not in said and "fail" not in said, said
        self.model[key][offset : offset + length] = bytes([value]) * length

    def scribble(self, choose: random.Random, count: int = 5) -> None:
        for _ in range(count):
            key = choose.choice(sorted(self.model))
            length = choose.randint(1, 300) * 512
            offset = choose.randrange(0, (len(self.model[key]) - length) // 512) * 512
            self.write(key, offset, length, choose.randrange(256))

    def frozen(self) -> dict[str, bytes]:
        return {key: bytes(body) for key, body in self.model.items()}

    def add_disk(self, key: str, size: int) -> None:
        path = self._image(key, size)
        with self.monitor() as monitor:
            monitor(
                "blockdev-add",
                driver="qcow2",
                node_name=f"n-{key}",
                file={"driver": "file", "filename": str(path)},
            )
            monitor("device_add", driver="virtio-blk-pci", drive=f"n-{key}", id=key, share_rw=True)

    def grow(self, key: str, size: int) -> None:
        self.run("block_resize", node_name=f"n-{key}", size=size)
        self.model[key] += bytes(size - len(self.model[key]))

    def bitmaps(self, key: str) -> list[str]:
        for node in self.run("query-named-block-nodes", flat=True):
            if node["node-name"] == f"n-{key}":
                return sorted(item["name"] for item in node.get("dirty-bitmaps", ()) if "name" in item)
        raise AssertionError(f"no node of {key}")

    def leftovers(self) -> list[str]:
        """Whatever of a cut is still in QEMU.

        Without descriptors: QEMU closes those that were taken back only while its machine runs (see `test_live`).
        """
        with self.monitor() as monitor:
            names = [str(node["node-name"]) for node in monitor("query-named-block-nodes", flat=True)]
            names += [str(job["id"]) for job in monitor("query-jobs")]
            names += [str(export["id"]) for export in monitor("query-block-exports")]
        return sorted(name for name in names if name.startswith("fs"))

    def quit(self) -> None:
        """As a clean shutdown of the host would: QEMU stores persistent bitmaps."""
        self.run("quit")
        self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


def name(cycle: int, epoch: int = 1) -> str:
    return f"farshore-vm-{epoch}-{cycle}"


def take(machine: QuietMachine, cycle: int, *, epoch: int = 1, source: QemuSource | None = None) -> QemuCut:
    return (source or machine.source).cut(name(cycle, epoch), want=Consistency.CRASH)


def changed(cut: QemuCut, key: str, since) -> list[Extent]:
    return list(cut.changed(key, since))


def state(cut: QemuCut, key: str):
    return next(disk for disk in cut.disks if disk.key == key)


def whole(cut: QemuCut, key: str) -> bytes:
    size = state(cut, key).size
    return b"".join(cut.read(key, at, min(MIB, size - at)) for at in range(0, size, MIB))


def missed(before: bytes, after: bytes, extents: Sequence[Extent]) -> list[int]:
    """Leaves that differ and that no extent covers."""
    covered = bytearray(-(-len(after) // LEAF))
    for extent in extents:
        first, last = extent.start // LEAF, -(-(extent.start + extent.length) // LEAF)
        covered[first:last] = b"\1" * (last - first)
    return [
        leaf
        for leaf in range(len(covered))
        if not covered[leaf]
        and before[leaf * LEAF : (leaf + 1) * LEAF] != after[leaf * LEAF : (leaf + 1) * LEAF]
    ]


class Replica:
    """What a consumer of cuts holds: deltas applied to copies. `base` is the newest committed state of each disk."""

    def __init__(self) -> None:
        self.disks: dict[str, bytearray] = {}
        self.base: dict[str, object] = {}
        self.reasons: dict[str, str] = {}

    def apply(self, cut: QemuCut, *, commit: bool = True) -> dict[str, bytes]:
        """Copy what changed; what it would hold after the commit. Without a commit nothing is kept."""
        result: dict[str, bytes] = {}
        self.reasons = {}
        for disk in cut.disks:
            body = bytearray(self.disks.get(disk.key, b""))[: disk.size].ljust(disk.size, b"\0")
            try:
                extents = changed(cut, disk.key, self.base.get(disk.key))
            except FullCopyNeeded as needed:
                self.reasons[disk.key] = needed.reason
                extents = [Extent(0, disk.size)]
            for extent in extents:
                body[extent.start : extent.start + extent.length] = cut.read(
                    disk.key, extent.start, extent.length
                )
            result[disk.key] = bytes(body)
        if commit:
            self.disks = {key: bytearray(body) for key, body in result.items()}
            self.base = {disk.key: disk for disk in cut.disks}
        return result


def digests(disks: dict[str, bytes]) -> dict[str, str]:
    """Short, so that a failing comparison can be read."""
    return {key: hashlib.sha256(body).hexdigest()[:12] for key, body in disks.items()}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
