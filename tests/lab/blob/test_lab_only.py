"""What only the laboratory does: limits, faults, copy policies, key rotation, and the way in for the ARM server."""

from __future__ import annotations

import base64
import datetime as dt
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import AzureError
from azure.storage.blob import BlobClient, BlobSasPermissions, BlobServiceClient, generate_blob_sas
from azure.storage.blob.aio import BlobServiceClient as AsyncBlobServiceClient

from farshore.lab.blob import pages
from farshore.lab.blob.crc64 import crc64
from farshore.lab.blob.routes import OPERATIONS
from farshore.lab.blob.store import BlobAuthError, BlobNotFound, BlobStore

MIB = 1024 * 1024


def disk(container, name="disk", size=MIB):
    blob = container.get_blob_client(name)
    blob.create_page_blob(size)
    return blob


# --- differences, paging, overwriting ---------------------------------------------------------------------------


def test_a_difference_comes_in_pages_too(lab_container, words):
    blob = disk(lab_container)
    blob.upload_page(words.noise(65536), 0, 65536)
    snapshot = blob.create_snapshot()
    for i in range(5):
        blob.upload_page(words.noise(512, i), i * 8192, 512)
        blob.clear_page(i * 8192 + 4096, 512)
    got = [list(p) for p in blob.list_page_ranges(previous_snapshot=snapshot, results_per_page=4).by_page()]
    assert [len(p) for p in got] == [4, 4, 2]
    assert words.ranges(r for p in got for r in p) == [
        (i * 4096, i * 4096 + 512, bool(i % 2)) for i in range(10)
    ]


def test_a_difference_across_put_blob_or_to_an_unknown_snapshot_is_refused(lab_container, words):
    blob = disk(lab_container)
    first = blob.create_snapshot()["snapshot"]
    second = blob.create_snapshot()["snapshot"]
    older = lab_container.get_blob_client("disk", snapshot=first)
    with words.refused(400, "PreviousSnapshotCannotBeNewer"):
        list(older.list_page_ranges(previous_snapshot=second))
    with words.refused(409, "PreviousSnapshotNotFound"):
        list(blob.list_page_ranges(previous_snapshot="2020-01-01T00:00:00.0000000Z"))
    disk(lab_container)
    with words.refused(409, "BlobOverwritten"):
        list(blob.list_page_ranges(previous_snapshot=second))


def test_a_difference_still_knows_what_a_deleted_snapshot_knew(lab_container, words):
    blob = disk(lab_container)
    first = blob.create_snapshot()
    for page in range(4):
        blob.upload_page(words.noise(512, page), page * 1024, 512)
        snapshot = blob.create_snapshot()["snapshot"]
        if page != 2:
            lab_container.get_blob_client("disk", snapshot=snapshot).delete_blob()
    expected = [(page * 1024, page * 1024 + 512, False) for page in range(4)]
    assert words.ranges(blob.list_page_ranges(previous_snapshot=first)) == expected


def test_deleting_snapshots_gives_their_space_back(lab_container, lab, words):
    blob = disk(lab_container, size=8 * MIB)
    for seed in range(3):
        blob.upload_page(words.noise(MIB, seed), 0, MIB)
        blob.create_snapshot()
    assert lab.store.allocated_bytes("disks", "disk") >= 3 * MIB
    blob.delete_blob(delete_snapshots="only")
    assert lab.store.allocated_bytes("disks", "disk") <= MIB + 65536
    assert blob.download_blob(0, MIB).readall() == words.noise(MIB, 2)
    blob.clear_page(0, 8 * MIB)
    assert lab.store.allocated_bytes("disks", "disk") <= 65536


def test_a_huge_blob_costs_what_is_written(lab_container, lab, words):
    blob = disk(lab_container, size=4 * 1024**4)
    blob.upload_page(words.noise(512), 3 * 1024**4, 512)
    started = time.monotonic()
    assert words.ranges(blob.list_page_ranges()) == [(3 * 1024**4, 3 * 1024**4 + 512, False)]
    blob.clear_page(0, 4 * 1024**4)
    assert list(blob.list_page_ranges()) == []
    assert time.monotonic() - started < 5
    assert lab.store.allocated_bytes("disks", "disk") <= pages.CHUNK


# --- copies -----------------------------------------------------------------------------------------------------


def test_a_copy_can_be_watched_and_aborted(lab_container, lab, words):
    blob = disk(lab_container, size=4 * MIB)
    blob.upload_page(words.noise(4 * MIB), 0, 4 * MIB)
    lab.store.copy_policy.bytes_per_s = 4 * MIB
    target = lab_container.get_blob_client("copy")
    copy_id = target.start_copy_from_url(blob.url)["copy_id"]
    words.wait_until(lambda: not target.get_blob_properties().copy.progress.startswith("0/"))
    done, total = map(int, target.get_blob_properties().copy.progress.split("/"))
    assert 0 < done < total == 4 * MIB
    with words.refused(409, "PendingCopyOperation"):
        target.upload_page(words.noise(512), 0, 512)
    with words.refused(409, "CopyIdMismatch"):
        target.abort_copy("another")
    target.abort_copy(copy_id)
    properties = target.get_blob_properties()
    assert (properties.copy.status, properties.size) == ("aborted", 0)
    with words.refused(409, "NoPendingCopyOperation"):
        target.abort_copy(copy_id)


def test_a_copy_fails_when_told_to_and_when_its_source_changes(lab_container, lab, words):
    blob = disk(lab_container)
    blob.upload_page(words.noise(512), 0, 512)
    lab.faults.handle_control("copy", {"account": "farshorelab", "fail": "500 InternalError"})
    target = lab_container.get_blob_client("failed")
    target.start_copy_from_url(blob.url)
    words.wait_until(lambda: target.get_blob_properties().copy.status == "failed")
    assert target.get_blob_properties().copy.status_description == "500 InternalError"
    lab.faults.handle_control("copy", {"account": "farshorelab", "fail": "", "hold": True})
    target = lab_container.get_blob_client("moved")
    target.start_copy_from_url(blob.url)
    blob.upload_page(words.noise(512, 1), 0, 512)
    lab.faults.handle_control("copy", {"account": "farshorelab", "hold": False})
    words.wait_until(lambda: target.get_blob_properties().copy.status == "failed")
    assert "412 ConditionNotMet" in target.get_blob_properties().copy.status_description


def test_a_block_blob_is_copied_too(lab_container, words):
    source = lab_container.upload_blob("text", words.noise(3 * MIB))
    target = lab_container.get_blob_client("copy")
    target.start_copy_from_url(source.url)
    words.wait_until(lambda: target.get_blob_properties().copy.status == "success")
    assert target.download_blob().readall() == words.noise(3 * MIB)


def test_a_copy_under_a_sas_needs_a_sas_for_its_source(lab_container, lab, words):
    blob = disk(lab_container)
    token = generate_blob_sas(
        lab.account,
        "disks",
        "copy",
        account_key=lab.key,
        permission=BlobSasPermissions(write=True, create=True),
        expiry=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
    )
    guest = BlobClient.from_blob_url(f"{lab.account_url}/disks/copy?{token}", retry_total=0)
    with words.refused(404, "CannotVerifyCopySource"):
        guest.start_copy_from_url(blob.url)


# --- leases and time --------------------------------------------------------------------------------------------


def test_a_lease_expires_and_its_former_holder_is_told(lab_container, lab, words):
    blob = disk(lab_container)
    lease = blob.acquire_lease(15)
    now = time.time()
    lab.store.clock = lambda: now + 16
    assert blob.get_blob_properties().lease.state == "expired"
    with words.refused(412, "LeaseLost"):
        blob.upload_page(words.noise(512), 0, 512, lease=lease)
    blob.upload_page(words.noise(512), 0, 512)
    assert blob.get_blob_properties().lease.state == "available"


def test_breaking_a_lease_takes_its_time(lab_container, lab, words):
    blob = disk(lab_container)
    lease = blob.acquire_lease(60)
    assert lease.break_lease(20) == 20
    with words.refused(409, "LeaseAlreadyPresent"):
        blob.acquire_lease(15)
    blob.upload_page(words.noise(512), 0, 512, lease=lease)
    now = time.time()
    lab.store.clock = lambda: now + 21
    assert blob.get_blob_properties().lease.state == "broken"
    blob.acquire_lease(15)


def test_a_container_with_a_lease_is_not_deleted_by_others(lab_container, words):
    lease = lab_container.acquire_lease(-1)
    with words.refused(412, "LeaseIdMissing"):
        lab_container.delete_container()
    lab_container.delete_container(lease=lease)


# --- limits -----------------------------------------------------------------------------------------------------


def test_a_premium_account_limits_snapshots(lab_container, lab, words):
    blob = disk(lab_container)
    lab.faults.handle_control("premium", {"account": "farshorelab", "on": True})
    blob.create_snapshot()
    with words.refused(409, "SnapshotOperationRateExceeded"):
        blob.create_snapshot()
    lab.store.premium.min_interval = None
    for _ in range(99):
        blob.create_snapshot()
    with words.refused(409, "SnapshotCountExceeded"):
        blob.create_snapshot()


def test_a_blob_over_its_rate_is_busy(lab_container, lab, words):
    blob, other = disk(lab_container), disk(lab_container, "other")
    lab.faults.handle_control("limits", {"requests_per_s": 2, "bytes_per_s": None})
    blob.clear_page(0, 512)
    blob.clear_page(0, 512)
    with words.refused(503, "ServerBusy"):
        blob.clear_page(0, 512)
    other.clear_page(0, 512)
    lab.faults.handle_control("limits", {"requests_per_s": None, "bytes_per_s": 4096})
    blob.upload_page(words.noise(8192), 0, 8192)
    with words.refused(503, "ServerBusy"):
        blob.upload_page(words.noise(512), 0, 512)
    lab.faults.handle_control("limits", {})
    blob.upload_page(words.noise(512), 0, 512)


# --- faults -----------------------------------------------------------------------------------------------------


def test_a_rule_fails_the_chosen_operation_the_chosen_number_of_times(lab_container, lab, words):
    blob = disk(lab_container)
    lab.faults.handle_control(
        "rules/add",
        {"action": "status", "op": "PutPage", "blob": "*/disks/disk", "code": "InternalError", "status": 500,
         "skip": 1, "count": 2, "retry_after": 7},
    )  # fmt: skip
    blob.upload_page(words.noise(512), 0, 512)
    for _ in range(2):
        with words.refused(500, "InternalError"):
            blob.upload_page(words.noise(512), 0, 512)
    blob.upload_page(words.noise(512), 0, 512)
    assert lab.faults.handle_control("state")["rules"][0]["hits"] == 4


def test_a_lost_answer_did_happen_and_a_cut_request_did_not(lab_container, lab, words):
    blob = disk(lab_container)
    lab.faults.add("reset-after", op="PutPage", count=1)
    with pytest.raises(AzureError):
        blob.upload_page(words.noise(512), 0, 512)
    assert blob.download_blob(0, 512).readall() == words.noise(512)
    lab.faults.add("reset-before", op="PutPage", skip=0, count=1)
    with pytest.raises(AzureError):
        blob.upload_page(words.noise(512, 1), 0, 512)
    assert blob.download_blob(0, 512).readall() == words.noise(512)


def test_an_outage_ends(lab_container, lab, words):
    blob = disk(lab_container)
    lab.faults.handle_control("outage", {"kind": "503"})
    with words.refused(503, "ServerBusy"):
        blob.get_blob_properties()
    lab.faults.handle_control("outage", {"kind": "reset"})
    with pytest.raises(AzureError):
        blob.get_blob_properties()
    lab.faults.handle_control("clear")
    blob.get_blob_properties()


def test_a_delay_delays(lab_container, lab):
    blob = disk(lab_container)
    lab.faults.add("delay", op="GetBlobProperties", delay=0.2)
    started = time.monotonic()
    blob.get_blob_properties()
    assert time.monotonic() - started >= 0.2


def test_a_lost_lease_stops_its_holder(lab_container, lab, words):
    blob = disk(lab_container)
    lease = blob.acquire_lease(-1)
    lab.faults.add("lease-lost", op="PutPage", skip=1, count=1)
    blob.upload_page(words.noise(512), 0, 512, lease=lease)
    with words.refused(412, "LeaseLost"):
        blob.upload_page(words.noise(512), 0, 512, lease=lease)


def test_a_rotated_key_locks_out_the_old_one(lab_container, lab, words):
    disk(lab_container)
    new = base64.b64encode(b"new key").decode()
    lab.faults.handle_control("rotate-key", {"account": "farshorelab", "key": new})
    with words.refused(403, "AuthenticationFailed"):
        list(lab_container.list_blobs())
    assert [b.name for b in lab.service(new).get_container_client("disks").list_blobs()] == ["disk"]


def test_the_control_api_speaks_json_and_refuses_nonsense(lab_container, lab):
    disk(lab_container)
    json.dumps(lab.faults.handle_control("state"))
    log = lab.faults.handle_control("log", {"clear": True})["log"]
    assert [line["op"] for line in log] == ["CreateContainer", "PutBlob"]
    assert lab.faults.handle_control("log")["log"] == []
    for path, body in (
        ("nothing", {}),
        ("rules/add", {"action": "explode"}),
        ("rules/add", {"action": "delay", "colour": "red"}),
        ("outage", {"kind": "flood"}),
        ("rotate-key", {"account": "stranger", "key": ""}),
        ("lose-lease", {}),
    ):
        with pytest.raises(ValueError):
            lab.faults.handle_control(path, body)
    assert "PutPage" in OPERATIONS


# --- who may ----------------------------------------------------------------------------------------------------


def test_no_credentials_at_all_are_401_and_a_wrong_token_too(lab_container, lab):
    blob = disk(lab_container)
    status, headers, body = lab.raw("GET", blob.url)
    assert (status, headers["x-ms-error-code"]) == (401, "NoAuthenticationInformation")
    assert b"<Code>NoAuthenticationInformation</Code>" in body
    status, headers, _ = lab.raw("GET", blob.url, {"Authorization": "Bearer x"})
    assert (status, headers["x-ms-error-code"]) == (401, "InvalidAuthenticationInfo")


def test_a_good_token_is_the_owner(start_lab):
    lab = start_lab(https=False, bearer=lambda token: token == "good")
    disk(lab.service().create_container("disks"))
    url = f"{lab.account_url}/disks/disk"
    assert lab.raw("GET", url, {"Authorization": "Bearer good"})[0] == 200
    assert lab.raw("GET", url, {"Authorization": "Bearer bad"})[0] == 401


def test_an_old_request_is_refused(lab_container, lab, words):
    now = time.time()
    lab.store.clock = lambda: now + 3600
    with words.refused(403, "AuthenticationFailed"):
        list(lab_container.list_blobs())


def test_a_sas_that_may_only_create_does_not_replace(lab_container, lab, words):
    def guest(name: str) -> BlobClient:
        token = generate_blob_sas(
            lab.account,
            "disks",
            name,
            account_key=lab.key,
            permission=BlobSasPermissions(create=True),
            expiry=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
        )
        return BlobClient.from_blob_url(f"{lab.account_url}/disks/{name}?{token}", retry_total=0)

    guest("new").upload_blob(b"x")
    with words.refused(403, "UnauthorizedBlobOverwrite"):
        guest("new").upload_blob(b"y", overwrite=True)


async def test_odd_names_with_the_async_sdk(lab, words):
    lab.service().create_container("odd")
    async with AsyncBlobServiceClient(lab.account_url, credential=lab.key, retry_total=0) as service:
        for name in ("with space", "plus+sign", "per%cent", "a=b&c", "ünïcode", "a//b", "(x)~!*'"):
            blob = service.get_blob_client("odd", name)
            await blob.create_page_blob(1024)
            await blob.upload_page(words.noise(512), 0, 512)
            assert await (await blob.download_blob(0, 512)).readall() == words.noise(512)


def test_checksums_are_those_of_the_service():
    assert crc64(b"123456789") == 0xAE8B14860A799888


def test_a_crc64_is_checked(lab_container, lab, words):
    blob = disk(lab_container)
    token = generate_blob_sas(
        lab.account,
        "disks",
        "disk",
        account_key=lab.key,
        permission=BlobSasPermissions(write=True),
        expiry=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
    )

    def put(checksum: int) -> tuple[int, dict[str, str]]:
        text = base64.b64encode(checksum.to_bytes(8, "little")).decode()
        headers = {"x-ms-page-write": "update", "x-ms-range": "bytes=0-511", "x-ms-content-crc64": text}
        return lab.raw("PUT", f"{blob.url}?comp=page&{token}", headers, words.noise(512))[:2]

    assert put(crc64(words.noise(512)))[0] == 201
    status, headers = put(1)
    assert (status, headers["x-ms-error-code"]) == (400, "Crc64Mismatch")


# --- the way in for the ARM server ------------------------------------------------------------------------------


def test_a_url_opens_a_blob_or_its_snapshot_with_and_without_sas(lab_container, lab, words):
    blob = disk(lab_container)
    blob.upload_page(words.noise(1024), 65536 - 512, 1024)
    snapshot = blob.create_snapshot()["snapshot"]
    blob.clear_page(0, MIB)
    view = lab.store.open_url(f"{blob.url}?snapshot={snapshot}")
    assert view.size == MIB
    assert list(view.extents()) == [(65536 - 512, 1024)]
    assert view.read(65536, 512) == words.noise(1024)[512:]
    assert view.read(MIB - 10, 100) == bytes(10)
    assert list(lab.store.open_url(blob.url).extents()) == []
    assert lab.store.open_url("https://farshorelab.blob.core.windows.net/disks/disk").size == MIB
    expired = generate_blob_sas(
        lab.account,
        "disks",
        "disk",
        account_key=lab.key,
        permission=BlobSasPermissions(read=True),
        expiry=dt.datetime.now(dt.UTC) - dt.timedelta(hours=1),
    )
    with pytest.raises(BlobAuthError):
        lab.store.open_url(f"{blob.url}?{expired}")
    for missing in ("/disks/nothing", "/nothing/disk", "/disks/disk?snapshot=2020-01-01T00:00:00.0000000Z"):
        with pytest.raises(BlobNotFound):
            lab.store.open_url(lab.account_url + missing)


def test_two_accounts_on_one_server_and_a_copy_between_them(lab, start_lab, tmp_path, words, loop_thread):
    other = BlobStore(tmp_path / "second", "second", lab.key)
    from farshore.lab.blob.server import BlobServer

    server = BlobServer([lab.store, other])
    loop_thread.run(server.start())
    try:
        one = BlobServiceClient(server.account_url("farshorelab"), credential=lab.key, retry_total=0)
        two = BlobServiceClient(server.account_url("second"), credential=lab.key, retry_total=0)
        source = disk(one.create_container("disks"))
        source.upload_page(words.noise(512), 0, 512)
        token = generate_blob_sas(
            "farshorelab",
            "disks",
            "disk",
            account_key=lab.key,
            permission=BlobSasPermissions(read=True),
            expiry=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
        )
        target = two.create_container("disks").get_blob_client("copy")
        with words.refused(404, "CannotVerifyCopySource"):
            target.start_copy_from_url(source.url)
        target.start_copy_from_url(f"{source.url}?{token}")
        words.wait_until(lambda: target.get_blob_properties().copy.status == "success")
        assert target.download_blob(0, 512).readall() == words.noise(512)
        assert "sig=" not in target.get_blob_properties().copy.source
    finally:
        loop_thread.run(server.stop())
        other.close()


def test_create_if_absent_of_a_page_blob_leaves_the_first(lab_container, words):
    blob = disk(lab_container)
    blob.upload_page(words.noise(512), 0, 512)
    with words.refused(409, "BlobAlreadyExists"):
        lab_container.get_blob_client("disk").create_page_blob(MIB, match_condition=MatchConditions.IfMissing)
    assert blob.download_blob(0, 512).readall() == words.noise(512)


# --- threads ----------------------------------------------------------------------------------------------------


def test_snapshots_under_concurrent_writers_are_whole_and_of_their_moment(tmp_path):
    size, writers, rounds = 128 * 1024, 4, 60
    store = BlobStore(tmp_path / "account", "acc", "a2V5")
    store.create_container("disks")
    store.put_page_blob("disks", "disk", size * writers)
    begun, acknowledged = [0] * writers, [0] * writers

    def write(me: int) -> None:
        for n in range(1, rounds + 1):
            begun[me] = n
            store.put_pages("disks", "disk", me * size, n.to_bytes(8, "big") * (size // 8))
            acknowledged[me] = n

    threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
    for t in threads:
        t.start()
    moments = []
    while any(t.is_alive() for t in threads) or not moments:
        before = list(acknowledged)
        taken = store.snapshot("disks", "disk").snapshot
        moments.append((before, taken, list(begun)))
        if len(moments) > 3:
            store.delete("disks", "disk", moments.pop(0)[1])
    for t in threads:
        t.join()
    for before, taken, after in moments:
        view = store.open("disks", "disk", taken)
        for i in range(writers):
            data = view.read(i * size, size)
            found = int.from_bytes(data[:8], "big")
            assert data == found.to_bytes(8, "big") * (size // 8), "torn"
            assert before[i] <= found <= after[i]
    store.close()


def test_a_stopped_server_starts_again_on_its_port(lab, loop_thread, words):
    from farshore.lab.blob.server import BlobServer

    server = BlobServer(lab.store)
    loop_thread.run(server.start())
    url = server.url
    loop_thread.run(server.stop())
    loop_thread.run(server.start(port=int(url.rsplit(":", 1)[1])))
    try:
        with BlobServiceClient(
            server.account_url("farshorelab"), credential=lab.key, retry_total=0
        ) as client:
            client.create_container("again")
        assert server.url == url
    finally:
        loop_thread.run(server.stop())


def test_a_body_that_ends_early_writes_nothing(lab_container, lab, words):
    blob = disk(lab_container)
    token = generate_blob_sas(
        lab.account,
        "disks",
        "disk",
        account_key=lab.key,
        permission=BlobSasPermissions(write=True),
        expiry=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
    )
    parts = urlsplit(blob.url)
    with socket.create_connection((parts.hostname, parts.port)) as s:
        s.sendall(
            f"PUT {parts.path}?comp=page&{token} HTTP/1.1\r\nHost: x\r\nContent-Length: 65536\r\n"
            "x-ms-page-write: update\r\nx-ms-range: bytes=0-65535\r\n\r\n".encode()
        )
        s.sendall(words.noise(30_000))
    words.wait_until(lambda: any(seen.code == "client gone" for seen in lab.faults.log))
    assert list(blob.list_page_ranges()) == []


def test_a_deleted_container_is_gone_with_all_its_files(lab_container, lab, words):
    blob = disk(lab_container)
    blob.upload_page(words.noise(512), 0, 512)
    blob.create_snapshot()
    lab_container.upload_blob("text", b"hello")
    lab_container.get_blob_client("waiting").stage_block("one", b"x")
    lab_container.delete_container()
    assert list((lab.store.root / "data").iterdir()) == []
    with words.refused(404, "ContainerNotFound"):
        blob.get_blob_properties()
    fresh = lab.service().create_container("disks")
    assert list(fresh.list_blobs()) == []
