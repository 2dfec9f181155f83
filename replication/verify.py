"""Proof that a point is what was committed: its bytes are read and hashed again.

The manifest's digest covers size and leaf table of every disk. Reading the frozen disk and computing the table anew
must give that digest; if not, the frozen table, which has a digest to agree with itself, names the damaged areas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from farshore.domain.errors import Code, FarshoreError
from farshore.replication import leaves
from farshore.replication.extents import normalise, split
from farshore.replication.ports import LEAF, Extent, PointReader, Progress, ProgressSink, ReplicaStore

_IO = 4 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """A point that was read in full. Bytes."""

    point: str
    disks: int
    bytes_read: int  # areas that the store knows to be zeros are not read


def verify_point(
    store: ReplicaStore,
    machine: str,
    point_id: str,
    *,
    progress: ProgressSink | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Verified:
    """Read every disk of a point and compare it with the manifest.

    ReplicaDamaged names the disk and, as far as the frozen leaf table is intact, the damaged areas. PointNotFound.
    InterruptedError when `should_stop` said so.
    """
    manifest = store.manifest(machine, point_id)
    read = 0
    for disk in manifest.disks:
        reader = store.read_point(machine, point_id, disk.state.key)
        size = disk.state.size
        table = bytearray(leaves.table_size(size))
        for piece in split(normalise(reader.data(), size), _IO):
            if should_stop is not None and should_stop():
                raise InterruptedError
            data = reader.read(piece.start, piece.length)
            read += len(data)
            at = piece.start // LEAF * leaves.ENTRY
            entries = leaves.hashes(data)
            table[at : at + len(entries)] = entries
            if progress is not None:
                progress(
                    Progress("verifying", disk.state.label, piece.start + piece.length, size, manifest.cycle)
                )
        if leaves.root(table, size) != disk.digest:
            where = _damage(reader, bytes(table), size, disk.digest)
            raise FarshoreError(
                Code.REPLICA_DAMAGED,
                f"Disk {disk.state.label or disk.state.key} of point {point_id} of {machine} is damaged: {_text(where)}.",
                subject=machine,
                details={"disk": disk.state.key, "areas": [[e.start, e.length] for e in where[:100]]},
            )
    return Verified(point_id, len(manifest.disks), read)


def _damage(reader: PointReader, table: bytes, size: int, digest: str) -> list[Extent]:
    try:
        stored = reader.leaves()
    except FarshoreError:
        return []
    if leaves.root(stored, size) != digest:
        return []
    wrong = (
        Extent(at // leaves.ENTRY * LEAF, LEAF)
        for at in range(0, len(table), leaves.ENTRY)
        if table[at : at + leaves.ENTRY] != stored[at : at + leaves.ENTRY]
    )
    return normalise(wrong, size)


def _text(areas: list[Extent]) -> str:
    if not areas:
        return "its bytes do not have the committed digest, and its leaf table cannot tell where"
    shown = ", ".join(f"{e.length} bytes at {e.start}" for e in areas[:3])
    return f"{shown}{' and more' if len(areas) > 3 else ''} differ from what was committed"
