"""Proof that a point is what was committed: every byte of it is read and verified, as if it were restored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from farshore.replication.ports import Progress, ProgressSink, ReplicaStore


@dataclass(frozen=True, slots=True)
class Verified:
    """A point that was read in full. Bytes."""

    point: str
    disks: int
    bytes_read: int  # zeros are known from the leaf table and not read


def verify_point(
    store: ReplicaStore,
    machine: str,
    point_id: str,
    *,
    progress: ProgressSink | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Verified:
    """Read every disk of a point and compare it with the manifest.

    ReplicaDamaged names what is damaged: segment, or image and area. PointNotFound. InterruptedError when `should_stop`
    said so.
    """
    manifest = store.manifest(machine, point_id)
    lock = threading.Lock()
    read = 0
    for disk in manifest.disks:

        def count(offset: int, data: bytes | memoryview) -> None:
            nonlocal read
            with lock:
                read += len(data)

        def look(label: str = disk.state.label, size: int = disk.state.size) -> None:
            if should_stop is not None and should_stop():
                raise InterruptedError
            if progress is not None:
                progress(Progress("verifying", label, read, size, manifest.cycle))

        store.read_point(machine, point_id, disk.state.key).write_out(count, look=look)
    return Verified(point_id, len(manifest.disks), read)
