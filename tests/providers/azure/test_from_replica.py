"""From the real replica store to a running machine: what was frozen is what boots."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.azure.adapter import AzureSite
from farshore.providers.azure.pageblobs import AzureReplicaStore
from farshore.providers.ports import DiskRequest
from farshore.replication.engine import run_cycle
from farshore.replication.filesource import FileSource
from farshore.replication.ports import LEAF, ReplicaStore

from .bench import MIB, Azure, Notes, World, sha256_of

CONTENT = b"\x5a" * LEAF


def replicate(cloud: Azure, folder: Path, machine: str, *, base: str) -> list[tuple[str, bytes]]:
    """Three points of a disk that is neither whole MiB nor whole leaves, and what each holds. `base`: frozen at the "first",
    at the "last", or not at all. Blocking."""
    store = AzureReplicaStore(cloud.settings)
    disk, made = folder / "disk.img", []
    content = bytearray(2 * MIB + 4096)
    content[:LEAF] = CONTENT
    content[2 * MIB :] = b"e" * 4096
    source = FileSource({"2000": disk}, folder / "work")
    try:
        writer = store.acquire(machine, "test")
        for number in range(3):
            if number:
                at = number * 5 * LEAF
                content[at : at + LEAF] = bytes([number]) * LEAF
                content[:512] = bytes(512) if number == 1 else b"later" * 100 + bytes(12)
            if number == 2:
                content[5 * LEAF : 6 * LEAF] = bytes(LEAF)
            disk.write_bytes(content)
            done = run_cycle(source, writer, machine=machine, want=Consistency.CRASH)
            made.append((done.point.id, bytes(content)))
            if (base, number) in (("first", 0), ("last", 2)):
                writer.freeze()
        writer.close()
    finally:
        store.close()
    return made


def request_of(store: ReplicaStore, machine: str, point: str) -> DiskRequest:
    state = store.manifest(machine, point).disks[0].state
    reader = store.read_point(machine, point, "2000")
    journal = None if reader.is_frozen else reader
    return DiskRequest(
        state=state, index=0, snapshot=reader.frozen, digest=reader.root, point=point, journal=journal
    )


@pytest.mark.parametrize("base", ["first", "last", "none"])
async def test_any_point_becomes_the_disk_of_a_machine(
    cloud: Azure, world: World, tmp_path: Path, base: str
) -> None:
    owner, spec = world.owner(), world.spec()
    points = await asyncio.to_thread(replicate, cloud, tmp_path, owner.machine, base=base)
    site = AzureSite(cloud.settings)
    store = site.open_store()
    try:
        for point, content in points[:2] if base == "first" else points[1:]:
            request = await asyncio.to_thread(request_of, store, owner.machine, point)
            assert (request.journal is None) == (
                (base, point) in {("first", points[0][0]), ("last", points[2][0])}
            )
            disk = await site.create_disk(owner, spec, request, resume={}, checkpoint=Notes())
            assert cloud.control.disk_sha256(disk.id) == sha256_of(content, 3 * MIB)
        nic = await site.create_nic(owner, spec, 0, spec.nics[0])
        machine = await site.create_machine(owner, spec, [disk], [nic], resume={}, checkpoint=Notes())
        assert (await site.view_machine(machine)).addresses
        assert len(await asyncio.to_thread(store.points, owner.machine)) == 3
        removal = await site.remove(purpose=owner.purpose, run=owner.run, checkpoint=Notes())
        assert removal.leftovers == ()
    finally:
        await asyncio.to_thread(store.close)
        await site.close()
    # Clean-up left the replica alone, and no staging blob.
    names = [str(b.name) for b in cloud.container.list_blobs()]
    assert any(owner.machine in name for name in names)
    assert not any(name.startswith("staging/") and owner.machine in name for name in names)


async def test_a_restore_that_died_is_done_again_on_the_same_blob(
    cloud: Azure, world: World, tmp_path: Path
) -> None:
    owner, spec = world.owner(), world.spec()
    points = await asyncio.to_thread(replicate, cloud, tmp_path, owner.machine, base="first")
    site = AzureSite(cloud.settings)
    store = site.open_store()
    try:
        request = await asyncio.to_thread(request_of, store, owner.machine, points[2][0])
        dying = replace(request, journal=Dies(request.journal))
        with pytest.raises(FarshoreError, match="died"):
            await site.create_disk(owner, spec, dying, resume={}, checkpoint=Notes())
        assert dying.journal.wrote, "nothing had been written yet"
        disk = await site.create_disk(owner, spec, request, resume={}, checkpoint=Notes())
        assert cloud.control.disk_sha256(disk.id) == sha256_of(points[2][1], 3 * MIB)
    finally:
        await asyncio.to_thread(store.close)
        await site.close()


class Dies:
    """A point whose restore dies after the first write."""

    def __init__(self, journal: Any) -> None:
        self._journal = journal
        self.size = journal.size
        self.wrote = 0

    def write_out(self, sink, **options) -> None:
        def once(offset: int, data: bytes | memoryview) -> None:
            if self.wrote:
                raise FarshoreError(Code.TARGET_UNREACHABLE, "it died", retryable=False)
            self.wrote += 1
            sink(offset, data)

        self._journal.write_out(once, **{**options, "workers": 0})
