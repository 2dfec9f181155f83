"""Cycles against the laboratory: what arrives is what the snapshot froze, byte for byte."""

from __future__ import annotations

import asyncio

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.ports import Severity
from farshore.providers.vsphere import source as module
from farshore.providers.vsphere.client import Client
from farshore.providers.vsphere.snapshots import Snapshots
from farshore.replication.engine import run_cycle
from farshore.replication.filestore import FileReplicaStore
from farshore.replication.ports import Extent

MIB = 1 << 20


async def test_a_full_and_several_delta_cycles_are_equal_to_the_frozen_disks(control, machine, replica_of):
    vm = machine(8 * MIB, 5 * MIB + 512 * 3)
    control.guest_fill(vm, 0, 0, 3 * MIB, seed=1)
    replica = await replica_of(vm)

    def run():
        assert replica.cycle_and_check(control, vm) == 13 * MIB + 512 * 3
        for n in range(3):
            control.guest_write(vm, 0, n * 2 * MIB + 5, b"x" * 70_000)
            control.guest_fill(vm, 1, 5 * MIB + 512 * 3 - 700, 700, seed=n)
            assert replica.cycle_and_check(control, vm) < MIB
        assert replica.cycle_and_check(control, vm) == 0

    await asyncio.to_thread(run)
    assert control.vm(vm)["snapshots"] == []


async def test_a_machine_that_writes_all_the_time_is_frozen_at_one_instant(control, machine, replica_of):
    vm = machine(8 * MIB, 8 * MIB, workload={"records_per_second": 200, "churn_bytes_per_second": 4 * MIB})
    replica = await replica_of(vm)

    def run():
        for _ in range(3):
            replica.cycle_and_check(control, vm)

    await asyncio.to_thread(run)


async def test_answers_in_small_windows_are_put_together(control, machine, replica_of):
    vm = machine(8 * MIB)
    replica = await replica_of(vm)
    await asyncio.to_thread(replica.cycle_and_check, control, vm)
    for window in (65536, 3 * 65536, 8 * MIB, 0):
        control.settings(cbt_window=window)
        control.clear_requests()
        control.guest_write(vm, 0, 65536 - 10, b"y" * 20)  # crosses a window's edge
        control.guest_write(vm, 0, 8 * MIB - 1, b"z")
        shipped = await asyncio.to_thread(replica.cycle_and_check, control, vm)
        assert shipped == 3 * 65536
        if window == 65536:
            assert len(control.requests("QueryChangedDiskAreas")) == 128


async def test_the_first_copy_reads_the_whole_extent(control, machine, replica_of):
    vm = machine(4 * MIB)
    replica = await replica_of(vm)

    def run():
        cut = replica.cut()
        try:
            return list(cut.changed("2000", None))
        finally:
            cut.release()

    assert await asyncio.to_thread(run) == [Extent(0, 4 * MIB)]
    assert control.requests("QueryChangedDiskAreas") == []


async def test_the_identity_is_stable_and_the_change_id_moves(control, machine, replica_of):
    vm = machine()
    replica = await replica_of(vm)

    def run():
        for _ in range(3):
            cut = replica.cut()
            seen.append(cut.disks[0])
            cut.release()

    seen = []
    await asyncio.to_thread(run)
    assert len({(s.identity, s.size, s.key) for s in seen}) == 1
    assert len({s.tracker for s in seen}) == 3
    assert seen[0].boot


async def test_a_powered_off_machine_is_replicated_as_well(control, machine, replica_of):
    vm = machine(power="poweredOff")
    replica = await replica_of(vm)

    def run():
        replica.cycle_and_check(control, vm)
        control.power_on(vm)
        control.guest_fill(vm, 0, MIB, MIB, seed=3)
        control.power_off(vm)
        assert 0 < replica.cycle_and_check(control, vm) <= 2 * MIB

    await asyncio.to_thread(run)


async def test_a_cut_tells_whether_the_machine_was_off(control, machine, replica_of, monkeypatch):
    vm = machine()
    replica = await replica_of(vm)

    def cut_off():
        cut = replica.cut()
        cut.release()
        return cut.powered_off

    create = Snapshots.create

    def meanwhile(happens):
        def creating(self, *args, **options):
            node = create(self, *args, **options)
            happens(vm)
            return node

        monkeypatch.setattr(Snapshots, "create", creating)

    def run():
        assert not cut_off()
        meanwhile(control.power_off)
        assert not cut_off()
        monkeypatch.setattr(Snapshots, "create", create)
        assert cut_off()
        meanwhile(control.power_on)
        assert not cut_off()
        monkeypatch.setattr(Snapshots, "create", create)
        control.power_off(vm)
        read = Client.read

        def stale(self, reference, paths, **rest):
            values = read(self, reference, paths, **rest)
            lost = "runtime.connectionState" in values and len(paths) == 2
            return values | ({"runtime.connectionState": "disconnected"} if lost else {})

        monkeypatch.setattr(Client, "read", stale)
        assert not cut_off()

    await asyncio.to_thread(run)


async def test_a_final_point_of_a_running_machine_is_refused(control, machine, site, tmp_path):
    vm = machine()
    store = FileReplicaStore(tmp_path, durable=False)

    def run():
        source, writer = site.open_source("m", vm), store.acquire("m", "test")
        with pytest.raises(FarshoreError, match="was not off") as caught:
            run_cycle(source, writer, machine="m", want=Consistency.CRASH, final=True)
        assert (caught.value.code, caught.value.retryable) == (Code.FENCE_NOT_PROVEN, False)
        assert control.vm(vm)["snapshots"] == [] and store.points("m") == []
        control.power_off(vm)
        assert run_cycle(source, writer, machine="m", want=Consistency.CRASH, final=True).point.final

    await asyncio.to_thread(run)


async def test_over_reported_areas_are_harmless(control, machine, replica_of):
    vm = machine()
    control.settings(defect_over_report=True)
    replica = await replica_of(vm)

    def run():
        replica.cycle_and_check(control, vm)
        control.guest_write(vm, 0, 0, b"first")
        control.guest_write(vm, 0, 8 * MIB - 4, b"last")
        assert replica.cycle_and_check(control, vm) > 0

    await asyncio.to_thread(run)


async def test_an_independent_disk_is_left_out(control, machine, replica_of):
    vm = machine(4 * MIB, {"size": 4 * MIB, "mode": "independent_persistent"})
    replica = await replica_of(vm)

    def run():
        cut = replica.cut()
        cut.release()
        return [state.key for state in cut.disks]

    assert await asyncio.to_thread(run) == ["2000"]


async def test_a_disk_that_became_independent_is_shown_as_not_protected(control, machine, replica_of, site):
    vm = machine(4 * MIB, {"size": 4 * MIB, "label": "Data"})
    replica = await replica_of(vm)
    await asyncio.to_thread(replica.cycle_and_check, control, vm)
    assert (await site.inspect(vm)).findings == ()
    control.power_off(vm)
    control.set_disk(vm, 1, mode="independent_persistent")
    control.power_on(vm)
    seen = await site.inspect(vm)
    assert [(d.label, d.eligible) for d in seen.disks] == [("Hard disk 1", True), ("Data", False)]
    assert "independent" in seen.disks[1].reason

    def left_out():
        cut = replica.cut()
        cut.release()
        return cut.left_out

    assert (
        "independent" in (await asyncio.to_thread(left_out))["2001"]
    )  # the engine refuses to go on without it
    warning = next(f for f in seen.findings if "Data" in f.message)
    assert warning.severity is Severity.WARNING and "is not protected" in warning.message


async def test_the_label_says_what_was_achieved(control, machine, site):
    linux = machine()
    windows = machine(guest_id="windows2019srv_64Guest")
    bare = machine(tools="notRunning")
    failing = machine()
    control.add_fault(
        "CreateSnapshot_Task",
        stage="task",
        vm=failing,
        fault="vim.fault.ApplicationQuiesceFault",
        message="VSS.",
    )
    expected = [
        (linux, Consistency.APPLICATION, Consistency.FILE_SYSTEM),
        (linux, Consistency.FILE_SYSTEM, Consistency.FILE_SYSTEM),
        (linux, Consistency.CRASH, Consistency.CRASH),
        (windows, Consistency.APPLICATION, Consistency.APPLICATION),
        (bare, Consistency.APPLICATION, Consistency.CRASH),
        (failing, Consistency.APPLICATION, Consistency.CRASH),
    ]

    def run():
        for n, (vm, want, achieved) in enumerate(expected):
            cut = site.open_source("m", vm).cut(f"farshore-m-1-{n}", want=want)
            cut.release()
            assert (vm, want, cut.consistency) == (vm, want, achieved)

    await asyncio.to_thread(run)
    assert control.vm(failing)["snapshots"] == []


async def test_several_machines_replicate_at_once_over_one_session(control, machine, replica_of, site):
    replicas = {}
    for _ in range(4):
        vm = machine(8 * MIB, workload={"records_per_second": 50})
        replicas[vm] = await replica_of(vm)

    def run(vm):
        for _ in range(2):
            replicas[vm].cycle_and_check(control, vm)

    await asyncio.gather(*(asyncio.to_thread(run, vm) for vm in replicas))
    assert len([s for s in control.sessions() if "pyvmomi" in s["agent"].lower()]) == 1


async def test_a_session_leaves_no_views_filters_or_collectors(control, machine, replica_of, site):
    vm = machine()
    replica = await replica_of(vm)
    await asyncio.to_thread(replica.cycle_and_check, control, vm)
    mine = [s for s in control.sessions() if s["calls"]]
    assert [(s["views"], s["filters"], s["collectors"]) for s in mine] == [(0, 0, 0)]
    await site.close()
    assert control.sessions() == []


async def test_reading_the_live_list_instead_of_the_frozen_one_would_be_noticed(
    control, machine, replica_of, monkeypatch
):
    """A mutant: paths of the machine's own device list. The live link is refused, so nothing wrong is shipped."""
    vm = machine()
    replica = await replica_of(vm)
    original = module.VSphereSource._freeze

    def mutant(self, machine, node):
        live = type(node)(
            **{f: getattr(node, f) for f in node.__slots__} | {"reference": machine.entry.reference}
        )
        return original(self, machine, live)

    monkeypatch.setattr(module.VSphereSource, "_freeze", mutant)

    def run():
        try:
            replica.cycle_and_check(control, vm)
        except module.FarshoreError as exc:
            return exc.code
        return None

    assert await asyncio.to_thread(run) is module.Code.SOURCE_NOT_ELIGIBLE
    assert control.vm(vm)["snapshots"] == []


async def test_change_ids_of_the_live_links_would_lose_writes(control, machine, replica_of, monkeypatch):
    """A mutant: the change id of the machine's own list is one too new, and the writes since the cut are lost."""
    vm = machine()
    replica = await replica_of(vm)
    original = module.state_of

    def mutant(device, **rest):
        epoch, _, number = device.backing.changeId.rpartition("/")
        device.backing.changeId = f"{epoch}/{int(number) + 1}"
        return original(device, **rest)

    def run():
        monkeypatch.setattr(module, "state_of", mutant)
        cut = replica.cut()
        replica.copy(cut)
        control.guest_write(vm, 0, 0, b"written under the snapshot")
        cut.release()
        with pytest.raises(AssertionError):
            replica.cycle_and_check(control, vm)

    await asyncio.to_thread(run)
