"""SIGKILL at any moment: what was acknowledged is there, what was not is there whole or not at all."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from azure.core.exceptions import AzureError
from azure.storage.blob import BlobServiceClient, ContainerClient

REGION = 128 * 1024  # two chunks, so that a torn write would show
REGIONS = 16


def stamp(number: int, size: int = REGION) -> bytes:
    return number.to_bytes(8, "big") * (size // 8)


class Writer:
    """Writes, snapshots and creates until the server dies; remembers what was acknowledged and what was under way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.count = 0
        self.regions = dict.fromkeys(range(REGIONS), 0)
        self.snapshots: dict[str, dict[int, int]] = {}
        self.manifests: dict[str, bytes] = {}
        self.in_flight: tuple[str, int, int] | None = None

    def run(self, container: ContainerClient) -> None:
        blob = container.get_blob_client("disk")
        while True:
            self.count += 1
            kind = self.random.choices(["write", "snapshot", "manifest"], [8, 1, 1])[0]
            region = self.random.randrange(REGIONS)
            self.in_flight = (kind, region, self.count)
            try:
                if kind == "write":
                    blob.upload_page(stamp(self.count), region * REGION, REGION)
                    self.regions[region] = self.count
                elif kind == "snapshot":
                    self.snapshots[blob.create_snapshot()["snapshot"]] = dict(self.regions)
                else:
                    container.upload_blob(f"m{self.count}", stamp(self.count, 4096))
                    self.manifests[f"m{self.count}"] = stamp(self.count, 4096)
            except AzureError:
                return
            self.in_flight = None

    def check(self, container: ContainerClient) -> None:
        """Compare with what a restarted server holds, and take over what was under way but arrived."""
        kind, region, number = self.in_flight or ("", -1, -1)
        for r in range(REGIONS):
            data = container.download_blob("disk", r * REGION, REGION).readall()
            allowed = {self.regions[r]} | ({number} if kind == "write" and r == region else set())
            found = int.from_bytes(data[:8], "big")
            assert found in allowed, f"region {r} holds {found}, not {allowed}"
            assert data == stamp(found), f"region {r} is torn"
            self.regions[r] = found
        listed = list(container.list_blobs(include=["snapshots"]))
        snapshots = {b.snapshot for b in listed if b.snapshot}
        assert snapshots >= self.snapshots.keys()
        extra = snapshots - self.snapshots.keys()
        assert len(extra) <= (kind == "snapshot")
        self.snapshots.update({s: dict(self.regions) for s in extra})
        for snapshot in self.random.sample(sorted(self.snapshots), min(4, len(self.snapshots))):
            old = container.get_blob_client("disk", snapshot=snapshot)
            data = old.download_blob().readall()
            assert data == b"".join(stamp(n) for n in self.snapshots[snapshot].values())
        manifests = {b.name for b in listed if b.name.startswith("m")}
        assert manifests >= self.manifests.keys()
        for name in manifests:
            assert container.download_blob(name).readall() == stamp(int(name[1:]), 4096)
            self.manifests[name] = stamp(int(name[1:]), 4096)


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_acknowledged_writes_survive_sigkill_and_nothing_is_torn(tmp_path: Path, words, kills: int):
    writer = crash_and_check(tmp_path, words, kills)
    assert writer.count >= 20 * kills
    assert writer.snapshots
    assert writer.manifests


def kill_in_the_middle(process: subprocess.Popen[bytes], writer: Writer) -> None:
    """SIGKILL after some more requests, at no particular moment of one."""
    until = writer.count + writer.random.randint(20, 80)
    pause = writer.random.uniform(0, 0.01)
    while writer.count < until and process.poll() is None:
        threading.Event().wait(0.0005)
    threading.Event().wait(pause)
    process.send_signal(signal.SIGKILL)


def crash_and_check(root: Path, words, kills: int, code: str = "") -> Writer:
    writer = Writer(seed=kills)
    for kill in range(kills + 1):
        process, ready = words.start_process(root, code=code)
        try:
            service = BlobServiceClient(ready["account_url"], credential=ready["key"], retry_total=0)
            container = service.get_container_client("disks")
            if kill == 0:
                container.create_container()
                container.get_blob_client("disk").create_page_blob(REGION * REGIONS)
            writer.check(container)
            if kill == kills:
                break
            killer = threading.Thread(target=kill_in_the_middle, args=(process, writer))
            killer.start()
            writer.run(container)
            killer.join()
            assert process.wait(10) == -signal.SIGKILL
            service.close()
        finally:
            process.kill()
            process.wait(10)
            process.stdout.close()
    return writer


LATE_COMMIT = """
from contextlib import contextmanager
from farshore.lab.blob import __main__, catalog
real = catalog.Catalog.transaction
@contextmanager
def late(self):
    # Commits only every 50th transaction, but lets all be acknowledged.
    with self._lock:
        if self._depth == 0 and not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield self._db
        finally:
            self._depth -= 1
        self.late = getattr(self, "late", 0) + 1
        if self._depth == 0 and self.late % 50 == 0:
            self._db.execute("COMMIT")
catalog.Catalog.transaction = late
__main__.main()
"""


def test_this_check_notices_an_acknowledgement_before_the_commit(tmp_path: Path, words):
    with pytest.raises((AssertionError, AzureError)):  # writes are gone, or the whole container
        crash_and_check(tmp_path, words, kills=3, code=LATE_COMMIT)


def test_a_pending_copy_goes_on_after_a_restart(start_lab, words, tmp_path):
    root = tmp_path / "kept"
    lab = start_lab(https=False, root=root)
    container = lab.service().create_container("disks")
    blob = container.get_blob_client("disk")
    blob.create_page_blob(1 << 20)
    blob.upload_page(words.noise(4096), 8192, 4096)
    lab.store.copy_policy.hold = True
    target = container.get_blob_client("copy")
    assert target.start_copy_from_url(blob.url)["copy_status"] == "pending"
    lab.store.close()
    again = start_lab(https=False, root=root)
    target = again.service().get_blob_client("disks", "copy")
    words.wait_until(lambda: target.get_blob_properties().copy.status == "success")
    assert target.download_blob(8192, 4096).readall() == words.noise(4096)


def test_bytes_without_a_commit_are_swept_at_the_next_start(start_lab, tmp_path):
    from farshore.lab.blob.store import BlobStore

    root = tmp_path / "kept"
    store = BlobStore(root, "acc", "a2V5")
    orphan = store.catalog.new_store("BlockBlob")
    store.block_file(orphan).write_bytes(b"never committed")
    store.close()
    store = BlobStore(root, "acc", "a2V5")
    assert not store.block_file(orphan).exists()
    assert store.catalog.unreferenced_stores() == []
    store.close()
