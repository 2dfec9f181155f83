"""Our client agrees with a vCenter that we did not write: govmomi's simulator, as Debian packages it (0.24.2).

It has neither change tracking nor disk bytes, so these are inventory, power, tasks, snapshots and history.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.ports import Power
from farshore.providers.vsphere import VSphereSettings, VSphereSite
from farshore.providers.vsphere.snapshots import Snapshots

SOURCE = Path(__file__).parent / "vcsim" / "main.go"
GOPATH = Path("/usr/share/gocode")
CACHE = Path(__file__).parents[3] / "build" / "foreign"

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    """The program, built without network and kept in `build/` by the hash of its source."""
    if shutil.which("go") is None or not (GOPATH / "src/github.com/vmware/govmomi/simulator").is_dir():
        pytest.skip("Go with govmomi is not installed (golang-go, golang-github-vmware-govmomi-dev)")
    binary = CACHE / f"vcsim-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if not binary.exists():
        work = tmp_path_factory.mktemp("gopath")
        (work / "src" / "vcsim").mkdir(parents=True)
        shutil.copy(SOURCE, work / "src" / "vcsim" / "main.go")
        CACHE.mkdir(parents=True, exist_ok=True)
        go = {
            "GO111MODULE": "off",
            "GOFLAGS": "",
            "GOPATH": f"{work}:{GOPATH}",
            "GOCACHE": str(CACHE / "go-cache"),
        }
        subprocess.run(
            ["go", "build", "-o", str(work / "vcsim"), "vcsim"],
            env={**os.environ, **go},
            check=True,
            timeout=500,
        )
        shutil.move(work / "vcsim", binary)
    return binary


@pytest.fixture(scope="module")
def address(simulator):
    """Host and port of a running simulator with 600 machines: more than a page of a bulk read."""
    child = subprocess.Popen(
        [simulator, "-machines", "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        host, port = child.stdout.readline().strip().split(":")
        yield host, int(port)
    finally:
        child.stdin.close()
        child.wait(20)
        child.stdout.close()


@pytest.fixture
async def vcsim(address):
    host, port = address
    certificate = await asyncio.to_thread(ssl.get_server_certificate, address)
    pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()
    site = VSphereSite(
        VSphereSettings(host=host, port=port, user="user", password="pass", thumbprint=pin, poll=1)
    )
    yield site
    await site.close()


async def test_the_inventory_is_read_in_pages_and_a_machine_is_found_in_every_way(vcsim):
    by_name = await vcsim.inspect("DC0_C0_RP0_VM7")
    assert by_name.power is Power.ON
    assert by_name.nics[0].mac.count(":") == 5
    assert by_name.nics[0].network == "DC0_DVPG0"  # the name of the port group, not its key
    assert "does not support change tracking" in by_name.findings[0].message
    for source in ("/DC0/vm/DC0_C0_RP0_VM7", by_name.id):
        assert (await vcsim.inspect(source)).id == by_name.id
    assert len(vcsim._inventory._known(60.0)) == 600


async def test_power_is_switched_and_proven(vcsim):
    name = "DC0_C0_RP0_VM1"
    down = await vcsim.shut_down(name, guest_timeout=10, force=False, checkpoint=lambda _: None)
    assert down.graceful
    assert name in (await vcsim.prove_off(name)).evidence
    for _ in range(2):
        await vcsim.power_on(name)
    with pytest.raises(FarshoreError) as caught:
        await vcsim.prove_off(name)
    assert caught.value.code is Code.FENCE_NOT_PROVEN


async def test_snapshots_are_taken_found_and_removed_and_tasks_waited_for(vcsim):
    def run():
        entry = vcsim._inventory.find("DC0_C0_RP0_VM2")
        snapshots = Snapshots(vcsim._client, entry)
        node = snapshots.create("farshore-m-1-1", "Farshore tests.", quiesce=True)
        assert node.quiesced
        assert snapshots.clear() == ["farshore-m-1-1"]
        assert snapshots.tree() == []
        return snapshots.history(node.created)

    await asyncio.to_thread(run)
    await vcsim.shut_down("DC0_C0_RP0_VM2", guest_timeout=10, force=False, checkpoint=lambda _: None)
    assert any("PoweredOff" in kind for _, kind in await asyncio.to_thread(run))


async def test_change_tracking_is_refused_with_the_reason(vcsim):
    with pytest.raises(FarshoreError, match="does not support change tracking") as caught:
        await vcsim.enable_tracking("DC0_C0_RP0_VM3")
    assert caught.value.code is Code.SOURCE_NOT_ELIGIBLE
