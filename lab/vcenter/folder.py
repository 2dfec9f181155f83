"""The datastore browser's `/folder`: HEAD, GET with Range, PUT; locks on extents. (reference/vsphere.md A.5, B.5)"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs, unquote

from farshore.lab.vcenter.disks import BASE, Disk, Link
from farshore.lab.vcenter.faults import FaultRule
from farshore.lab.vcenter.inventory import Datacenter, Datastore

if TYPE_CHECKING:
    from farshore.lab.vcenter.machine import Machine
    from farshore.lab.vcenter.service import LabVCenter

CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_SPARSE_HEADER = b"\xbe\xba\xfe\xca".ljust(64 << 10, b"\0")
"""What stands before the data of a SESparse extent: its file offsets are not disk offsets."""


class FolderError(Exception):
    """An HTTP status and a line of text."""

    def __init__(self, status: int, text: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers or {}


@dataclass(slots=True)
class Content:
    """Something that can be read: bytes in memory, or a file with an optional header before it."""

    size: int
    data: bytes | None = None
    path: Path | None = None
    header: bytes = b""
    link: Link | None = None
    content_type: str = "application/octet-stream"


@dataclass(slots=True)
class Reply:
    """Status, headers, and the body as (content, first byte, length)."""

    status: int
    headers: dict[str, str]
    content: Content
    start: int
    length: int


@dataclass(slots=True)
class _Target:
    store: Datastore
    relative: str
    machine: Machine | None
    disk: Disk | None
    link: int
    part: str


class FolderService:
    def __init__(self, lab: LabVCenter) -> None:
        self._lab = lab

    # ------------------------------------------------------------------ reading

    def open(self, path: str, query: str, range_header: str | None) -> Reply:
        """What a GET or HEAD gives. Raises `FolderError`."""
        target = self._resolve(path, query)
        content = self._content(target)
        headers = {"Accept-Ranges": "bytes", "Content-Type": content.content_type}
        if range_header is None:
            return Reply(200, headers, content, 0, content.size)
        match = _RANGE.fullmatch(range_header.strip())
        if match is None or (not match[1] and not match[2]):
            return Reply(200, headers, content, 0, content.size)  # a Range that is not understood is ignored
        if match[1]:
            start = int(match[1])
            end = min(int(match[2]) if match[2] else content.size - 1, content.size - 1)
        else:
            start, end = max(0, content.size - int(match[2])), content.size - 1
        if start >= content.size or end < start:
            raise FolderError(416, "", {"Content-Range": f"bytes */{content.size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{content.size}"
        return Reply(206, headers, content, start, end - start + 1)

    def send(self, reply: Reply, write: Callable[[Any], object], rule: FaultRule | None) -> bool:
        """Write the body. False: the connection must be closed, the body is not complete."""
        length, limit = reply.length, reply.length
        rate = self._lab.settings.folder_mib_per_s * (1 << 20)
        if rule is not None:
            if rule.action in ("short", "reset"):
                limit = length * rule.percent // 100
            elif rule.action == "slow":
                rate = rule.rate
        content = reply.content
        if content.data is not None:
            write(content.data[reply.start : reply.start + limit])
            return limit == length
        assert content.path is not None
        link = content.link
        generation = link.generation if link else 0
        step = min(CHUNK, max(4096, int(rate / 20))) if rate else CHUNK
        with content.path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), reply.start, limit, os.POSIX_FADV_SEQUENTIAL)
            done = 0
            begin = time.monotonic()
            while done < limit:
                data = _piece(content, file, reply.start + done, min(step, limit - done))
                if link is not None and link.generation != generation:
                    return False  # no longer frozen: better a torn connection than torn bytes
                if rule is not None and rule.action == "wrong" and done == 0:
                    data = bytes([data[0] ^ 0xFF]) + data[1:]
                write(data)
                done += len(data)
                if rate and (ahead := done / rate - (time.monotonic() - begin)) > 0:
                    time.sleep(ahead)
        return limit == length

    # ------------------------------------------------------------------ writing

    def put(self, path: str, query: str, length: int, source: Callable[[int], bytes]) -> int:
        """Store a whole file; returns the status. Raises `FolderError`."""
        target = self._resolve(path, query)
        if target.part == "descriptor" or target.link != BASE:
            raise FolderError(500, "The file is in use.")
        if target.disk is not None:
            self._check_writable(target)
            if length != target.disk.capacity:
                raise FolderError(500, "The length differs from the extent's.")
        place = self._lab.root / "datastores" / target.store.name / target.relative
        if not place.parent.is_dir():
            raise FolderError(404, "No such directory.")
        upload = place.with_name(f".{place.name}.{time.monotonic_ns()}.upload")
        try:
            with upload.open("wb") as file:
                left = length
                while left:
                    data = source(min(CHUNK, left))
                    if not data:
                        raise FolderError(400, "The body is shorter than announced.")
                    if data.strip(b"\0"):
                        file.write(data)
                    else:
                        file.seek(len(data), os.SEEK_CUR)
                    left -= len(data)
                file.truncate(length)
            existed = place.exists()
            if target.disk is not None and target.machine is not None:
                with target.machine.io:
                    self._check_writable(target)
                    target.disk.replace_base(upload)
            else:
                upload.replace(place)
        finally:
            upload.unlink(missing_ok=True)
        return 200 if existed else 201

    def delete(self, path: str, query: str) -> int:
        """Delete a file that belongs to no machine."""
        target = self._resolve(path, query)
        place = self._lab.root / "datastores" / target.store.name / target.relative
        if target.machine is not None and (target.disk is not None or target.part == "vmx"):
            raise FolderError(500, "The file is in use.")
        if not place.is_file():
            raise FolderError(404)
        place.unlink()
        return 204

    # ------------------------------------------------------------------ names

    def machine_of(self, path: str, query: str) -> Machine | None:
        """The machine whose file a request is about, for fault rules and the log."""
        try:
            return self._resolve(path, query).machine
        except FolderError:
            return None

    def _resolve(self, path: str, query: str) -> _Target:
        """Names to files. `dcPath` and `dsName` may be percent-encoded once or twice."""
        fields = parse_qs(query)
        store = self._store(fields.get("dcPath", [None])[0], fields.get("dsName", [None])[0])
        relative = unquote(path.removeprefix("/folder/"))
        if ".." in relative.split("/") or relative.startswith("/") or not relative:
            raise FolderError(404, "No such file.")
        directory, _, name = relative.rpartition("/")
        machine = self._lab.machine_in(store.name, directory)
        target = _Target(store, relative, machine, None, BASE, "file")
        if machine is None:
            return target
        if machine.datastore == store.name and name == f"{machine.directory}.vmx":
            target.part = "vmx"
            return target
        with self._lab.lock:
            for disk in machine.disks.values():
                if disk.datastore != store.name:
                    continue
                for number in list(disk.links):
                    for part, known in (
                        ("descriptor", disk.descriptor_name(number)),
                        ("extent", disk.extent_name(number)),
                    ):
                        if known == name:
                            target.disk, target.link, target.part = disk, number, part
                            return target
        return target

    def _store(self, datacenter_path: str | None, name: str | None) -> Datastore:
        if name is None:
            raise FolderError(404, "No datastore named.")
        datacenter: Datacenter | None = None
        candidates = [datacenter_path, unquote(datacenter_path)] if datacenter_path is not None else [None]
        for candidate in candidates:
            datacenter = datacenter or self._lab.tree.datacenter(candidate)
        if datacenter is None:
            raise FolderError(404, "No such datacenter.")
        store = datacenter.datastores.get(name) or datacenter.datastores.get(unquote(name))
        if store is None:
            raise FolderError(404, "No such datastore.")
        return store

    # ------------------------------------------------------------------ content

    def _content(self, target: _Target) -> Content:
        machine, disk = target.machine, target.disk
        if target.part == "vmx" and machine is not None:
            data = vmx_text(machine).encode()
            return Content(len(data), data=data)
        if disk is None or machine is None:
            place = self._lab.root / "datastores" / target.store.name / target.relative
            if not place.is_file() or place.name.startswith("."):
                raise FolderError(404, "No such file.")
            return Content(place.stat().st_size, path=place)
        if target.part == "descriptor":
            data = descriptor_text(machine, disk, target.link).encode()
            return Content(len(data), data=data)
        if not target.store.has_extents or disk.backing == "rdm_physical":
            raise FolderError(404, "No such file.")
        self._check_readable(machine, disk, target.link)
        link = disk.links[target.link]
        header = b"" if target.link == BASE else _SPARSE_HEADER
        return Content(disk.capacity + len(header), path=link.path, header=header, link=link)

    def _check_readable(self, machine: Machine, disk: Disk, link: int) -> None:
        if disk.key in machine.held_extents or (
            machine.powered_on and machine.registered and link == disk.live
        ):
            raise FolderError(500, "The file is locked.")

    def _check_writable(self, target: _Target) -> None:
        machine, disk = target.machine, target.disk
        assert machine is not None
        assert disk is not None
        if machine.powered_on or disk.key in machine.held_extents or len(disk.links) > 1:
            raise FolderError(500, "The file is locked.")


def descriptor_text(machine: Machine, disk: Disk, link: int) -> str:
    """The text of a `.vmdk` descriptor."""
    sectors = disk.capacity // 512
    store = machine.datastore_of(disk)
    parent = disk.links[link].parent
    if not store.has_extents:
        kind, extent = "vmfs", f'RW {sectors} VMFS "{store.kind}://{store.uuid}/{disk.uuid}-{link}"'
        kind = "vsanSparse" if parent is not None else kind
    elif disk.backing == "rdm_physical":
        kind, extent = "vmfsPassthroughRawDeviceMap", f'RW {sectors} VMFSRDM "{disk.stem}-rdmp.vmdk"'
    elif link == BASE:
        kind, extent = "vmfs", f'RW {sectors} VMFS "{disk.extent_name(link)}"'
    else:
        kind, extent = "seSparse", f'RW {sectors} SESPARSE "{disk.extent_name(link)}"'
    lines = [
        "# Disk DescriptorFile",
        "version=1" if disk.cbt is None else "version=3",
        'encoding="UTF-8"',
        f"CID={(machine.number * 2654435761 + link) & 0xFFFFFFFF:08x}",
        f"parentCID={'ffffffff' if parent is None else f'{(machine.number * 2654435761 + parent) & 0xFFFFFFFF:08x}'}",
        f'createType="{kind}"',
    ]
    if parent is not None:
        lines.append(f'parentFileNameHint="{disk.descriptor_name(parent)}"')
    lines += ["# Extent description", extent, ""]
    if disk.cbt is not None:
        lines += [
            "# Change Tracking File",
            f'changeTrackPath="{disk.descriptor_name(link)[:-5]}-ctk.vmdk"',
            "",
        ]
    lines += [
        "# The Disk Data Base",
        "#DDB",
        "",
        'ddb.adapterType = "lsilogic"',
        f'ddb.geometry.cylinders = "{max(1, sectors // 16065)}"',
        'ddb.geometry.heads = "255"',
        'ddb.geometry.sectors = "63"',
        f'ddb.uuid = "{disk.uuid}"',
        'ddb.virtualHWVersion = "19"',
    ]
    if disk.thin:
        lines.append('ddb.thinProvisioned = "1"')
    return "\n".join(lines) + "\n"


def vmx_text(machine: Machine) -> str:
    """The text of the machine's configuration file."""
    lines = [
        '.encoding = "UTF-8"',
        'config.version = "8"',
        'virtualHW.version = "19"',
        f'displayName = "{machine.name}"',
        f'guestOS = "{machine.guest_id.removesuffix("Guest")}"',
        f'firmware = "{machine.firmware}"',
        f'numvcpus = "{machine.num_cpu}"',
        f'memSize = "{machine.memory_mb}"',
        f'uuid.bios = "{machine.uuid}"',
        f'vc.uuid = "{machine.instance_uuid}"',
        'scsi0.present = "TRUE"',
        'scsi0.virtualDev = "pvscsi"',
    ]
    if machine.cbt:
        lines.append('ctkEnabled = "TRUE"')
    for disk in machine.disks.values():
        lines += [
            f'scsi0:{disk.unit}.present = "TRUE"',
            f'scsi0:{disk.unit}.fileName = "{disk.descriptor_name(disk.live)}"',
        ]
        if disk.cbt is not None:
            lines.append(f'scsi0:{disk.unit}.ctkEnabled = "TRUE"')
    return "\n".join(lines) + "\n"


def _piece(content: Content, file: BinaryIO | Any, offset: int, length: int) -> bytes:
    """Bytes of a file as served, header included."""
    head = len(content.header)
    data = content.header[offset : offset + length] if offset < head else b""
    if len(data) < length:
        start = max(0, offset - head)
        more = os.pread(file.fileno(), length - len(data), start)
        if not more:
            raise FolderError(500, "The file ended early.")
        data = data + more if data else more
    return data
