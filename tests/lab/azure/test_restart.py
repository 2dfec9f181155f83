"""Nothing is lost when the laboratory is killed: ports, secrets, resources, bytes, running operations, knobs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from azure.identity import ClientSecretCredential
from azure.mgmt.compute import ComputeManagementClient

from farshore.lab.azure import AzureControl, LabAzure, LabAzureThread

RG = "farshore-dr"
EMPTY = {"location": "westeurope", "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}


def client(told: dict) -> ComputeManagementClient:
    credential = ClientSecretCredential(
        told["tenant"], told["client_id"], told["client_secret"], authority=told["arm"], disable_instance_discovery=True,
        connection_verify=told["ca"],
    )  # fmt: skip
    return ComputeManagementClient(
        credential, told["subscription"], base_url=told["arm"], connection_verify=told["ca"], polling_interval=0.02,
        credential_scopes=["https://management.azure.com/.default"], retry_total=0,
    )  # fmt: skip


def launch(root: Path) -> tuple[subprocess.Popen, dict]:
    process = subprocess.Popen(
        [sys.executable, "-m", "farshore.lab.azure", "--root", str(root)], stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    if not line:
        process.kill()
        raise AssertionError("the laboratory did not start")
    return process, json.loads(line)


def end(process: subprocess.Popen, *, kill: bool) -> None:
    process.kill() if kill else process.terminate()
    process.wait(20)
    process.stdout.close()


def test_a_killed_laboratory_goes_on_where_it_was(tmp_path) -> None:
    process, told = launch(tmp_path)
    try:
        control = AzureControl(told["control"])
        control.turn(page_size=7, time_scale=0.05)
        disks = client(told).disks
        disks.begin_create_or_update(RG, "d1", EMPTY).result()
        control.fault("lro_stuck", operation="compute.Disks.create_or_update")
        stuck = disks.begin_create_or_update(RG, "d2", EMPTY, polling=True)
        token = stuck.continuation_token()
        running = disks.begin_create_or_update(RG, "d3", EMPTY)
        assert not running.done()
    finally:
        end(process, kill=True)
    process, again = launch(tmp_path)
    try:
        assert again == told
        control = AzureControl(again["control"])
        assert control.knobs()["page_size"] == 7
        disks = client(again).disks
        states = {d.name: d.properties.provisioning_state for d in disks.list()}
        assert states["d1"] == "Succeeded"
        assert states["d2"] == "Updating"
        assert control.release() == 1
        assert disks.begin_create_or_update(RG, "d2", {}, continuation_token=token).result().name == "d2"
        assert (
            disks.begin_create_or_update(RG, "d3", EMPTY).result().properties.provisioning_state
            == "Succeeded"
        )
        assert {n for i, n in control.creations().items() if "/disks/" in i} == {1}
        assert (
            len(
                control.disk_sha256(
                    f"{told['storage_account_id'].split('/providers')[0]}/providers/Microsoft.Compute/disks/d3"
                )
            )
            == 64
        )
    finally:
        end(process, kill=False)
    assert process.returncode == 0


async def test_an_interrupted_import_is_whole_after_the_restart(azure, noise, tmp_path) -> None:
    """The engine stops in the middle and a new one begins: the bytes are complete, the creation counted once."""
    data = noise(4096)
    url = await azure.vhd("d1.vhd", {0: data})
    await azure.ctl(azure.control.time_scale, 0.05)
    body = {"location": "westeurope", "properties": {"creationData": azure.imported(url)}}
    poller = await azure.compute.disks.begin_create_or_update(RG, "d1", body)
    await azure.lab.stop()
    await azure.lab.start()
    disk = await asyncio.wait_for(poller.result(), 20)
    assert (await azure.ctl(azure.control.disk_path, disk.id)).read_bytes()[:4096] == data
    assert (await azure.ctl(azure.control.creations))[disk.id.lower()] == 1
    assert [p.name for p in azure.lab.world.files.iterdir() if p.suffix == ".part"] == []


def test_synchronous_tests_can_have_it_in_a_thread(tmp_path) -> None:
    with LabAzureThread(LabAzure(tmp_path)) as lab:
        told = lab.describe()
        assert told["storage_account_id"] is None
        disk = client(told).disks.begin_create_or_update(RG, "d1", EMPTY).result()
        assert disk.properties.provisioning_state == "Succeeded"
        assert AzureControl(told["control"]).describe() == told
    with pytest.raises(RuntimeError, match="not running"):
        _ = lab.world
