"""From the real replica store to a running machine: what was frozen is what boots."""

from __future__ import annotations

import asyncio

from farshore.providers.azure.adapter import AzureSite
from farshore.providers.azure.pageblobs import AzureReplicaStore
from farshore.providers.ports import DiskRequest
from farshore.replication.ports import LEAF, DiskState, Extent

from .bench import MIB, Azure, Notes, World, sha256_of

CONTENT = b"\x5a" * LEAF


def freeze(cloud: Azure, state: DiskState, machine: str) -> str:
    """A frozen replica with CONTENT at the start, and other bytes there since; returns its handle. Blocking."""
    store = AzureReplicaStore(cloud.settings)
    try:
        writer = store.acquire(machine, "test")
        disk = writer.open_disk(state)
        whole = [Extent(0, LEAF)]
        disk.intend(whole)
        disk.write(0, CONTENT)
        disk.flush()
        handle = writer.freeze(writer.cycle, state.key).snapshot
        disk.intend(whole)
        disk.write(0, b"\xee" * LEAF)
        disk.flush()
        writer.close()
    finally:
        store.close()
    return handle


async def test_a_frozen_replica_becomes_the_disk_of_a_machine(cloud: Azure, world: World) -> None:
    # Neither whole MiB nor whole leaves: the import rounds up.
    state = DiskState(
        key="2000", label="Hard disk 1", size=2 * MIB + 4096, identity="i", tracker=None, boot=True
    )
    owner, spec = world.owner(), world.spec()
    handle = await asyncio.to_thread(freeze, cloud, state, owner.machine)
    site = AzureSite(cloud.settings)
    try:
        request = DiskRequest(
            state=state, index=0, snapshot=handle, digest="b3:0", point="p-0000000001-00000000"
        )
        disk = await site.create_disk(owner, spec, request, resume={}, checkpoint=Notes())
        nic = await site.create_nic(owner, spec, 0, spec.nics[0])
        machine = await site.create_machine(owner, spec, [disk], [nic], resume={}, checkpoint=Notes())
        assert cloud.control.disk_sha256(disk.id) == sha256_of(CONTENT, 3 * MIB)
        assert (await site.view_machine(machine)).addresses
        store = site.open_store()
        assert await asyncio.to_thread(store.points, owner.machine) == []
        await asyncio.to_thread(store.close)
        removal = await site.remove(purpose=owner.purpose, run=owner.run, checkpoint=Notes())
        assert removal.leftovers == ()
    finally:
        await site.close()
    # Clean-up left the replica alone.
    assert any(owner.machine in str(b.name) for b in cloud.container.list_blobs())
