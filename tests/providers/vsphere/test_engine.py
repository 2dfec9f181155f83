"""Source and replication engine together, in bad weather: every committed point is what its snapshot froze."""

from __future__ import annotations

import asyncio
import hashlib
import random

from farshore.domain.errors import FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.engine import run_cycle
from farshore.replication.filestore import FileReplicaStore

MIB = 1 << 20

# What happens before a cycle, and whether it makes the cycle a full comparison.
WEATHER = [
    ("calm", lambda c, vm: None, False),
    ("the session dies", lambda c, vm: c.kill_sessions(), False),
    ("connections are cut", lambda c, vm: c.cut_connections(), False),
    ("tracking is reset", lambda c, vm: c.reset_cbt(vm), True),
    (
        "a query is refused",
        lambda c, vm: c.add_fault("QueryChangedDiskAreas", vm=vm, fault="vmodl.fault.InvalidArgument"),
        True,
    ),
    (
        "reads are spoilt",
        lambda c, vm: [
            c.add_fault("GET", stage="folder", vm=vm, action=action, count=2, skip=skip, status=500)
            for skip, action in enumerate(("reset", "short", "status"))
        ],
        False,
    ),
    (
        "the answer of the snapshot is lost",
        lambda c, vm: c.add_fault("CreateSnapshot_Task", action="drop", when="after", vm=vm),
        False,
    ),
    (
        "the snapshot fails once",
        lambda c, vm: c.add_fault(
            "CreateSnapshot_Task", stage="task", vm=vm, fault="vim.fault.TaskInProgress"
        ),
        False,
    ),
    (
        "the extent is locked for the whole cycle",
        lambda c, vm: c.add_fault("GET", stage="folder", vm=vm, action="status", status=500, count=5),
        False,
    ),
    ("the disk grows", lambda c, vm: c.extend(vm, 1, 10 * MIB), True),
]


async def test_every_committed_point_is_what_its_snapshot_froze(control, machine, site, tmp_path):
    vm = machine(8 * MIB, 8 * MIB, workload={"records_per_second": 100, "churn_bytes_per_second": MIB})
    control.digest_log()
    control.settings(cbt_window=3 * MIB)
    await site.enable_tracking(vm)
    store = FileReplicaStore(tmp_path, durable=False)

    def cycle(source, writer):
        for _ in range(4):  # what the leg would do: the next cycle begins from the last committed point
            try:
                return run_cycle(source, writer, machine=vm, want=Consistency.APPLICATION)
            except FarshoreError as exc:
                if not exc.retryable:
                    raise
        raise AssertionError("no cycle succeeded")

    def run():
        source = site.open_source(vm, vm)
        writer = store.acquire(vm, "test")
        cycle(source, writer)
        points = []
        weather = list(WEATHER)
        random.Random(7).shuffle(weather)
        for name, happens, full in weather:
            happens(control, vm)
            result = cycle(source, writer)
            control.clear_faults()
            assert result.full == full, (name, result.reason)
            assert not result.release_error
            points.append((name, result))
        for name, result in points:
            frozen = {
                d["disk"]: d["sha256"] for d in control.digests(vm, result.manifest.cut)
            }  # the last one wins
            for disk in result.manifest.disks:
                reader = store.read_point(vm, result.point.id, disk.state.key)
                digest = hashlib.sha256(reader.read(0, reader.size)).hexdigest()
                assert digest == frozen[int(disk.state.key)], (name, disk.state)
        assert {r.manifest.consistency for _, r in points} == {Consistency.FILE_SYSTEM}
        writer.close()

    await asyncio.to_thread(run)
    assert control.vm(vm)["snapshots"] == []
