"""A Linux server with a real ext4 on a real block device and Farshore's agent comes up in the laboratory's Azure."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from farshore.contract.runs import FailoverInput, PointsInput, ProtectionInput, RunKind, RunStatus
from farshore.lab.demo.application import recovered_disks
from farshore.lab.stack import Stack, free_port, wait_until
from farshore.providers.physical.agent import certificates
from tests.e2e.conftest import until
from tests.providers.physical.conftest import LoopMachine, missing, run

WHY_NOT = missing()
pytestmark = [pytest.mark.timeout(420), pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)]

PLAN = """
farshore: 1
plan: hall
sites: {source: hall, target: westeurope}
replication: {interval: 2s, app_consistent_every: 5m}
network: {failover: dr-vnet, test: isolated}
machines:
  db1: {target: {size: Standard_D2s_v5, subnet: db}}
boot:
  - group: data
    machines: [db1]
"""
AGENT = """
[agent]
name = "db1"
listen = "127.0.0.1"
port = {port}
state = "{root}/state"
run = "{root}/run"
spool = "{root}/spool"
spool_mib = 256

[tls]
ca = "{ca}/ca.crt"
certificate = "{ca}/agent.crt"
key = "{ca}/agent.key"
clients = ["worker"]

[[disk]]
key = "data"
path = "{loop}"
boot = true
tracking = "auto"
"""
SITE = """
[sites.hall]
provider = "physical"
ca_file = "{ca}/ca.crt"
certificate_file = "{ca}/worker.crt"
key_file = "{ca}/worker.key"
seed_folder = "{root}/seed"
servers = {{ db1 = {{ host = "127.0.0.1", port = {port} }} }}
"""


def write(folder: Path, number: int) -> None:
    """One file that is either there and whole, or not there."""
    body = f"{number}\n" * 2000
    temporary = folder / "new"
    with temporary.open("w") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / f"{number:05d}")


def holds_all_files(image: Path, folder: Path, count: int) -> None:
    """Repair by replaying the journal is allowed; anything else, a missing or a torn file is not."""
    check = subprocess.run(["e2fsck", "-fy", image], capture_output=True, text=True, check=False)
    assert check.returncode in (0, 1), check.stdout
    folder.mkdir()
    run("mount", "-o", "loop,ro", image, folder)
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.isdecimal())
        assert names == [f"{number:05d}" for number in range(count)]
        for number, name in enumerate(names):
            assert (folder / name).read_text() == f"{number}\n" * 2000
    finally:
        run("umount", folder)


@pytest.fixture
def server(tmp_path):
    machine = LoopMachine(tmp_path)
    try:
        machine.add("data", 48)
        machine.mkfs("data")
        yield machine
    finally:
        machine.close()


async def test_a_linux_server_is_protected_and_rehearsed_from_its_own_disk(server, tmp_path, connect):
    folder = server.mount("data")
    for number in range(40):
        write(folder, number)
    ca, root = tmp_path / "ca", tmp_path / "agent"
    root.mkdir()
    (root / "spool").mkdir()
    (root / "seed").mkdir()
    certificates.make_ca(ca)
    certificates.make_certificate(ca, "agent", client=False, addresses=["127.0.0.1"])
    certificates.make_certificate(ca, "worker", client=True)
    port = free_port()
    config = root / "agent.toml"
    config.write_text(AGENT.format(port=port, root=root, ca=ca, loop=server.loops["data"]))
    plans = tmp_path / "plans"
    plans.mkdir()
    (plans / "hall.yaml").write_text(PLAN)

    stack = Stack(
        tmp_path / "stack",
        plans=plans,
        more_settings=SITE.format(ca=ca, root=root, port=port),
        temporal_port=free_port(),
        ui_port=free_port(),
        http_port=free_port(),
    )
    stack.root.mkdir()
    agent = None
    try:
        command = [sys.executable, "-m", "farshore.providers.physical.agent", "--config", str(config)]
        agent = stack.spawn("agent", command)

        def listens() -> bool:
            assert agent is not None and agent.alive, agent.tail() if agent else ""
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        wait_until("the agent", listens)
        stack.start()
        stack.start_worker("hall")
        client = await connect(stack)
        protected = await (await client.protection(ProtectionInput(plan="hall"))).result()
        assert protected.status is RunStatus.SUCCEEDED, protected.model_dump_json(indent=1)

        for number in range(40, 60):
            write(folder, number)
        seen = {point.id for point in await client.points(PointsInput(plan="hall", limit=100))}

        async def two_later() -> bool:
            # The first of two points that were begun after the last write may have been cut before it.
            points = await client.points(PointsInput(plan="hall", limit=100))
            return len([point for point in points if point.id not in seen]) >= 2

        await until("points that hold the last writes", two_later)
        test = await client.failover(FailoverInput(plan="hall", kind=RunKind.TEST, point="latest-processed"))
        result = await test.result()
        assert result.status is RunStatus.SUCCEEDED, result.model_dump_json(indent=1)
        rows = recovered_disks(stack, "db1", "test")
        assert len(rows) == 1
        image = tmp_path / "recovered.img"
        image.write_bytes(stack.azure.disk_path(rows[0].id).read_bytes()[: 48 << 20])
        holds_all_files(image, tmp_path / "back", 60)
    finally:
        server.thaw()
        stack.stop()
        server.thaw()
