"""The replica store against Azurite, a blob server that is not ours: fences, snapshots, resizing, removal agree."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure.pageblobs import AzureReplicaStore
from farshore.replication.ports import LEAF
from farshore.replication.verify import verify_point

from .test_pageblobs import KEY, Guest, cycle, read, settings_for

SCRIPT = Path(__file__).resolve().parents[3] / "build/azurite/node_modules/azurite/dist/src/blob/main.js"


@pytest.fixture
def azurite(tmp_path: Path) -> Iterator[AzureReplicaStore]:
    if shutil.which("node") is None or not SCRIPT.exists():
        pytest.skip(
            "Azurite is not installed here (the laboratory's blob tests install it into build/azurite)"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["node", str(SCRIPT), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location"]
    command += [str(tmp_path / "azurite"), "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"farshorelab:{KEY}"}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    store = AzureReplicaStore(
        replace(settings_for(f"http://127.0.0.1:{port}/farshorelab"), container="replicas")
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "Azurite does not start"
                time.sleep(0.05)
        yield store
    finally:
        store.close()
        process.terminate()
        process.wait(20)


@pytest.mark.foreign
def test_azurite_keeps_the_same_promises(azurite: AzureReplicaStore, tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    old = azurite.acquire(guest.machine, "old")
    truth = {}
    for _ in range(3):
        guest.write()
        result = cycle(guest, old)
        truth[result.point.id] = guest.content()
    old.freeze()
    guest.write()
    truth[cycle(guest, old).point.id] = guest.content()
    new = azurite.acquire(guest.machine, "new")
    for attempt in (old.advance, old.freeze, lambda: cycle(guest, old)):
        with pytest.raises(FarshoreError) as caught:
            attempt()
        assert caught.value.code is Code.REPLICA_FENCED
    with guest.files["2000"].open("r+b") as file:
        file.truncate(40 * LEAF)
    result = cycle(guest, new)
    truth[result.point.id] = guest.content()
    assert [point.id for point in azurite.points(guest.machine)] == list(truth)
    for point, content in truth.items():
        assert read(azurite, guest.machine, point) == content
        verify_point(azurite, guest.machine, point)
    new.freeze()
    frozen = azurite.read_point(guest.machine, result.point.id, "2000").frozen
    url = azurite.blob_url(frozen, sas_seconds=60)
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read()[: 40 * LEAF] == guest.content()["2000"]
    assert len(azurite.keep_only(guest.machine, result.point.id)) == 4
    azurite.remove_machine(guest.machine)
    assert not azurite.backend.list("") and not azurite.backend.images(f"{guest.machine}/")
