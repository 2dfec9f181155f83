"""Replicas in page blobs: the same promises as any backend, over HTTP and with what only Azure does."""

from __future__ import annotations

import asyncio
import base64
import random
import struct
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobServiceClient

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.lab.blob.faults import BlobFaults
from farshore.lab.blob.server import BlobServer
from farshore.lab.blob.store import BlobStore
from farshore.providers.azure import pageblobs, vhd
from farshore.providers.azure.pageblobs import AzureReplicaStore, PageBlobBackend
from farshore.providers.azure.settings import AzureSettings
from farshore.replication.backend import Kind, parse_handle
from farshore.replication.engine import JournalStore, Options, Pace, run_cycle
from farshore.replication.filesource import FileSource
from farshore.replication.loop import LegPlan, run_leg
from farshore.replication.ports import LEAF
from farshore.replication.verify import verify_point

MIB = 1 << 20
KEY = base64.b64encode(b"a laboratory key of no value at all").decode()
PACE = Pace(workers=2, piece=4 * LEAF, poll=0.05)


@dataclass
class Lab:
    settings: AzureSettings
    faults: BlobFaults
    service: BlobServiceClient

    def blob(self, handle_or_name: str, snapshot: str | None = None):
        return self.service.get_blob_client("farshore", handle_or_name, snapshot=snapshot)


def settings_for(url: str) -> AzureSettings:
    return AzureSettings(
        tenant="t",
        client_id="c",
        client_secret="s",
        subscription="s",
        resource_group="g",
        location="westeurope",
        storage_account_id="/x",
        blob_endpoint=url,
        storage_account="farshorelab",
        storage_key=KEY,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    store = BlobStore(tmp_path_factory.mktemp("account"), "farshorelab", KEY)
    server = BlobServer(store)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
    url = server.account_url("farshorelab")
    settings = settings_for(url)
    service = BlobServiceClient(
        url, credential={"account_name": "farshorelab", "account_key": KEY}, retry_total=0
    )
    try:
        yield Lab(settings, server.faults, service)
    finally:
        service.close()
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
        store.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture
def lab(running: Lab) -> Iterator[Lab]:
    yield running
    running.faults.clear()


@pytest.fixture
def store(lab: Lab) -> Iterator[AzureReplicaStore]:
    made = AzureReplicaStore(lab.settings)
    yield made
    made.close()


@pytest.fixture
def backend(store: AzureReplicaStore) -> PageBlobBackend:
    made = store.backend
    assert isinstance(made, PageBlobBackend)
    made.create(f"warm/{uuid.uuid4().hex}", b"")  # makes the container
    return made


class Guest:
    """Two files that are written at random, and what each cut of them held."""

    def __init__(self, folder: Path, seed: int = 1) -> None:
        self.dice = random.Random(seed)
        self.files = {"2000": folder / "a.img", "2001": folder / "b.img"}
        self.files["2000"].write_bytes(self.dice.randbytes(20 * LEAF + 512))
        with self.files["2001"].open("wb") as file:
            file.truncate(3 * MIB)
        self.source = FileSource(self.files, folder / "work")
        self.machine = f"vm-{uuid.uuid4().hex[:8]}"

    def write(self, times: int = 3) -> None:
        for _ in range(times):
            path = self.files[self.dice.choice(["2000", "2001"])]
            with path.open("r+b") as file:
                file.seek(self.dice.randrange(20) * LEAF)
                file.write(self.dice.choice([bytes(LEAF), self.dice.randbytes(5000)]))

    def content(self) -> dict[str, bytes]:
        return {key: path.read_bytes() for key, path in self.files.items()}


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def cycle(guest: Guest, writer, **options):
    return run_cycle(
        guest.source, writer, machine=guest.machine, want=Consistency.CRASH, pace=PACE, **options
    )


def read(store: JournalStore, machine: str, point: str) -> dict[str, bytes]:
    disks = [disk.state for disk in store.manifest(machine, point).disks]
    return {d.key: store.read_point(machine, point, d.key).read(0, d.size) for d in disks}


def test_every_point_is_the_source_at_its_cut(store: AzureReplicaStore, guest: Guest) -> None:
    writer = store.acquire(guest.machine, "me")
    truth = {}
    for _ in range(4):
        guest.write()
        result = cycle(guest, writer)
        truth[result.point.id] = guest.content()
        if len(truth) % 2:
            writer.freeze()
    assert [point.id for point in store.points(guest.machine)] == list(truth)
    for point, content in truth.items():
        assert read(store, guest.machine, point) == content
        verify_point(store, guest.machine, point)
    assert result.bytes_read < 8 * LEAF, "the last delta read more than a delta"


def test_a_replica_blob_is_a_fixed_vhd_of_whole_mebibytes(
    store: AzureReplicaStore, lab: Lab, guest: Guest
) -> None:
    writer = store.acquire(guest.machine, "me")
    cycle(guest, writer)
    base = writer.freeze()
    content = guest.content()
    assert base is not None
    for disk in base.disks:
        name, snapshot = parse_handle(disk.snapshot)
        raw = lab.blob(name, snapshot).download_blob().readall()
        size = disk.size
        assert len(raw) % MIB == 512
        assert raw[:size] == content[disk.key]
        assert not any(raw[size:-512])
        footer = raw[-512:]
        assert footer[:8] == b"conectix" and struct.unpack(">QQ", footer[40:56]) == (len(raw) - 512,) * 2
        checksum = struct.unpack(">I", footer[64:68])[0]
        assert checksum == ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF


def test_the_footer_is_put_back_if_its_writer_died_before_it(backend: PageBlobBackend, lab: Lab) -> None:
    name = f"{uuid.uuid4().hex}/d/x.vhd"
    lab.blob(name).create_page_blob(vhd.blob_size(MIB), metadata={"size": str(MIB)}, sequence_number=3)
    backend.ensure_image(name, Kind.DISK, MIB, 5)
    assert lab.blob(name).download_blob(MIB, 512).readall() == vhd.footer(MIB, name)


@pytest.mark.parametrize(
    ("old", "new"), [(MIB, 3 * MIB), (3 * MIB, MIB + 512), (MIB, MIB + 4096), (2 * MIB, 2 * MIB - 512)]
)
def test_a_resized_disk_has_one_footer_and_no_remnants(
    backend: PageBlobBackend, lab: Lab, old: int, new: int
) -> None:
    name = f"{uuid.uuid4().hex}/d/x.vhd"
    backend.ensure_image(name, Kind.DISK, old, 1)
    backend.write(name, 0, b"\xff" * old, 1)
    backend.resize_image(name, Kind.DISK, new, 1)
    assert backend.ensure_image(name, Kind.DISK, new, 1) == new
    raw = lab.blob(name).download_blob().readall()
    both = min(old, new)
    assert raw[:both] == b"\xff" * both
    assert not any(raw[both:-512]) and raw[-512:] == vhd.footer(new, name)


def test_a_disk_that_grows_keeps_its_older_points(store: AzureReplicaStore, guest: Guest) -> None:
    writer = store.acquire(guest.machine, "me")
    first, before = cycle(guest, writer), guest.content()
    writer.freeze()
    with guest.files["2000"].open("r+b") as file:
        file.truncate(40 * LEAF)
    second = cycle(guest, writer)
    assert second.full and "resized" in second.reason
    writer.freeze()
    assert read(store, guest.machine, first.point.id) == before
    assert read(store, guest.machine, second.point.id) == guest.content()


def test_an_older_writer_is_refused_everything(store: AzureReplicaStore, guest: Guest) -> None:
    old = store.acquire(guest.machine, "old")
    cycle(guest, old)
    old.advance()
    guest.write()
    cycle(guest, old)
    new = store.acquire(guest.machine, "new")
    for attempt in (
        old.advance,
        old.freeze,
        lambda: cycle(guest, old),
        lambda: old.remove_points([2]),
        old.sweep,
        old.keep_alive,
        lambda: store.acquire(guest.machine, "old", succeeding=old.epoch),
    ):
        with pytest.raises(FarshoreError) as caught:
            attempt()
        assert caught.value.code is Code.REPLICA_FENCED and not caught.value.retryable
    result = cycle(guest, new)
    assert read(store, guest.machine, result.point.id) == guest.content()


def test_a_stale_commit_meets_the_number_of_the_new_owner(
    store: AzureReplicaStore, guest: Guest, monkeypatch
) -> None:
    old = store.acquire(guest.machine, "old")
    cycle(guest, old)
    real = old.commit

    def overtaken(manifest):
        store.acquire(guest.machine, "new")  # everything is frozen, only the commit is missing
        return real(manifest)

    monkeypatch.setattr(old, "commit", overtaken)
    guest.write()
    with pytest.raises(FarshoreError) as caught:
        cycle(guest, old)
    assert caught.value.code is Code.REPLICA_FENCED
    assert len(store.points(guest.machine)) == 1


def test_a_lost_answer_to_the_commit_is_looked_up(store: AzureReplicaStore, lab: Lab, guest: Guest) -> None:
    writer = store.acquire(guest.machine, "me")
    lab.faults.add("reset-after", op="PutBlob", blob=f"*/{guest.machine}/m/*", count=1)
    result = cycle(guest, writer)
    assert [p.id for p in store.points(guest.machine)] == [result.point.id]


def test_a_lost_request_to_commit_costs_the_epoch_and_nothing_else(
    store: AzureReplicaStore, lab: Lab, guest: Guest
) -> None:
    lab.faults.add("reset-before", op="PutBlob", blob=f"*/{guest.machine}/m/*", skip=1, count=1)
    naps: list[float] = []
    plan = LegPlan(guest.machine, "me", 1.0, stop_after_first=True, pace=PACE)
    result = run_leg(guest.source, store, plan, sleep=naps.append)
    assert result.errors == 1 and result.points == 1 and naps
    assert read(store, guest.machine, result.newest.id) == guest.content()


def test_requests_that_fail_for_a_moment_do_not_cost_the_cycle(
    store: AzureReplicaStore, lab: Lab, guest: Guest
) -> None:
    writer = store.acquire(guest.machine, "me")
    lab.faults.add("status", op="PutPage", count=2)
    lab.faults.add("reset-after", op="SnapshotBlob", count=1)
    lab.faults.add("status", op="SetBlobProperties", count=1)
    result = cycle(guest, writer)
    writer.freeze()
    assert read(store, guest.machine, result.point.id) == guest.content()
    store.acquire(guest.machine, "next")
    frozen = [s.id for image in store.backend.images(f"{guest.machine}/") for s in image.snapshots]
    assert len(frozen) == 4, "the snapshot whose answer was lost was not reaped"


@pytest.mark.parametrize(
    ("action", "options"),
    [
        ("reset-before", {}),
        ("reset-after", {}),
        ("status", {"status": 500, "code": "OperationTimedOut"}),
        ("status", {"status": 408, "code": "RequestTimeout"}),
        ("status", {"status": 500, "code": "InternalError"}),
        ("status", {"status": 503, "code": "ServiceUnavailable"}),
    ],
)
@pytest.mark.parametrize("change", ["write", "clear", "resize"])
def test_a_change_of_pages_whose_outcome_is_unknown_is_not_repeated(
    backend: PageBlobBackend, lab: Lab, action: str, options: dict, change: str
) -> None:
    name = f"{uuid.uuid4().hex}/d/x.vhd"
    backend.ensure_image(name, Kind.DISK, MIB, 5)
    lab.faults.add(action, op="PutPage", blob=f"*{name}", count=1, **options)
    lab.faults.counts.clear()
    changes = {
        "write": lambda: backend.write(name, 0, b"x" * 512, 5),
        "clear": lambda: backend.clear(name, 0, 512, 5),
        "resize": lambda: backend.resize_image(name, Kind.DISK, 2 * MIB, 5),
    }
    with pytest.raises(FarshoreError) as caught:
        changes[change]()
    assert caught.value.retryable and lab.faults.counts["PutPage"] <= 1


def test_a_change_of_pages_that_was_refused_for_certain_is_repeated(
    backend: PageBlobBackend, lab: Lab, monkeypatch
) -> None:
    monkeypatch.setattr(pageblobs, "_FIRST_PAUSE", 0.001)
    name = f"{uuid.uuid4().hex}/d/x.vhd"
    backend.ensure_image(name, Kind.DISK, MIB, 5)
    lab.faults.add("status", op="PutPage", status=503, code="ServerBusy", count=2)
    lab.faults.add("status", op="PutPage", status=429, code="TooManyRequests", skip=2, count=1)
    backend.write(name, 0, b"x" * 512, 5)
    assert backend.read(name, 0, 512) == b"x" * 512


def test_a_lost_write_to_a_replica_costs_the_epoch_so_that_it_is_refused_when_it_lands_later(
    store: AzureReplicaStore, lab: Lab, guest: Guest
) -> None:
    writer = store.acquire(guest.machine, "me")
    point = cycle(guest, writer).point
    lab.faults.add("reset-before", op="PutPage", blob=f"*/{guest.machine}/d/2000*.vhd", skip=1, count=1)
    with pytest.raises(FarshoreError) as caught:
        writer.advance()
    assert caught.value.code is Code.TARGET_UNREACHABLE
    with pytest.raises(FarshoreError) as caught:
        writer.advance()
    assert caught.value.code is Code.REPLICA_FENCED and writer.adrift
    second = store.acquire(guest.machine, "again")
    assert second.freeze() is not None
    (name,) = [
        image.name
        for image in store.backend.images(f"{guest.machine}/")
        if "2000" in image.name and ".vhd" in image.name
    ]
    with pytest.raises(HttpResponseError) as late:
        lab.blob(name).upload_page(b"?" * 512, 0, 512, if_sequence_number_lte=writer.epoch)
    assert late.value.status_code == 412 and second.epoch > writer.epoch
    assert read(store, guest.machine, point.id) == guest.content()


def test_a_leg_takes_a_new_epoch_after_a_lost_write_and_loses_no_point(
    store: AzureReplicaStore, lab: Lab, guest: Guest
) -> None:
    lab.faults.add("reset-before", op="PutPage", blob=f"*/{guest.machine}/d/2000*.vhd", skip=1, count=1)
    bases: list[int] = []

    def enough() -> bool:
        bases.append(len(store.log(guest.machine).read(time.time()).bases))
        return bases[-1] > 0

    plan = LegPlan(guest.machine, "me", 0.2, until_s=120.0, pace=PACE, scrub_every_s=None)
    result = run_leg(guest.source, store, plan, should_stop=enough)
    assert result.points > 1 and result.errors == 0 and bases[-1]
    assert read(store, guest.machine, result.newest.id) == guest.content()


def test_a_dead_storage_account_is_a_retryable_error(
    store: AzureReplicaStore, lab: Lab, guest: Guest
) -> None:
    lab.faults.outage("reset")
    with pytest.raises(FarshoreError) as caught:
        store.points(guest.machine)
    assert caught.value.code is Code.TARGET_UNREACHABLE and caught.value.retryable


def test_a_flipped_byte_in_a_blob_is_found(store: AzureReplicaStore, lab: Lab, guest: Guest) -> None:
    writer = store.acquire(guest.machine, "me")
    first = cycle(guest, writer)
    writer.advance()
    (name,) = [
        image.name
        for image in store.backend.images(f"{guest.machine}/")
        if "2000" in image.name and ".vhd" in image.name
    ]
    blob = lab.blob(name)
    page = bytearray(blob.download_blob(5 * LEAF, 512).readall())
    page[7] ^= 1
    blob.upload_page(bytes(page), 5 * LEAF, 512)
    second = cycle(guest, writer)
    writer.freeze()
    verify_point(store, guest.machine, first.point.id)
    with pytest.raises(FarshoreError, match=f"{LEAF} bytes at {5 * LEAF}") as caught:
        verify_point(store, guest.machine, second.point.id)
    assert caught.value.code is Code.REPLICA_DAMAGED
    healed = cycle(guest, writer, resync=True)
    writer.freeze()
    verify_point(store, guest.machine, healed.point.id)
    assert healed.bytes_shipped == LEAF


@pytest.mark.parametrize("name", ["vm", "vm ä/1%2F?&#"])
def test_the_address_of_a_frozen_disk_serves_its_bytes(
    store: AzureReplicaStore, guest: Guest, name: str
) -> None:
    guest.machine = f"{name} {guest.machine}"
    writer = store.acquire(guest.machine, "me")
    result, truth = cycle(guest, writer), guest.content()
    writer.freeze()
    guest.write()
    cycle(guest, writer)
    writer.advance()
    reader = store.read_point(guest.machine, result.point.id, "2000")
    assert reader.is_frozen
    assert store.blob_url(reader.frozen).endswith("?snapshot=" + parse_handle(reader.frozen)[1])
    with urllib.request.urlopen(store.blob_url(reader.frozen, sas_seconds=60), timeout=10) as answer:
        assert answer.read()[: reader.size] == truth["2000"]


def test_removed_points_take_their_blobs_along_and_held_ones_stay(lab: Lab, guest: Guest) -> None:
    now = [1000.0]
    store = AzureReplicaStore(lab.settings, clock=lambda: now[0], how=Options(grace=10.0))
    writer = store.acquire(guest.machine, "me")
    made = []
    for _ in range(4):
        guest.write()
        made.append(cycle(guest, writer).point)
        writer.freeze()
    truth = guest.content()
    now[0] += 100.0
    store.hold(guest.machine, made[1].id, "test failover")
    assert writer.remove_points([point.cycle for point in made]) == [made[0].cycle, made[2].cycle]
    assert [p.id for p in store.points(guest.machine)] == [made[1].id, made[3].id]
    for _ in range(2):
        now[0] += 100.0
        writer.sweep(thorough=True)
    assert {len(image.snapshots) for image in store.backend.images(f"{guest.machine}/")} == {2}
    assert store.points(guest.machine)[0].pinned
    store.release(guest.machine, "test failover")
    assert store.keep_only(guest.machine, made[3].id) == [made[1].id]
    assert read(store, guest.machine, made[3].id) == truth
    store.close()


def test_a_removed_machine_leaves_nothing(store: AzureReplicaStore, lab: Lab, guest: Guest) -> None:
    writer = store.acquire(guest.machine, "me")
    cycle(guest, writer)
    cycle(guest, writer)
    store.remove_machine(guest.machine)
    store.remove_machine(guest.machine)
    names = lab.service.get_container_client("farshore").list_blobs(guest.machine, include=["snapshots"])
    assert [blob.name for blob in names] == []
    assert store.points(guest.machine) == []
    assert cycle(guest, store.acquire(guest.machine, "me")).point.cycle == 2


def test_crashes_at_any_request_leave_only_true_points(lab: Lab, tmp_path: Path, monkeypatch) -> None:
    """The story of the engine's tests, shorter: the connection to the store breaks for good at a random request."""
    monkeypatch.setattr(pageblobs, "_FIRST_PAUSE", 0.001)
    guest = Guest(tmp_path)
    dice = random.Random(5)
    truth: dict[str, dict[str, bytes]] = {}
    acknowledged: list[str] = []
    for _ in range(8):
        guest.write()
        store = AzureReplicaStore(lab.settings)
        lab.faults.add("reset-after", blob=f"*/{guest.machine}/*", skip=dice.randint(2, 130))
        try:
            writer = store.acquire(guest.machine, "me")
            guest.source.reap()
            for _ in range(2):
                content = guest.content()
                truth[f"farshore-{guest.machine}-{writer.epoch}-{writer.cycle}"] = content
                acknowledged.append(cycle(guest, writer).point.id)
                guest.write()
                writer.freeze() if dice.random() < 0.5 else writer.advance()
        except FarshoreError as error:
            if error.code not in (Code.TARGET_UNREACHABLE, Code.REPLICA_FENCED):
                raise
        finally:
            store.close()
            lab.faults.clear()
        check = AzureReplicaStore(lab.settings)
        points = check.points(guest.machine)
        assert set(acknowledged) <= {point.id for point in points}
        for point in points[-2:]:
            assert read(check, guest.machine, point.id) == truth[check.manifest(guest.machine, point.id).cut]
            verify_point(check, guest.machine, point.id)
        check.close()
    assert acknowledged


def test_the_service_itself_refuses_an_older_sequence_number(backend: PageBlobBackend, lab: Lab) -> None:
    name = f"{uuid.uuid4().hex}/d/x.vhd"
    backend.ensure_image(name, Kind.DISK, MIB, 7)
    with pytest.raises(HttpResponseError) as caught:
        lab.blob(name).upload_page(bytes(512), 0, 512, if_sequence_number_lte=6)
    assert caught.value.status_code == 412
    with pytest.raises(FarshoreError) as refused:
        backend.ensure_image(name, Kind.DISK, MIB, 6)
    assert refused.value.code is Code.REPLICA_FENCED
    backend.delete_image(name, 6)
    assert lab.blob(name).exists()


def test_a_quiet_cycle_costs_few_requests(store: AzureReplicaStore, lab: Lab, guest: Guest) -> None:
    """Requests cost money and the time of a 30 s interval; 500 a second is all that one page blob serves."""
    writer = store.acquire(guest.machine, "me")
    cycle(guest, writer)
    lab.faults.counts.clear()
    cycle(guest, writer)
    idle = dict(lab.faults.counts)
    assert idle == {"ListBlobs": 1, "PutBlob": 1}, idle
    for path in guest.files.values():
        with path.open("r+b") as file:
            file.write(guest.dice.randbytes(100))
    lab.faults.counts.clear()
    cycle(guest, writer)
    busy = dict(lab.faults.counts)
    assert busy == {"ListBlobs": 1, "PutBlob": 3}, busy


def test_a_read_of_an_image_is_one_request(backend: PageBlobBackend, lab: Lab) -> None:
    """The SDK's own download lists all pages of the blob each time, which a large fragmented disk does not bear."""
    name = f"{uuid.uuid4().hex}/d/x.vhd"
    backend.ensure_image(name, Kind.DISK, 8 * MIB, 1)
    backend.write(name, MIB, b"a" * 1024, 1)
    snapshot = backend.freeze(name, 1, 1, 1)
    backend.write(name, MIB, b"b" * 1024, 1)
    lab.faults.counts.clear()
    assert backend.read(name, MIB - 512, 2048) == bytes(512) + b"b" * 1024 + bytes(512)
    assert backend.read(name, MIB, 1024, snapshot) == b"a" * 1024
    assert sum(lab.faults.counts.values()) == 2, dict(lab.faults.counts)
    with pytest.raises(FarshoreError) as missing:
        backend.read(name, 0, 512, "2020-01-01T00:00:00.0000000Z")
    assert missing.value.code is Code.REPLICA_DAMAGED
    with pytest.raises(FarshoreError) as short:
        backend.read(name, 8 * MIB, 4096)
    assert short.value.code is Code.REPLICA_DAMAGED
    lab.faults.add("reset-after", op="GetBlob", blob=name, count=1)
    assert backend.read(name, MIB, 512) == b"b" * 512
