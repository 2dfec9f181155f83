"""The laboratory as a process: it says where it is, and after SIGKILL it comes back as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farshore.lab.vcenter import VCenterControl

from .conftest import MIB, Client, disks, eventually, extent

SIZE = 16 * MIB


class Process:
    def __init__(self, root: Path, *arguments: str) -> None:
        self.root = root
        self.command = [sys.executable, "-m", "farshore.lab.vcenter", "--root", str(root), *arguments]
        self.child: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        self.child = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        self.ready = json.loads(self.child.stdout.readline())
        self.control = VCenterControl(self.ready["control"])
        return self.ready

    def last_acknowledged(self, name: str) -> int:
        """Read outside the laboratory, while it is dead."""
        return int((self.root / "acks" / f"{name}.log").read_text().splitlines()[-1].split()[0])

    def end(self, number: int) -> int:
        assert self.child is not None
        self.child.send_signal(number)
        status = self.child.wait(60)
        assert self.child.stdout is not None
        self.child.stdout.close()
        self.child = None
        return status


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    config = tmp_path / "inventory.yaml"
    config.write_text(
        "credentials: {operator@lab.local: secret}\n"
        "datacenters: [{name: DC0, folder: Europe, datastores: [{name: ds1}]}]\n"
        "vms:\n"
        f"  - {{name: db, disks: [{SIZE}, {SIZE}], networks: [VM Network], power: poweredOn,\n"
        f"     workload: {{records_per_second: 300, churn_bytes_per_second: 2000000, area_size: {MIB}}}}}\n"
    )
    made = Process(tmp_path / "lab", "--config", str(config))
    try:
        yield made
    finally:
        if made.child is not None:
            made.end(signal.SIGKILL)


def connect(ready: dict[str, Any]) -> Client:
    port = int(ready["sdk"].split(":")[2].split("/")[0])
    return Client(None, port, Path(ready["ca"]), "operator@lab.local", "secret").login()


def test_after_sigkill_nothing_acknowledged_is_lost_and_changes_are_still_known(process: Process) -> None:
    ready = process.start()
    control = process.control
    client = connect(ready)
    vm = client.vm("db")
    assert control.vm("db")["path"] == "Europe/DC0/vm/db"
    client.track(vm)
    snapshot = client.snapshot(vm, "first")
    query = "dcPath=Europe/DC0&dsName=ds1"
    replica, known = {}, {}
    for disk in disks(snapshot):
        replica[disk.key] = bytearray(client.read(extent(disk.backing.fileName), 0, SIZE, query=query))
        known[disk.key] = disk.backing.changeId
    chance = random.Random(5)
    for round_ in range(3):
        eventually(lambda least=40 * (round_ + 1): control.vm("db")["last_record"] > least, "records")
        time.sleep(chance.random() / 10)
        process.end(signal.SIGKILL)
        promised = process.last_acknowledged("db")
        assert promised > 40 * (round_ + 1)
        assert process.start() == {**ready, "pid": process.ready["pid"]}
        report = control.verify_ledger("db")
        assert report["intact"], report["problems"]
        assert report["last_number"] >= promised
        numbers = [a["number"] for a in control.acks("db")]
        assert numbers == sorted(set(numbers))
    assert control.vm("db")["power"] == "poweredOn"
    assert control.vm("db")["snapshots"] == ["first"]
    client = connect(process.ready)
    vm = client.vm("db")
    client.remove(vm.snapshot.currentSnapshot)
    snapshot = client.snapshot(vm, "second")
    for disk in disks(snapshot):
        for start, length in client.changed(vm, snapshot, disk.key, known[disk.key], SIZE):
            data = client.read(extent(disk.backing.fileName), start, length, query=query)
            replica[disk.key][start : start + length] = data
        assert replica[disk.key] == client.read(extent(disk.backing.fileName), 0, SIZE, query=query)
    client.close()


def test_a_kill_in_the_middle_of_snapshot_work_leaves_good_disks(process: Process) -> None:
    process.start()
    control = process.control
    chance = random.Random(9)
    for _ in range(4):
        client = connect(process.ready)
        vm = client.vm("db")
        eventually(lambda: control.vm("db")["last_record"] is not None, "the guest")
        for _ in range(chance.randrange(1, 4)):
            snapshot = client.snapshot(vm)
            if chance.random() < 0.7:
                task = snapshot.RemoveSnapshot_Task(removeChildren=False, consolidate=True)
                time.sleep(chance.random() / 50)
                if chance.random() < 0.5:
                    break
                client.wait(task)
        process.end(signal.SIGKILL)
        promised = process.last_acknowledged("db")
        process.start()
        report = control.verify_ledger("db")
        assert report["intact"], report["problems"]
        assert report["last_number"] >= promised
    client = connect(process.ready)
    vm = client.vm("db")
    client.wait(vm.RemoveAllSnapshots_Task())
    client.wait(vm.ConsolidateVMDisks_Task())
    assert not vm.runtime.consolidationNeeded
    assert control.verify_ledger("db")["intact"]
    client.close()


def test_an_orderly_end_and_a_second_start(process: Process) -> None:
    first = process.start()
    process.control.settings(idle_timeout=99, after_crash="poweredOff")
    process.control.guest_write("db", 0, 8 * MIB, b"kept")
    assert process.end(signal.SIGTERM) == 0
    second = process.start()
    assert {k: second[k] for k in ("sdk", "control", "ca", "thumbprint")} == {
        k: first[k] for k in ("sdk", "control", "ca", "thumbprint")
    }
    assert process.control.settings()["idle_timeout"] == 99
    assert process.control.guest_read("db", 0, 8 * MIB, 4) == b"kept"
    assert process.control.vm("db")["power"] == "poweredOff"


def test_a_start_that_cannot_succeed_says_why(tmp_path: Path, process: Process) -> None:
    process.start()
    result = subprocess.run(
        process.command, check=False, capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert result.returncode == 2
    assert "another laboratory runs on" in result.stderr
    assert "Traceback" not in result.stderr
