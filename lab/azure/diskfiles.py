"""Disk bytes as sparse files: copying what holds data, the fixed-VHD footer, digests, differences."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from farshore.lab.azure.model import ArmError
from farshore.lab.azure.ports import BlobView

MIB = 1 << 20
_CHUNK = 4 * MIB
FOOTER = 512
PAGE = 512


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what the file system holds of an open file."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as end:
            if end.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(at, size) - start


class FileView:
    """A disk's file seen as a blob."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    def extents(self) -> Iterable[tuple[int, int]]:
        with self._path.open("rb") as file:
            return list(data_extents(file.fileno(), self.size))


def create_empty(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def copy_file(source: Path, target: Path) -> None:
    """Copy sparsely; `target` appears whole or not at all."""
    temporary = _temporary(target)
    size = source.stat().st_size
    with source.open("rb") as reader, temporary.open("wb") as writer:
        writer.truncate(size)
        for offset, length in data_extents(reader.fileno(), size):
            for at in range(offset, offset + length, _CHUNK):
                data = os.pread(reader.fileno(), min(_CHUNK, offset + length - at), at)
                os.pwrite(writer.fileno(), data, at)
    temporary.replace(target)


def copy_view(view: BlobView, size: int, target: Path) -> None:
    """Copy the first `size` bytes of a blob; runs of zeros stay holes."""
    temporary = _temporary(target)
    with temporary.open("wb") as writer:
        writer.truncate(size)
        for offset, length in view.extents():
            end = min(offset + length, size)
            for at in range(offset, end, _CHUNK):
                data = view.read(at, min(_CHUNK, end - at))
                if data.strip(b"\0"):
                    os.pwrite(writer.fileno(), data, at)
    temporary.replace(target)


def sha256(path: Path) -> str:
    """Digest of the whole content, holes as zeros."""
    digest, zeros = hashlib.sha256(), bytes(MIB)
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        for offset, length in [*data_extents(file.fileno(), size), (size, 0)]:
            while at < offset:
                step = min(MIB, offset - at)
                digest.update(zeros[:step])
                at += step
            while at < offset + length:
                data = os.pread(file.fileno(), min(_CHUNK, offset + length - at), at)
                digest.update(data)
                at += len(data)
    return digest.hexdigest()


def check_vhd(view: BlobView, blob: str) -> int:
    """Size in bytes of the disk in a fixed VHD. Raises: ArmError 400 InvalidVhd.

    Checks: length, cookie, checksum, disk type 2 (fixed), the footer's size against the blob's, whole MiB. Layout: Virtual
    Hard Disk Image Format Specification, hard disk footer. Azure's own wording and code are unconfirmed.
    """

    def refuse(why: str) -> ArmError:
        return ArmError(400, "InvalidVhd", f"The blob '{blob}' is not a usable VHD: {why}.")

    if view.size <= FOOTER:
        raise refuse(f"it has {view.size} bytes, too few for a footer")
    footer = view.read(view.size - FOOTER, FOOTER)
    if footer[:8] != b"conectix":
        raise refuse("its footer does not begin with the cookie 'conectix'")
    (checksum,) = struct.unpack_from(">I", footer, 64)
    if checksum != ~sum(footer[:64] + bytes(4) + footer[68:]) & 0xFFFFFFFF:
        raise refuse("the checksum of its footer is wrong")
    (kind,) = struct.unpack_from(">I", footer, 60)
    if kind != 2:
        raise refuse(f"its disk type is {kind}; only fixed disks (2) are supported")
    (size,) = struct.unpack_from(">Q", footer, 48)
    if size != view.size - FOOTER:
        raise refuse(f"its footer says {size} bytes, the blob holds {view.size - FOOTER}")
    if size % MIB:
        raise refuse(f"its virtual size of {size} bytes is not a whole number of MiB")
    return size


def vhd_footer(size: int, unique: bytes) -> bytes:
    """A fixed-VHD footer, as a downloaded disk carries it at its end."""
    footer = bytearray(
        struct.pack(
            ">8sIIQI4sI4sQQHBBII16s428x",
            b"conectix", 2, 0x10000, 2**64 - 1, 0, b"labz", 0x10000, b"Wi2k", size, size, 65535, 16, 255, 2, 0, unique,
        )
    )  # fmt: skip
    footer[64:68] = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
    return bytes(footer)


def page_ranges(path: Path, start: int, end: int) -> list[tuple[int, int]]:
    """Page-aligned (offset, length) with data within [start, end)."""
    out: list[tuple[int, int]] = []
    with path.open("rb") as file:
        for offset, length in data_extents(file.fileno(), path.stat().st_size):
            low, high = max(offset, start), min(offset + length, end)
            if low < high:
                out.append((low // PAGE * PAGE, -(-high // PAGE) * PAGE - low // PAGE * PAGE))
    return merge(out)


def differences(path: Path, previous: Path | None, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, cleared) of pages in [start, end) that differ between two files of disks, page by page."""
    ranges = page_ranges(path, start, end) + (page_ranges(previous, start, end) if previous else [])
    with path.open("rb") as new, (previous or path).open("rb") as old:
        run: tuple[int, int, bool] | None = None
        for offset, length in merge(sorted(ranges)):
            for at in range(offset, offset + length, PAGE):
                now = os.pread(new.fileno(), PAGE, at)
                before = os.pread(old.fileno(), PAGE, at) if previous else bytes(PAGE)
                if now.ljust(PAGE, b"\0") == before.ljust(PAGE, b"\0"):
                    continue
                cleared = not now.strip(b"\0")
                if run is not None and run[0] + run[1] == at and run[2] == cleared:
                    run = (run[0], run[1] + PAGE, cleared)
                else:
                    if run is not None:
                        yield run
                    run = (at, PAGE, cleared)
        if run is not None:
            yield run


def merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ascending ranges that touch or overlap."""
    out: list[tuple[int, int]] = []
    for offset, length in ranges:
        if out and offset <= out[-1][0] + out[-1][1]:
            last = out[-1]
            out[-1] = (last[0], max(last[0] + last[1], offset + length) - last[0])
        else:
            out.append((offset, length))
    return out


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
