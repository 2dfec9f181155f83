"""One suite, two servers: the laboratory and Azurite answer the real SDK alike, but for the listed differences.

The differences are in `KNOWN_DIFFERENCES` of conftest.py; `endpoint.differs(…)` marks where each is expected.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import re
import threading
from pathlib import Path

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError
from azure.storage.blob import (
    AccountSasPermissions,
    BlobBlock,
    BlobSasPermissions,
    BlobServiceClient,
    ContainerSasPermissions,
    ContentSettings,
    ResourceTypes,
    SequenceNumberAction,
    generate_account_sas,
    generate_blob_sas,
    generate_container_sas,
)
from azure.storage.blob.aio import BlobServiceClient as AsyncBlobServiceClient

MIB = 1024 * 1024
TIB = 1024**4
RANGE_CODE_OF_AZURITE = "Requested Range Not Satisfiable"


def soon() -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)


def disk(container, name="disk.vhd", size=MIB, **options):
    client = container.get_blob_client(name)
    client.create_page_blob(size, **options)
    return client


def write(client, start: int, data: bytes, **options):
    return client.upload_page(data, start, len(data), **options)


def sas_url(endpoint, client, permission: str, **options) -> str:
    token = generate_blob_sas(
        endpoint.account,
        client.container_name,
        client.blob_name,
        account_key=options.pop("key", endpoint.key),
        permission=BlobSasPermissions.from_string(permission),
        expiry=options.pop("expiry", soon()),
        **options,
    )
    snapshot = options.get("snapshot")
    base = client.url.split("?", maxsplit=1)[0]
    return f"{base}?{f'snapshot={snapshot}&' if snapshot else ''}{token}"


# --- page blobs -------------------------------------------------------------------------------------------------


def test_a_new_page_blob_is_all_holes_and_reads_as_zeros(container):
    blob = disk(container, size=MIB, metadata={"point": "1"})
    properties = blob.get_blob_properties()
    assert (properties.size, properties.blob_type, properties.metadata) == (MIB, "PageBlob", {"point": "1"})
    assert list(blob.list_page_ranges()) == []
    assert blob.download_blob().readall() == bytes(MIB)


def test_written_pages_are_read_back_and_neighbours_stay_zero(container, words):
    blob = disk(container)
    data = words.noise(3 * 512)
    write(blob, 65536 - 512, data)
    assert blob.download_blob(65536 - 1024, 512 + len(data) + 512).readall() == bytes(512) + data + bytes(512)
    assert words.ranges(blob.list_page_ranges()) == [(65536 - 512, 65536 + 1024, False)]


def test_cleared_pages_read_as_zeros_and_leave_the_ranges(container, words):
    blob = disk(container)
    write(blob, 0, words.noise(4096))
    blob.clear_page(512, 1024)
    assert words.ranges(blob.list_page_ranges()) == [(0, 512, False), (1536, 4096, False)]
    assert blob.download_blob(0, 2048).readall()[512:1536] == bytes(1024)


def test_eight_tib_is_the_largest_page_blob(container, endpoint, words):
    blob = disk(container, "huge", 8 * TIB)
    write(blob, 8 * TIB - 512, words.noise(512))
    assert blob.download_blob(8 * TIB - 512, 512).readall() == words.noise(512)
    if endpoint.differs("nine-tib"):
        disk(container, "larger", 9 * TIB)
    else:
        with words.refused(400, "OutOfRangeInput"):
            disk(container, "larger", 9 * TIB)


def test_put_page_takes_at_most_four_mib(container, endpoint, words):
    blob = disk(container, size=8 * MIB)
    write(blob, 0, words.noise(4 * MIB))
    if endpoint.differs("put-page-too-large"):
        write(blob, 0, words.noise(4 * MIB + 512))
    else:
        with words.refused(413, "RequestBodyTooLarge"):
            write(blob, 0, words.noise(4 * MIB + 512))
        blob.clear_page(0, 8 * MIB)
        assert list(blob.list_page_ranges()) == []


def test_a_write_past_the_end_is_refused(container, endpoint, words):
    blob = disk(container, size=4096)
    with words.refused(
        416, RANGE_CODE_OF_AZURITE if endpoint.differs("page-range-code") else "InvalidPageRange"
    ):
        write(blob, 4096, words.noise(512))


def test_an_unaligned_range_is_refused(container, endpoint, words):
    blob = disk(container)
    status, headers, _ = endpoint.raw(
        "PUT",
        sas_url(endpoint, blob, "w") + "&comp=page",
        {"x-ms-page-write": "update", "x-ms-range": "bytes=100-611", "x-ms-version": "2021-12-02"},
        words.noise(512),
    )
    code = RANGE_CODE_OF_AZURITE if endpoint.differs("page-range-code") else "InvalidPageRange"
    assert (status, headers["x-ms-error-code"]) == (416, code)


def test_a_wrong_md5_of_pages_is_refused(container, endpoint, words):
    blob = disk(container)
    data = words.noise(512)
    status, headers, _ = endpoint.raw(
        "PUT",
        sas_url(endpoint, blob, "w") + "&comp=page",
        {
            "x-ms-page-write": "update",
            "x-ms-range": "bytes=0-511",
            "x-ms-version": "2021-12-02",
            "Content-MD5": base64.b64encode(hashlib.md5(b"other").digest()).decode(),
        },
        data,
    )
    assert (status, headers["x-ms-error-code"]) == (400, "Md5Mismatch")
    assert list(blob.list_page_ranges()) == []
    write(blob, 0, data, validate_content=True)
    assert blob.download_blob(0, 512, validate_content=True).readall() == data


def test_pages_are_not_for_block_blobs(container, words):
    container.upload_blob("text", b"hello")
    with words.refused(409, "InvalidBlobType"):
        write(container.get_blob_client("text"), 0, words.noise(512))


def test_put_page_from_url_copies_a_range(container, endpoint, words):
    source, target = disk(container, "source"), disk(container, "target")
    write(source, 512, words.noise(1024))
    url = sas_url(endpoint, source, "r")
    if endpoint.differs("put-page-from-url"):
        with words.refused(501, "APINotImplemented"):
            target.upload_pages_from_url(url, 0, 1024, 512)
    else:
        target.upload_pages_from_url(url, 0, 1024, 512)
        assert target.download_blob(0, 1024).readall() == words.noise(1024)


def test_resizing_keeps_what_is_left_and_grows_with_holes(container, words):
    blob = disk(container, size=4096)
    write(blob, 0, words.noise(4096))
    blob.resize_blob(1024)
    blob.resize_blob(8192)
    assert blob.get_blob_properties().size == 8192
    assert blob.download_blob().readall() == words.noise(4096)[:1024] + bytes(7168)
    assert words.ranges(blob.list_page_ranges()) == [(0, 1024, False)]


# --- snapshots and differences ----------------------------------------------------------------------------------


def test_a_snapshot_keeps_its_bytes_ranges_and_metadata(container, words):
    blob = disk(container)
    write(blob, 0, words.noise(1024, 1))
    snapshot = blob.create_snapshot(metadata={"point": "7"})["snapshot"]
    write(blob, 512, words.noise(1024, 2))
    blob.clear_page(0, 512)
    old = container.get_blob_client(blob.blob_name, snapshot=snapshot)
    assert old.download_blob(0, 2048).readall() == words.noise(1024, 1) + bytes(1024)
    assert words.ranges(old.list_page_ranges()) == [(0, 1024, False)]
    assert old.get_blob_properties().metadata == {"point": "7"}
    assert blob.get_blob_properties().metadata == {}
    assert blob.download_blob(0, 2048).readall() == bytes(512) + words.noise(1024, 2) + bytes(512)


def test_the_difference_to_a_snapshot_is_exact_to_512_bytes(container, endpoint, words):
    blob = disk(container)
    write(blob, 0, words.noise(128 * 1024))
    first = blob.create_snapshot()
    write(blob, 65536 + 512, words.noise(512, 1))
    blob.clear_page(1024, 512)
    write(blob, 512 * 1024, words.noise(1024, 2))
    second = blob.create_snapshot()
    write(blob, 2048, words.noise(512, 3))
    base_first = words.ranges(blob.list_page_ranges(previous_snapshot=first))
    newer = container.get_blob_client(blob.blob_name, snapshot=second["snapshot"])
    second_first = words.ranges(newer.list_page_ranges(previous_snapshot=first))
    base_second = words.ranges(blob.list_page_ranges(previous_snapshot=second))
    if endpoint.differs("diff-returns-all"):
        assert base_second == words.ranges(blob.list_page_ranges())
        assert not any(cleared for _, _, cleared in base_first + second_first)
        return
    assert base_second == [(2048, 2560, False)]
    assert sorted(second_first) == [
        (1024, 1536, True),
        (66048, 66560, False),
        (524288, 525312, False),
    ]
    assert sorted(base_first) == sorted([*second_first, (2048, 2560, False)])


def test_page_ranges_come_in_pages(container, endpoint, words):
    blob = disk(container)
    for i in range(7):
        write(blob, i * 4096, words.noise(512))
    pages = [list(p) for p in blob.list_page_ranges(results_per_page=3).by_page()]
    if endpoint.differs("page-range-paging"):
        assert [len(p) for p in pages] == [7]
    else:
        assert [len(p) for p in pages] == [3, 3, 1]
    assert [r.start for p in pages for r in p] == [i * 4096 for i in range(7)]


def test_page_ranges_of_a_part(container, words):
    blob = disk(container)
    write(blob, 0, words.noise(512))
    write(blob, 8192, words.noise(512))
    assert words.ranges(blob.list_page_ranges(offset=4096, length=MIB - 4096)) == [(8192, 8704, False)]


def test_a_blob_with_snapshots_is_deleted_only_with_them(container, words):
    blob = disk(container)
    first = blob.create_snapshot()["snapshot"]
    blob.create_snapshot()
    with words.refused(409, "SnapshotsPresent"):
        blob.delete_blob()
    container.get_blob_client(blob.blob_name, snapshot=first).delete_blob()
    assert len(list(container.list_blobs(include=["snapshots"]))) == 2
    blob.delete_blob(delete_snapshots="only")
    assert [b.snapshot for b in container.list_blobs(include=["snapshots"])] == [None]
    blob.create_snapshot()
    blob.delete_blob(delete_snapshots="include")
    assert list(container.list_blobs(include=["snapshots"])) == []


def test_a_missing_snapshot_is_not_found(container, words):
    blob = disk(container)
    with pytest.raises(ResourceNotFoundError):
        container.get_blob_client(
            blob.blob_name, snapshot="2020-01-01T00:00:00.0000000Z"
        ).get_blob_properties()


# --- copies -----------------------------------------------------------------------------------------------------


def test_a_copy_of_a_snapshot_is_equal_sparse_and_unmoved_by_later_writes(container, endpoint, words):
    blob = disk(container, size=64 * MIB, metadata={"a": "b"})
    write(blob, 5 * MIB, words.noise(70_656))
    snapshot = blob.create_snapshot()["snapshot"]
    write(blob, 5 * MIB, words.noise(512, 9))
    target = container.get_blob_client("copy.vhd")
    started = target.start_copy_from_url(f"{blob.url}?snapshot={snapshot}")
    assert started["copy_status"] == ("success" if endpoint.differs("copy-at-once") else "pending")
    words.wait_until(lambda: target.get_blob_properties().copy.status != "pending")
    properties = target.get_blob_properties()
    assert (properties.copy.status, properties.copy.id) == ("success", started["copy_id"])
    assert (properties.size, properties.metadata) == (64 * MIB, {"a": "b"})
    assert words.ranges(target.list_page_ranges()) == [(5 * MIB, 5 * MIB + 70_656, False)]
    assert target.download_blob(5 * MIB, 70_656).readall() == words.noise(70_656)


def test_a_copy_with_a_sas_source(container, endpoint, words):
    blob = disk(container)
    write(blob, 0, words.noise(512))
    target = container.get_blob_client("copy.vhd")
    target.start_copy_from_url(sas_url(endpoint, blob, "r"))
    words.wait_until(lambda: target.get_blob_properties().copy.status == "success")
    assert target.download_blob(0, 512).readall() == words.noise(512)


def test_a_copy_of_nothing_is_refused(container, words):
    with words.refused(404, "CannotVerifyCopySource", "BlobNotFound"):
        container.get_blob_client("copy").start_copy_from_url(container.get_blob_client("nothing").url)


# --- sequence numbers, leases, conditions -----------------------------------------------------------------------


def test_sequence_numbers_guard_writes(container, words):
    blob = disk(container)
    blob.set_sequence_number(SequenceNumberAction.Update, 5)
    blob.set_sequence_number(SequenceNumberAction.Max, 3)
    blob.set_sequence_number(SequenceNumberAction.Increment)
    assert blob.get_blob_properties().page_blob_sequence_number == 6
    write(blob, 0, words.noise(512), if_sequence_number_lte=6)
    write(blob, 0, words.noise(512), if_sequence_number_eq=6)
    write(blob, 0, words.noise(512), if_sequence_number_lt=7)
    for stale in ({"if_sequence_number_lte": 5}, {"if_sequence_number_eq": 5}, {"if_sequence_number_lt": 6}):
        with words.refused(412, "SequenceNumberConditionNotMet"):
            write(blob, 0, words.noise(512, 1), **stale)
    assert blob.download_blob(0, 512).readall() == words.noise(512)


def test_a_lease_shuts_everybody_else_out(container, words):
    blob = disk(container)
    lease = blob.acquire_lease(15)
    with words.refused(412, "LeaseIdMissing"):
        write(blob, 0, words.noise(512))
    with words.refused(412, "LeaseIdMismatchWithBlobOperation"):
        write(blob, 0, words.noise(512), lease="00000000-0000-0000-0000-000000000001")
    with words.refused(412, "LeaseIdMissing"):
        blob.delete_blob()
    with words.refused(409, "LeaseAlreadyPresent"):
        blob.acquire_lease(15)
    write(blob, 0, words.noise(512), lease=lease)
    assert blob.download_blob(0, 512).readall() == words.noise(512)
    blob.create_snapshot()
    lease.renew()
    properties = blob.get_blob_properties().lease
    assert (properties.state, properties.status, properties.duration) == ("leased", "locked", "fixed")
    lease.release()
    write(blob, 0, words.noise(512, 1))
    assert blob.get_blob_properties().lease.state == "available"


def test_a_lease_changes_hands_and_is_broken(container, words):
    blob = disk(container)
    lease = blob.acquire_lease(-1, lease_id="11111111-1111-1111-1111-111111111111")
    lease.change("22222222-2222-2222-2222-222222222222")
    with words.refused(412, "LeaseIdMismatchWithBlobOperation"):
        write(blob, 0, words.noise(512), lease="11111111-1111-1111-1111-111111111111")
    assert lease.break_lease(0) == 0
    assert blob.get_blob_properties().lease.state == "broken"
    with words.refused(409, "LeaseIsBrokenAndCannotBeRenewed"):
        lease.renew()
    blob.acquire_lease(15).release()


def test_a_lease_nobody_holds_is_not_present(container, words):
    blob = disk(container)
    with words.refused(412, "LeaseNotPresentWithBlobOperation"):
        write(blob, 0, words.noise(512), lease="11111111-1111-1111-1111-111111111111")


def test_stale_etags_are_refused(container, words):
    blob = disk(container)
    first = blob.get_blob_properties().etag
    write(blob, 0, words.noise(512), etag=first, match_condition=MatchConditions.IfNotModified)
    assert blob.get_blob_properties().etag != first
    with words.refused(412, "ConditionNotMet"):
        write(blob, 0, words.noise(512), etag=first, match_condition=MatchConditions.IfNotModified)
    with words.refused(412, "ConditionNotMet"):
        blob.download_blob(etag=first, match_condition=MatchConditions.IfNotModified)
    now = blob.get_blob_properties().etag
    with words.refused(304, "ConditionNotMet", None):
        blob.get_blob_properties(etag=now, match_condition=MatchConditions.IfModified)


def test_dates_guard_writes(container, words):
    blob = disk(container)
    earlier = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    later = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    write(blob, 0, words.noise(512), if_modified_since=earlier)
    write(blob, 0, words.noise(512), if_unmodified_since=later)
    with words.refused(412, "ConditionNotMet"):
        write(blob, 0, words.noise(512), if_modified_since=later)
    with words.refused(412, "ConditionNotMet"):
        write(blob, 0, words.noise(512), if_unmodified_since=earlier)


def test_creating_where_a_blob_is_fails_when_asked_to(container, words):
    disk(container)
    with words.refused(409, "BlobAlreadyExists"):
        disk(container, match_condition=MatchConditions.IfMissing)


# --- block blobs ------------------------------------------------------------------------------------------------


def test_a_block_blob_with_content_settings_and_ranges(container, words):
    data = words.noise(100_001)
    settings = ContentSettings(
        content_type="application/json", content_encoding="identity", cache_control="no-store"
    )
    blob = container.upload_blob("point.json", data, content_settings=settings, metadata={"digest": "abc"})
    properties = blob.get_blob_properties()
    assert properties.content_settings.content_type == "application/json"
    assert properties.content_settings.cache_control == "no-store"
    assert bytes(properties.content_settings.content_md5) == hashlib.md5(data).digest()
    assert (properties.size, properties.metadata) == (100_001, {"digest": "abc"})
    assert blob.download_blob(99_000, 5_000).readall() == data[99_000:]
    assert blob.download_blob().readall() == data


def test_an_empty_block_blob(container):
    blob = container.upload_blob("empty", b"")
    assert blob.download_blob().readall() == b""
    assert blob.get_blob_properties().size == 0


def test_of_many_writers_of_an_absent_blob_exactly_one_wins(container, words):
    client = container.get_blob_client("head")
    for round_ in range(5):
        name = f"cycle-{round_}"
        start, results, lock = threading.Barrier(8), [], threading.Lock()

        def race(writer: int, name=name, start=start, results=results, lock=lock) -> None:
            start.wait()
            try:
                container.upload_blob(name, f"writer {writer}".encode(), overwrite=False)
                outcome = "won"
            except ResourceExistsError as e:
                outcome = f"{e.status_code} {getattr(e.error_code, 'value', e.error_code)}"
            with lock:
                results.append((outcome, writer))

        threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        winners = [w for outcome, w in results if outcome == "won"]
        assert (len(results), len(winners)) == (8, 1)
        assert {outcome for outcome, _ in results} == {"won", "409 BlobAlreadyExists"}
        assert container.download_blob(name).readall() == f"writer {winners[0]}".encode()
    assert not client.exists()


def test_blocks_become_a_blob_by_a_list(container, words):
    blob = container.get_blob_client("segment")
    parts = {f"block-{i}": words.noise(1000 + i, i) for i in range(4)}
    for name, data in parts.items():
        blob.stage_block(name, data)
    assert not blob.exists()
    committed, waiting = blob.get_block_list("all")
    assert (committed, len(waiting)) == ([], 4)
    blob.commit_block_list([BlobBlock("block-2"), BlobBlock("block-0")])
    assert blob.download_blob().readall() == parts["block-2"] + parts["block-0"]
    committed, waiting = blob.get_block_list("all")
    assert ([b.size for b in committed], waiting) == ([1002, 1000], [])
    with words.refused(400, "InvalidBlockList"):
        blob.commit_block_list([BlobBlock("block-3")])


def test_a_block_blob_is_replaced_and_deleted(container, words):
    container.upload_blob("x", b"one")
    with words.refused(409, "BlobAlreadyExists"):
        container.upload_blob("x", b"two")
    container.upload_blob("x", b"three", overwrite=True)
    assert container.download_blob("x").readall() == b"three"
    container.delete_blob("x")
    with words.refused(404, "BlobNotFound"):
        container.download_blob("x")


# --- containers and lists ---------------------------------------------------------------------------------------


def test_containers_are_made_listed_and_deleted(container, endpoint, words):
    service = endpoint.service()
    name = container.container_name
    with words.refused(409, "ContainerAlreadyExists"):
        service.create_container(name)
    assert name in [c.name for c in service.list_containers(name_starts_with=name[:5])]
    container.set_container_metadata({"plan": "crm"})
    assert container.get_container_properties().metadata == {"plan": "crm"}
    service.delete_container(name)
    with words.refused(404, "ContainerNotFound"):
        list(container.list_blobs())


def test_lists_have_prefixes_folders_snapshots_and_pages(container, words):
    for name in ("a/1", "a/2", "a/b/3", "c", "é & <x>"):
        container.upload_blob(name, name.encode(), metadata={"n": "1"})
    container.get_blob_client("c").create_snapshot()
    assert [b.name for b in container.list_blobs()] == ["a/1", "a/2", "a/b/3", "c", "é & <x>"]
    assert [b.name for b in container.list_blobs(name_starts_with="a/")] == ["a/1", "a/2", "a/b/3"]
    assert [b.name for b in container.walk_blobs(delimiter="/")] == ["a/", "c", "é & <x>"]
    assert sorted(b.name for b in container.walk_blobs("a/", delimiter="/")) == ["a/1", "a/2", "a/b/"]
    one_by_one = container.walk_blobs(delimiter="/", results_per_page=1).by_page()
    assert [[b.name for b in page] for page in one_by_one if page] == [["a/"], ["c"], ["é & <x>"]]
    found = list(container.list_blobs(include=["snapshots", "metadata"]))
    assert [b.name for b in found].count("c") == 2
    assert sum(1 for b in found if b.snapshot) == 1
    assert {tuple(b.metadata.items()) for b in found} == {(("n", "1"),)}
    pages = [[b.name for b in p] for p in container.list_blobs(results_per_page=2).by_page()]
    assert [n for p in pages for n in p] == ["a/1", "a/2", "a/b/3", "c", "é & <x>"]
    assert max(map(len, pages)) == 2


def test_metadata_and_headers_of_a_blob_change(container):
    blob = disk(container, metadata={"a": "1"})
    blob.set_blob_metadata({"b": "2"})
    blob.set_http_headers(ContentSettings(content_type="application/x-vhd"))
    properties = blob.get_blob_properties()
    assert (properties.metadata, properties.content_settings.content_type) == (
        {"b": "2"},
        "application/x-vhd",
    )
    assert properties.size == MIB


# --- who may ----------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused(container, endpoint, words):
    disk(container)
    stranger = endpoint.service(base64.b64encode(b"not the key").decode())
    with words.refused(403, "AuthenticationFailed", "AuthorizationFailure"):
        list(stranger.get_container_client(container.container_name).list_blobs())


def test_odd_names_and_queries_are_signed_alike(container, words):
    for name in ("with space", "plus+sign", "per%cent", "a=b&c", "ünïcode", "a//b", "(x)~!*'"):
        blob = disk(container, name, 4096)
        write(blob, 0, words.noise(512))
        assert blob.download_blob(0, 512).readall() == words.noise(512)


def test_a_sas_allows_what_it_says_and_no_more(container, endpoint, words):
    from azure.storage.blob import BlobClient

    blob = disk(container)
    write(blob, 0, words.noise(512))

    def client(url: str) -> BlobClient:
        return BlobClient.from_blob_url(url, **endpoint.options())

    reader = client(sas_url(endpoint, blob, "r"))
    assert reader.download_blob(0, 512).readall() == words.noise(512)
    with words.refused(403, "AuthorizationPermissionMismatch"):
        write(reader, 0, words.noise(512))
    writer = client(sas_url(endpoint, blob, "w"))
    write(writer, 512, words.noise(512))
    with words.refused(403, "AuthorizationPermissionMismatch"):
        writer.download_blob()
    past, future = (
        dt.datetime.now(dt.UTC) - dt.timedelta(minutes=1),
        dt.datetime.now(dt.UTC) + dt.timedelta(minutes=30),
    )
    for bad in (
        sas_url(endpoint, blob, "r", expiry=past),
        sas_url(endpoint, blob, "r", start=future),
        sas_url(endpoint, blob, "r", key=base64.b64encode(b"other").decode()),
        sas_url(endpoint, blob, "r").replace("sp=r", "sp=rw"),
        sas_url(endpoint, blob, "r").replace("/disk.vhd", "/other.vhd"),
    ):
        with words.refused(403, "AuthenticationFailed", "AuthorizationFailure"):
            client(bad).download_blob()


def test_a_snapshot_sas_opens_that_snapshot_only(container, endpoint, words):
    from azure.storage.blob import BlobClient

    blob = disk(container)
    write(blob, 0, words.noise(512))
    one, two = (blob.create_snapshot()["snapshot"] for _ in range(2))
    url = sas_url(endpoint, blob, "r", snapshot=one)
    good = BlobClient.from_blob_url(url, **endpoint.options())
    assert good.download_blob(0, 512).readall() == words.noise(512)
    with words.refused(403, "AuthenticationFailed", "AuthorizationFailure"):
        BlobClient.from_blob_url(url.replace(one, two), **endpoint.options()).download_blob()


def test_container_and_account_sas(container, endpoint, words):
    blob = disk(container)
    token = generate_container_sas(
        endpoint.account,
        container.container_name,
        endpoint.key,
        permission=ContainerSasPermissions(read=True, list=True),
        expiry=soon(),
    )
    guest = BlobServiceClient(endpoint.account_url, credential=token, **endpoint.options())
    inside = guest.get_container_client(container.container_name)
    assert [b.name for b in inside.list_blobs()] == ["disk.vhd"]
    with words.refused(403, "AuthorizationPermissionMismatch"):
        inside.get_blob_client("disk.vhd").delete_blob()
    token = generate_account_sas(
        endpoint.account,
        endpoint.key,
        resource_types=ResourceTypes(container=True, object=True),
        permission=AccountSasPermissions(read=True, write=True, create=True, list=True),
        expiry=soon(),
    )
    friend = BlobServiceClient(endpoint.account_url, credential=token, **endpoint.options())
    assert [b.name for b in friend.get_container_client(container.container_name).list_blobs()] == [
        "disk.vhd"
    ]
    write(friend.get_blob_client(container.container_name, blob.blob_name), 0, words.noise(512))
    with words.refused(403, "AuthorizationResourceTypeMismatch"):
        list(friend.list_containers())


async def test_the_async_sdk_works_too(container, endpoint, words):
    async with AsyncBlobServiceClient(
        endpoint.account_url, credential=endpoint.key, **endpoint.options()
    ) as service:
        blob = service.get_blob_client(container.container_name, "dir/async disk")
        await blob.create_page_blob(8 * MIB)
        data = words.noise(4 * MIB)
        await blob.upload_page(data, 0, len(data), validate_content=True)
        snapshot = (await blob.create_snapshot())["snapshot"]
        await blob.clear_page(0, 512)
        async with service.get_blob_client(
            container.container_name, "dir/async disk", snapshot=snapshot
        ) as old:
            stream = await old.download_blob()
            assert await stream.readall() == data + bytes(4 * MIB)
        assert [
            b.name async for b in service.get_container_client(container.container_name).list_blobs()
        ] == ["dir/async disk"]


def test_every_listed_difference_is_expected_somewhere(known_differences):
    used = set(re.findall(r'differs\("([a-z0-9-]+)"\)', Path(__file__).read_text()))
    assert used == set(known_differences)
