"""`/folder` to the byte: ranges, locks, authentication, names, uploads, faults."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
from typing import Any

import pytest

from .conftest import MIB, Client, disks, extent

SIZE = 16 * MIB


@pytest.fixture
def frozen(client: Client, control: Any) -> tuple[Any, bytes]:
    """A running machine with a snapshot: its base extent is readable."""
    control.create_vm("web", [SIZE])
    control.guest_fill("web", 0, 3 * MIB, 2 * MIB, seed=3)
    vm = client.vm("web")
    client.snapshot(vm)
    content = bytes(3 * MIB) + random.Random(3).randbytes(2 * MIB) + bytes(SIZE - 5 * MIB)
    return vm, content


def test_ranges_are_right_to_the_byte(client: Client, frozen: tuple[Any, bytes]) -> None:
    _, content = frozen
    for start, length in (
        (0, 1),
        (3 * MIB - 1, 2),
        (3 * MIB, 2 * MIB),
        (SIZE - 1, 1),
        (0, SIZE),
        (12345, 70000),
    ):
        assert client.read("web/web-flat.vmdk", start, length) == content[start : start + length]


def test_a_range_is_cut_at_the_end_and_open_ends_and_suffixes_work(
    client: Client, frozen: tuple[Any, bytes]
) -> None:
    _, content = frozen
    for asked, start, end in (
        (f"bytes={SIZE - 10}-{SIZE + 100}", SIZE - 10, SIZE),
        (f"bytes={SIZE - 10}-", SIZE - 10, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
    ):
        status, headers, data = client.request("GET", "web/web-flat.vmdk", Range=asked)
        assert status == 206
        assert headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
        assert data == content[start:end]


def test_a_range_behind_the_end_is_416(client: Client, frozen: tuple[Any, bytes]) -> None:
    status, headers, _ = client.request("GET", "web/web-flat.vmdk", Range=f"bytes={SIZE}-")
    assert status == 416
    assert headers["content-range"] == f"bytes */{SIZE}"


def test_without_a_range_the_whole_file_comes_with_200(client: Client, frozen: tuple[Any, bytes]) -> None:
    status, headers, data = client.request("GET", "web/web-flat.vmdk")
    assert status == 200
    assert headers["accept-ranges"] == "bytes"
    assert data == frozen[1]


def test_head_tells_the_length_and_sends_nothing(client: Client, frozen: tuple[Any, bytes]) -> None:
    status, headers, data = client.request("HEAD", "web/web-flat.vmdk")
    assert (status, headers["content-length"], data) == (200, str(SIZE), b"")


def test_without_a_session_it_is_401(client: Client, frozen: tuple[Any, bytes]) -> None:
    assert client.request("GET", "web/web-flat.vmdk", cookie=False)[0] == 401


@pytest.mark.parametrize(
    "query",
    ["dcPath=DC1&dsName=ds1", "dcPath=DC0&dsName=ds9", "dcPath=DC0&dsName=ds2", "dcPath=DC0", ""],
)
def test_wrong_names_are_404(client: Client, frozen: tuple[Any, bytes], query: str) -> None:
    assert client.request("GET", "web/web-flat.vmdk", query=query)[0] == 404


def test_a_path_out_of_the_datastore_is_404(client: Client, lab: Any) -> None:
    assert client.request("GET", "../../lab.sqlite")[0] == 404
    assert client.request("GET", "web/../../../lab.sqlite")[0] == 404


def test_names_may_be_encoded_once_or_twice(client: Client, control: Any, lab: Any) -> None:
    lab.tree.add_datacenter(
        {"name": "DC 1", "folder": "Europe/Site A", "datastores": [{"name": "fast store"}]}
    )
    control.create_vm("app", [SIZE], power="poweredOff", datacenter="Europe/Site A/DC 1")
    for query in (
        "dcPath=Europe/Site%20A/DC%201&dsName=fast%20store",
        "dcPath=Europe%2FSite%20A%2FDC%201&dsName=fast%20store",
        "dcPath=Europe%252FSite%2520A%252FDC%25201&dsName=fast%2520store",
    ):
        assert client.request("HEAD", "app/app-flat.vmdk", query=query)[0] == 200


def test_the_live_extent_of_a_running_machine_is_locked(client: Client, control: Any) -> None:
    control.create_vm("web", [SIZE])
    assert client.request("GET", "web/web-flat.vmdk", Range="bytes=0-511")[0] == 500
    vm = client.vm("web")
    client.snapshot(vm)
    assert client.request("GET", "web/web-flat.vmdk", Range="bytes=0-511")[0] == 206
    assert client.request("GET", "web/web-000001-sesparse.vmdk", Range="bytes=0-511")[0] == 500


def test_all_links_of_a_powered_off_machine_are_readable(client: Client, frozen: tuple[Any, bytes]) -> None:
    client.wait(frozen[0].PowerOffVM_Task())
    assert client.request("HEAD", "web/web-flat.vmdk")[0] == 200
    assert client.request("HEAD", "web/web-000001-sesparse.vmdk")[0] == 200


def test_an_extent_that_something_else_holds_open_is_500(
    client: Client, control: Any, frozen: tuple[Any, bytes]
) -> None:
    control.hold_extent("web", 0)
    assert client.request("GET", "web/web-flat.vmdk", Range="bytes=0-511")[0] == 500
    control.hold_extent("web", 0, held=False)
    assert client.request("GET", "web/web-flat.vmdk", Range="bytes=0-511")[0] == 206


def test_offsets_in_a_delta_extent_are_not_offsets_of_the_disk(client: Client, control: Any) -> None:
    control.create_vm("web", [SIZE])
    vm = client.vm("web")
    client.snapshot(vm, "one")
    control.guest_write("web", 0, 0, b"A" * 4096)
    client.snapshot(vm, "two")
    assert client.read("web/web-000001-sesparse.vmdk", 0, 4096) != b"A" * 4096


def test_a_body_that_loses_its_freeze_is_cut_not_torn(
    client: Client, control: Any, frozen: tuple[Any, bytes]
) -> None:
    vm, _ = frozen
    control.settings(folder_mib_per_s=8)
    web = http.client.HTTPSConnection("127.0.0.1", client.port, context=client.context, timeout=60)
    try:
        web.request(
            "GET", "/folder/web/web-flat.vmdk?dcPath=DC0&dsName=ds1", headers={"Cookie": client.cookie}
        )
        answer = web.getresponse()
        answer.read(MIB)
        control.guest_write("web", 0, 15 * MIB, b"new")
        client.remove(vm.snapshot.currentSnapshot)
        with pytest.raises((http.client.IncompleteRead, OSError)):
            answer.read()
    finally:
        web.close()


def test_the_descriptor_says_where_the_bytes_are(
    client: Client, control: Any, frozen: tuple[Any, bytes]
) -> None:
    text = client.request("GET", "web/web.vmdk")[2].decode()
    assert 'createType="vmfs"' in text
    assert f'RW {SIZE // 512} VMFS "web-flat.vmdk"' in text
    delta = client.request("GET", "web/web-000001.vmdk")[2].decode()
    assert 'createType="seSparse"' in delta
    assert 'parentFileNameHint="web.vmdk"' in delta
    vmx = client.request("GET", "web/web.vmx")[2].decode()
    assert 'scsi0:0.fileName = "web-000001.vmdk"' in vmx


def test_a_vsan_datastore_shows_a_descriptor_and_no_bytes(
    client: Client, control: Any, frozen: tuple[Any, bytes]
) -> None:
    control.set_datastore("ds1", "vsan")
    assert "vsan://" in client.request("GET", "web/web.vmdk")[2].decode()
    assert client.request("GET", "web/web-flat.vmdk")[0] == 404


def test_put_replaces_the_extent_of_a_powered_off_machine(client: Client, control: Any) -> None:
    control.create_vm("web", [SIZE], power="poweredOff")
    content = os.urandom(MIB) + bytes(SIZE - MIB)
    assert client.request("PUT", "web/web-flat.vmdk", body=content)[0] == 200
    assert client.read("web/web-flat.vmdk", 0, SIZE) == content
    assert control.sha256("web", 0) == hashlib.sha256(content).hexdigest()


def test_put_on_a_running_machine_is_refused(client: Client, control: Any) -> None:
    control.create_vm("web", [SIZE])
    status = 0
    try:
        status = client.request("PUT", "web/web-flat.vmdk", body=bytes(SIZE))[0]
    except OSError:
        status = 500  # refused before the body was read
    assert status == 500
    assert control.sha256("web", 0) == hashlib.sha256(bytes(SIZE)).hexdigest()


def test_put_and_delete_of_a_file_that_is_no_disk(client: Client, control: Any) -> None:
    control.create_vm("web", [SIZE])
    assert client.request("PUT", "web/notes.txt", body=b"hello")[0] == 201
    assert client.request("GET", "web/notes.txt")[2] == b"hello"
    assert client.request("DELETE", "web/notes.txt")[0] == 204
    assert client.request("GET", "web/notes.txt")[0] == 404
    assert client.request("DELETE", "web/web-flat.vmdk")[0] == 500


def get(client: Client) -> bytes:
    return client.read("web/web-flat.vmdk", 3 * MIB, MIB)


@pytest.mark.parametrize("action", ["short", "reset", "drop"])
def test_a_broken_body_never_looks_complete(
    client: Client, control: Any, frozen: tuple[Any, bytes], action: str
) -> None:
    control.add_fault("GET", stage="folder", action=action, vm="web")
    with pytest.raises((http.client.HTTPException, OSError)):
        get(client)
    assert get(client) == frozen[1][3 * MIB : 4 * MIB]


def test_faults_of_status_and_wrong_bytes(client: Client, control: Any, frozen: tuple[Any, bytes]) -> None:
    control.add_fault("GET", stage="folder", action="status", status=503)
    assert client.request("GET", "web/web-flat.vmdk")[0] == 503
    control.add_fault("GET", stage="folder", action="wrong", vm="web")
    good = frozen[1][3 * MIB : 4 * MIB]
    assert get(client) != good
    assert get(client) == good


def test_a_changed_extent_name_in_the_backing_matches_the_file(
    client: Client, frozen: tuple[Any, bytes]
) -> None:
    snapshot = frozen[0].snapshot.currentSnapshot
    name = disks(snapshot)[0].backing.fileName
    assert client.request("HEAD", extent(name))[0] == 200
