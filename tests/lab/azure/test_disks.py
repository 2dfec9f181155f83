"""Managed disks and snapshots hold real bytes."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from azure.storage.blob import BlobClient

MIB = 1 << 20
RG = "farshore-dr"


def expected(pieces: dict[int, bytes], size: int) -> bytes:
    out = bytearray(size)
    for offset, data in pieces.items():
        out[offset : offset + len(data)] = data
    return bytes(out)


async def test_an_empty_disk_reads_as_zeros_and_repeating_its_creation_creates_nothing(azure) -> None:
    disk = await azure.disk("d1")
    assert (disk.properties.disk_state, disk.properties.disk_size_bytes) == ("Unattached", 1 << 30)
    again = await azure.disk("d1")
    assert again.properties.unique_id == disk.properties.unique_id
    assert (await azure.ctl(azure.control.creations))[disk.id.lower()] == 1
    path = await azure.ctl(azure.control.disk_path, disk.id)
    assert path.stat().st_blocks == 0


async def test_import_copies_the_vhds_bytes_without_its_footer(azure, noise) -> None:
    pieces = {0: noise(4096), MIB: noise(512), 4 * MIB - 1024: noise(1024)}
    url = await azure.vhd("d1.vhd", pieces)
    disk = await azure.disk("d1", creationData=azure.imported(url))
    assert disk.properties.disk_size_bytes == 4 * MIB
    want = hashlib.sha256(expected(pieces, 4 * MIB)).hexdigest()
    assert await azure.ctl(azure.control.disk_sha256, disk.id) == want
    path = await azure.ctl(azure.control.disk_path, disk.id)
    assert path.stat().st_blocks * 512 < MIB  # holes stayed holes


async def test_import_of_a_snapshot_holds_the_bytes_of_its_moment(azure, noise) -> None:
    old, new = noise(512), noise(512)
    url = await azure.vhd("d1.vhd", {0: old})

    def snap_and_overwrite() -> str:
        with azure.blob_service() as service:
            blob = service.get_blob_client("vhds", "d1.vhd")
            snapshot = blob.create_snapshot()["snapshot"]
            blob.upload_page(new, 0, 512)
            return snapshot

    snapshot = await asyncio.to_thread(snap_and_overwrite)
    disk = await azure.disk("d1", creationData=azure.imported(f"{url}?snapshot={snapshot}"))
    path = await azure.ctl(azure.control.disk_path, disk.id)
    assert path.read_bytes()[:512] == old
    await azure.ctl(azure.control.turn, import_from_snapshot=False)
    with azure.refused("InvalidParameter", 400):
        await azure.disk("d2", creationData=azure.imported(f"{url}?snapshot={snapshot}"))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"cookie": b"connectx"}, "cookie"),
        ({"kind": 3}, "disk type is 3"),
        ({"checksum": 1}, "checksum"),
        ({"said": 8 * MIB}, "its footer says"),
    ],
)
async def test_import_refuses_a_bad_footer_as_the_operations_failure(azure, footer, wrong, why) -> None:
    url = await azure.vhd("bad.vhd", {}, footer=footer(4 * MIB, **wrong))
    with azure.refused("InvalidVhd", 200) as refusal:
        await azure.disk("d1", creationData=azure.imported(url))
    assert why in refusal.message
    assert (await azure.compute.disks.get(RG, "d1")).properties.provisioning_state == "Failed"


async def test_import_refuses_a_size_that_is_no_whole_mib(azure, footer) -> None:
    url = await azure.vhd("odd.vhd", {}, footer=footer(MIB + 512), blob_size=MIB + 1024)
    with azure.refused("InvalidVhd") as refusal:
        await azure.disk("d1", creationData=azure.imported(url))
    assert "whole number of MiB" in refusal.message


async def test_a_failed_import_is_mended_by_repeating_it(azure, footer, noise) -> None:
    url = await azure.vhd("d1.vhd", {}, footer=footer(4 * MIB, kind=3))
    with azure.refused("InvalidVhd"):
        await azure.disk("d1", creationData=azure.imported(url))
    data = noise(512)
    await azure.vhd("d1.vhd", {0: data})
    disk = await azure.disk("d1", creationData=azure.imported(url))
    assert disk.properties.provisioning_state == "Succeeded"
    assert (await azure.ctl(azure.control.disk_path, disk.id)).read_bytes()[:512] == data
    assert (await azure.ctl(azure.control.creations))[disk.id.lower()] == 1


async def test_import_checks_blob_and_account(azure) -> None:
    url = await azure.vhd("d1.vhd", {})
    with azure.refused("InvalidParameter", 200) as refusal:
        await azure.disk("d1", creationData=azure.imported(url.replace("d1.vhd", "gone.vhd")))
    assert "BlobNotFound" in refusal.message
    with azure.refused("InvalidParameter", 400):
        await azure.disk("d2", creationData={"createOption": "Import", "sourceUri": url})
    with azure.refused("ResourceNotFound", 404):
        await azure.disk(
            "d3", creationData={**azure.imported(url), "storageAccountId": azure.lab.storage_account_id + "x"}
        )
    with azure.refused("InvalidParameter", 400):
        await azure.disk("d4", creationData=azure.imported("https://elsewhere.example/a/b.vhd"))
    forged = url + "?sig=forged&se=2030-01-01T00:00:00Z&sp=r&sr=b&sv=2024-08-04"
    with azure.refused("InvalidParameter", 200) as refusal:
        await azure.disk("d5", creationData=azure.imported(forged))
    assert "AuthenticationFailed" in refusal.message


async def test_one_import_a_minute_where_that_rule_is_on(azure) -> None:
    await azure.ctl(azure.control.turn, import_per_minute=True, time_scale=1 / 60)
    url = await azure.vhd("d1.vhd", {})
    first = await azure.compute.disks.begin_create_or_update(
        RG, "d1", {"location": "westeurope", "properties": {"creationData": azure.imported(url)}}
    )
    with azure.refused("TooManyRequests", 429):
        await azure.disk("d2", creationData=azure.imported(url))
    await first.result()


async def test_upload_takes_bytes_through_its_sas_and_becomes_a_disk_when_revoked(
    azure, finish, footer, noise
) -> None:
    size, data = 20 * MIB, noise(4096)
    disk = await azure.disk("up", creationData={"createOption": "Upload", "uploadSizeBytes": size + 512})
    assert disk.properties.disk_state == "ReadyToUpload"
    url = (
        await finish(
            azure.compute.disks.begin_grant_access(RG, "up", {"access": "Write", "durationInSeconds": 600})
        )
    ).access_sas

    def upload() -> None:
        with BlobClient.from_blob_url(url, connection_verify=azure.lab.ca_file, retry_total=0) as blob:
            blob.upload_page(data, MIB, 4096)
            blob.upload_page(footer(size), size, 512)

    await asyncio.to_thread(upload)
    assert (await azure.compute.disks.get(RG, "up")).properties.disk_state == "ActiveUpload"
    await finish(azure.compute.disks.begin_revoke_access(RG, "up"))
    disk = await azure.compute.disks.get(RG, "up")
    assert (disk.properties.disk_state, disk.properties.disk_size_bytes) == ("Unattached", size)
    want = hashlib.sha256(expected({MIB: data}, size)).hexdigest()
    assert await azure.ctl(azure.control.disk_sha256, disk.id) == want
    with azure.refused("OperationNotAllowed", 409):
        await azure.compute.disks.begin_grant_access(RG, "up", {"access": "Write", "durationInSeconds": 600})


async def test_a_read_sas_serves_ranges_until_it_is_revoked(azure, finish, noise) -> None:
    pieces = {0: noise(1024), 2 * MIB: noise(512)}
    disk = await azure.disk("d1", creationData=azure.imported(await azure.vhd("d1.vhd", pieces)))
    grant = {"access": "Read", "durationInSeconds": 600}
    url = (await finish(azure.compute.disks.begin_grant_access(RG, "d1", grant))).access_sas
    assert (await azure.compute.disks.get(RG, "d1")).properties.disk_state == "ActiveSAS"

    def read() -> tuple[bytes, bytes, list, int]:
        with BlobClient.from_blob_url(url, connection_verify=azure.lab.ca_file, retry_total=0) as blob:
            ranges = [(r.start, r.end) for r in blob.list_page_ranges()]
            size = blob.get_blob_properties().size
            return blob.download_blob().readall(), blob.download_blob(2 * MIB, 512).readall(), ranges, size

    whole, part, ranges, size = await asyncio.to_thread(read)
    assert (whole[: 4 * MIB], part, size) == (expected(pieces, 4 * MIB), pieces[2 * MIB], 4 * MIB + 512)
    assert whole[4 * MIB :][:8] == b"conectix"
    assert ranges[0][0] == 0
    with azure.refused("OperationNotAllowed", 409):
        await azure.compute.disks.begin_delete(RG, "d1")
    await finish(azure.compute.disks.begin_revoke_access(RG, "d1"))
    with pytest.raises(Exception, match="AuthenticationFailed"):
        await asyncio.to_thread(read)
    await finish(azure.compute.disks.begin_delete(RG, disk.name))


async def test_snapshots_and_copies_hold_the_bytes_of_their_source(azure, finish, noise) -> None:
    disk = await azure.disk("d1", creationData=azure.imported(await azure.vhd("d1.vhd", {512: noise(512)})))
    body = {
        "location": "westeurope",
        "properties": {
            "incremental": True,
            "creationData": {"createOption": "Copy", "sourceResourceId": disk.id},
        },
    }
    snapshot = await finish(azure.compute.snapshots.begin_create_or_update(RG, "s1", body))
    second = await finish(azure.compute.snapshots.begin_create_or_update(RG, "s2", body))
    assert (
        snapshot.properties.incremental_snapshot_family_id == second.properties.incremental_snapshot_family_id
    )
    copy = await azure.disk("d2", creationData={"createOption": "Copy", "sourceResourceId": snapshot.id})
    assert copy.properties.os_type == "Linux"
    sums = {await azure.ctl(azure.control.disk_sha256, x.id) for x in (disk, snapshot, second, copy)}
    assert len(sums) == 1
    await finish(azure.compute.snapshots.begin_delete(RG, "s1"))
    assert [s.name async for s in azure.compute.snapshots.list_by_resource_group(RG)] == ["s2"]


async def test_two_incremental_snapshots_differ_by_exactly_the_changed_pages(azure, finish, noise) -> None:
    disk = await azure.disk(
        "d1", creationData=azure.imported(await azure.vhd("d1.vhd", {0: noise(4096), 65536: noise(4096)}))
    )
    body = {
        "location": "westeurope",
        "properties": {
            "incremental": True,
            "creationData": {"createOption": "Copy", "sourceResourceId": disk.id},
        },
    }
    urls = []
    for name in ("s1", "s2"):
        await finish(azure.compute.snapshots.begin_create_or_update(RG, name, body))
        granted = await finish(
            azure.compute.snapshots.begin_grant_access(RG, name, {"access": "Read", "durationInSeconds": 600})
        )
        urls.append(granted.access_sas)
        with (await azure.ctl(azure.control.disk_path, disk.id)).open("r+b") as file:
            file.seek(1024)
            file.write(noise(512))
            file.seek(65536)
            file.write(bytes(512))

    def diff() -> list[tuple[int, int, bool]]:
        with BlobClient.from_blob_url(urls[1], connection_verify=azure.lab.ca_file, retry_total=0) as blob:
            ranges, cleared = blob.get_page_range_diff_for_managed_disk(urls[0].split("?")[0])
            return [(r["start"], r["end"], False) for r in ranges] + [
                (r["start"], r["end"], True) for r in cleared
            ]

    assert await asyncio.to_thread(diff) == [(1024, 1535, False), (65536, 66047, True)]


async def test_a_disk_grows_but_never_shrinks(azure, finish) -> None:
    await azure.disk("d1")
    disk = await finish(
        azure.compute.disks.begin_update(RG, "d1", {"properties": {"diskSizeGB": 2}, "tags": {"a": "b"}})
    )
    assert (disk.properties.disk_size_bytes, disk.tags) == (2 << 30, {"a": "b"})
    with azure.refused("OperationNotAllowed", 409):
        await azure.compute.disks.begin_update(RG, "d1", {"properties": {"diskSizeGB": 1}})


async def test_what_a_put_may_not_change(azure) -> None:
    url = await azure.vhd("d1.vhd", {})
    await azure.disk("d1")
    with azure.refused("PropertyChangeNotAllowed", 409):
        await azure.disk("d1", creationData=azure.imported(url))
    with azure.refused("InvalidResourceLocation", 409):
        body = {
            "location": "northeurope",
            "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1},
        }
        await azure.compute.disks.begin_create_or_update(RG, "d1", body)


async def test_a_put_replaces_tags_and_a_patch_merges_the_rest(azure, finish) -> None:
    body = {
        "location": "westeurope",
        "tags": {"a": "1"},
        "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1, "osType": "Linux"},
    }
    await finish(azure.compute.disks.begin_create_or_update(RG, "d1", body))
    patched = await finish(azure.compute.disks.begin_update(RG, "d1", {"sku": {"name": "Premium_LRS"}}))
    assert (patched.tags, patched.sku.name, patched.properties.os_type) == (
        {"a": "1"},
        "Premium_LRS",
        "Linux",
    )
    del body["tags"]
    replaced = await finish(azure.compute.disks.begin_create_or_update(RG, "d1", body))
    assert (replaced.tags, replaced.sku.name) == (None, "Standard_LRS")


async def test_a_misspelt_property_is_refused(azure) -> None:
    with azure.refused("BadRequest", 400) as refusal:
        await azure.disk("d1", creationData={"createOption": "Empty"}, diskSizeGb=1)
    assert "diskSizeGb" in refusal.message


async def test_a_busy_disk_asks_for_patience(azure) -> None:
    await azure.ctl(azure.control.fault, "lro_stuck", operation="compute.Disks.create_or_update")
    body = {
        "location": "westeurope",
        "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1},
    }
    first = await azure.compute.disks.begin_create_or_update(RG, "d1", body)
    again = await azure.compute.disks.begin_create_or_update(RG, "d1", body)
    with azure.refused("RetryableErrorDueToAnotherOperation", 429):
        await azure.compute.disks.begin_delete(RG, "d1")
    assert await azure.ctl(azure.control.release) == 1
    one, two = await asyncio.gather(first.result(), again.result())
    assert one.properties.unique_id == two.properties.unique_id
    assert len(await azure.ctl(azure.control.operations)) == 1
