"""Sessions die, answers get lost, servers are killed: nothing is doubled, nothing wrong is handed out, nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.lab.vcenter import DEFAULT_PASSWORD, DEFAULT_USER, VCenterControl
from farshore.providers.vsphere import VSphereSettings, VSphereSite, source
from farshore.providers.vsphere.snapshots import Snapshots
from farshore.providers.vsphere.transport import PinnedConnection

from .conftest import leave

MIB = 1 << 20
CRASH = Consistency.CRASH


@contextlib.contextmanager
def failing(code, says="."):
    with pytest.raises(FarshoreError, match=says) as caught:
        yield caught
    assert caught.value.code is code, caught.value


def names(control, vm):
    return control.vm(vm)["snapshots"]


def calls(control, method):
    return len(control.requests(method))


# -- sessions --------------------------------------------------------------------------------------------------------


async def test_a_session_killed_in_the_middle_of_a_read_is_renewed_once(
    control, machine, replica_of, site_of
):
    vm = machine()
    control.guest_fill(vm, 0, 0, 8 * MIB, seed=2)
    replica = await replica_of(vm)
    control.clear_requests()

    def run():
        cut = replica.cut()
        parts = []
        for n in range(16):
            if n in (3, 9):
                control.kill_sessions()
            parts.append(cut.read("2000", n * MIB // 2, MIB // 2))
        replica.disks["2000"] = bytearray(b"".join(parts))
        assert replica.digest("2000") == control.sha256(vm, 2000, cut.name)
        cut.release()

    await asyncio.to_thread(run)
    assert calls(control, "Login") == 2


async def test_a_session_killed_while_a_task_runs_does_not_disturb_the_task(control, machine, site):
    vm = machine()
    control.settings(task_seconds={"CreateSnapshot_Task": 1.5})
    source = site.open_source("m", vm)

    def run():
        killer = threading.Timer(0.7, control.kill_sessions)
        killer.start()
        cut = source.cut("farshore-m-1-1", want=CRASH)
        killer.join()
        assert names(control, vm) == ["farshore-m-1-1"]
        cut.release()

    await asyncio.to_thread(run)
    assert calls(control, "CreateSnapshot_Task") == 1
    assert names(control, vm) == []


async def test_many_threads_that_find_the_session_gone_log_in_once(control, machine, site):
    vm = machine()
    await site.inspect(vm)
    control.clear_requests()
    control.kill_sessions()
    await asyncio.gather(*(site.inspect(vm) for _ in range(8)))
    assert calls(control, "Login") == 1


async def test_a_late_answer_to_the_old_session_does_not_spoil_the_new_one(
    control, machine, site, monkeypatch
):
    """A real vCenter hands a new cookie to every request without a living session, pyVmomi keeps the last one."""
    vm = machine()
    await site.inspect(vm)
    original, turn = PinnedConnection.getresponse, threading.Lock()

    def getresponse(self):
        response = original(self)
        if response.status == 500:  # NotAuthenticated
            response.headers["Set-Cookie"] = 'vmware_soap_session="stray"'
            if turn.acquire(blocking=False):  # the first one arrives after another thread has logged in
                deadline = time.monotonic() + 10
                while site._client.generation == 1:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
        return response

    monkeypatch.setattr(PinnedConnection, "getresponse", getresponse)
    control.clear_requests()
    control.kill_sessions()
    await asyncio.gather(site.inspect(vm), site.inspect(vm))
    assert calls(control, "Login") == 1
    assert site._client.cookie() != 'vmware_soap_session="stray"'


async def test_a_long_silence_is_bridged_by_keep_alive(control, machine, site_of):
    vm = machine()
    site = site_of(keep_alive=0.05)
    await site.inspect(vm)
    control.clear_requests()

    def hours_pass():
        for _ in range(4):
            control.advance_clock(1000)  # sessions end after 1800 seconds without use
            seen = calls(control, "RetrievePropertiesEx")
            deadline = time.monotonic() + 10
            while calls(control, "RetrievePropertiesEx") == seen:
                assert time.monotonic() < deadline

    await asyncio.to_thread(hours_pass)
    await site.inspect(vm)
    assert calls(control, "Login") == 0


async def test_an_expired_session_is_renewed(control, machine, site):
    vm = machine()
    await site.inspect(vm)
    control.advance_clock(3600)
    assert (await site.inspect(vm)).name == vm


async def test_a_wrong_password_is_access_denied_and_not_tried_by_everybody(control, machine, site_of):
    vm = machine()
    site = site_of(password="wrong")
    control.clear_requests()
    results = await asyncio.gather(*(site.inspect(vm) for _ in range(4)), return_exceptions=True)
    assert [r.code for r in results] == [Code.ACCESS_DENIED] * 4
    assert all("wrong" not in str(r) for r in results)
    assert calls(control, "Login") == 1


async def test_a_missing_privilege_is_named(control, machine, site):
    vm = machine()
    control.deny("CreateSnapshot_Task", vm=vm)
    source = site.open_source("m", vm)
    with failing(Code.ACCESS_DENIED, "VirtualMachine.State.CreateSnapshot|CreateSnapshot"):
        await asyncio.to_thread(source.cut, "farshore-m-1-1", want=CRASH)


# -- bytes -----------------------------------------------------------------------------------------------------------

SPOILT = [
    {"action": "short", "percent": 40},
    {"action": "reset", "percent": 40},
    {"action": "drop"},
    {"action": "status", "status": 500},
    {"action": "status", "status": 503},
]


@pytest.mark.parametrize("rule", SPOILT, ids=lambda r: str(r.get("status", r["action"])))
async def test_spoilt_answers_cost_a_repeat_and_no_byte(control, machine, replica_of, rule):
    vm = machine()
    control.guest_fill(vm, 0, 0, 8 * MIB, seed=4)
    replica = await replica_of(vm)
    control.add_fault("GET", stage="folder", vm=vm, count=3, skip=1, **rule)  # the descriptor passes
    await asyncio.to_thread(replica.cycle_and_check, control, vm)
    assert control.faults()[0]["hits"] == 3


async def test_an_extent_that_stays_locked_fails_the_read_and_can_be_retried(control, machine, replica_of):
    vm = machine()
    replica = await replica_of(vm)

    def run():
        cut = replica.cut()
        control.hold_extent(vm, 0)
        with failing(Code.SOURCE_READ_FAILED, "locked") as caught:
            cut.read("2000", 0, MIB)
        assert caught.value.retryable
        control.hold_extent(vm, 0, held=False)
        assert len(cut.read("2000", 0, MIB)) == MIB
        cut.release()

    await asyncio.to_thread(run)


async def test_bytes_read_after_somebody_removed_the_snapshot_are_not_confirmed(
    control, machine, replica_of, monkeypatch
):
    vm = machine(power="poweredOff")  # its extent stays readable, so that only the check can notice
    replica = await replica_of(vm)

    def run():
        cut = replica.cut()
        assert cut.read("2000", 0, 512) == bytes(512)
        cut.confirm()
        control.remove_snapshot(vm, cut.name)
        control.power_on(vm)
        control.guest_write(vm, 0, 0, b"newer than the cut")
        control.power_off(vm)
        assert cut.read("2000", 0, 512).startswith(b"newer"), "the lie that confirm is there for"
        with failing(Code.SOURCE_READ_FAILED, "vanished"):
            cut.confirm()
        monkeypatch.setattr(source, "_ASK_EVERY", 0.0)  # a long copy notices on its way
        with failing(Code.SOURCE_READ_FAILED, "vanished"):
            cut.read("2000", 0, 512)
        cut.release()

    await asyncio.to_thread(run)


async def test_a_range_outside_the_disk_is_a_mistake_of_the_caller(control, machine, replica_of):
    replica = await replica_of(machine())

    def run():
        cut = replica.cut()
        for offset, length in ((-1, 10), (8 * MIB - 5, 10), (0, -1)):
            with pytest.raises(ValueError, match="outside"):
                cut.read("2000", offset, length)
        cut.release()

    await asyncio.to_thread(run)


# -- lost answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("seconds", [0.0, 0.8])
async def test_a_lost_answer_of_create_snapshot_makes_no_second_snapshot(
    control, machine, site, when, seconds
):
    vm = machine()
    control.settings(task_seconds={"CreateSnapshot_Task": seconds})
    control.add_fault("CreateSnapshot_Task", action="drop", when=when, vm=vm)
    source = site.open_source("m", vm)

    def run():
        cut = source.cut("farshore-m-1-1", want=CRASH)
        assert names(control, vm) == ["farshore-m-1-1"]
        assert len(cut.read("2000", 0, 512)) == 512
        cut.release()

    await asyncio.to_thread(run)
    assert calls(control, "CreateSnapshot_Task") == (1 if when == "after" else 2)
    assert names(control, vm) == []


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_lost_answer_of_remove_snapshot_still_ends_without_snapshot(control, machine, site, when):
    vm = machine()
    control.add_fault("RemoveSnapshot_Task", action="drop", when=when, vm=vm)
    source = site.open_source("m", vm)

    def run():
        cut = source.cut("farshore-m-1-1", want=CRASH)
        cut.release()
        cut.release()

    await asyncio.to_thread(run)
    assert names(control, vm) == []


async def test_release_of_a_snapshot_that_somebody_removed_is_fine(control, machine, site):
    vm = machine()

    def run():
        cut = site.open_source("m", vm).cut("farshore-m-1-1", want=CRASH)
        control.remove_snapshot(vm, "farshore-m-1-1")
        cut.release()

    await asyncio.to_thread(run)


async def test_release_works_after_the_session_was_killed(control, machine, site):
    vm = machine()

    def run():
        cut = site.open_source("m", vm).cut("farshore-m-1-1", want=CRASH)
        control.kill_sessions()
        cut.release()

    await asyncio.to_thread(run)
    assert names(control, vm) == []


# -- predecessors ----------------------------------------------------------------------------------------------------


async def test_reap_removes_what_a_dead_predecessor_left_and_nothing_else(control, machine, site):
    vm = machine()
    control.snapshot(vm, "before patch")
    await asyncio.to_thread(leave, site, vm, "farshore-m-1-1", "farshore-m-1-2")
    source = site.open_source("m", vm)
    assert sorted(await asyncio.to_thread(source.reap)) == ["farshore-m-1-1", "farshore-m-1-2"]
    assert names(control, vm) == ["before patch"]
    assert await asyncio.to_thread(source.reap) == []


PEOPLES = ["farshore-before-patch", "farshore-m-1-1", "farshore-enable-tracking"]


@pytest.mark.parametrize("name", PEOPLES)
async def test_a_snapshot_of_a_person_that_is_named_like_ours_is_never_removed(control, machine, site, name):
    vm = machine()
    control.snapshot(vm, name)
    source = site.open_source("m", vm)
    assert await asyncio.to_thread(source.reap) == []
    assert await asyncio.to_thread(source.reap, "farshore-m-9-0") == []
    assert await site.reap(vm) == []
    with failing(Code.SOURCE_NOT_ELIGIBLE, f"'{name}'"):
        await asyncio.to_thread(source.cut, "farshore-m-1-1", want=CRASH)
    with failing(Code.SOURCE_NOT_ELIGIBLE, f"'{name}'"):
        await site.enable_tracking(vm)
    assert names(control, vm) == [name]


async def test_every_snapshot_that_we_take_is_recognised_as_ours(control, machine, site, monkeypatch):
    """The creator and the reaper agree: what a worker leaves when it dies at once is removed by the next one."""
    vm = machine()
    monkeypatch.setattr(Snapshots, "remove", lambda self, reference, name: None)  # it dies before
    await site.enable_tracking(vm)
    assert names(control, vm) == ["farshore-enable-tracking"]
    monkeypatch.undo()
    source = site.open_source("m", vm)
    assert await asyncio.to_thread(source.reap, "farshore-m-1-0") == ["farshore-enable-tracking"]
    await asyncio.to_thread(source.cut, "farshore-m-1-1", want=CRASH)
    assert await asyncio.to_thread(source.reap, "farshore-m-2-0") == ["farshore-m-1-1"]
    assert names(control, vm) == []
    with pytest.raises(ValueError, match="farshore-before-patch"):
        await asyncio.to_thread(source.cut, "farshore-before-patch", want=CRASH)


async def test_a_stale_leg_does_not_reap_the_snapshot_of_its_successor(control, machine, site):
    """It slept between taking its epoch and reaping; meanwhile a successor took the next epoch and cut."""
    vm = machine()
    await asyncio.to_thread(leave, site, vm, "farshore-m-5-9", "farshore-m-7-1")
    source = site.open_source("m", vm)
    with failing(Code.SOURCE_BUSY, "newer writer") as caught:
        await asyncio.to_thread(source.reap, "farshore-m-6-0")
    assert caught.value.retryable  # the leg looks at its epoch again, and ends
    assert names(control, vm) == ["farshore-m-5-9", "farshore-m-7-1"]
    assert sorted(await asyncio.to_thread(source.reap, "farshore-m-7-0")) == [
        "farshore-m-5-9",
        "farshore-m-7-1",
    ]


async def test_the_site_reaps_what_an_ended_protection_left_and_is_safe_to_repeat(control, machine, site):
    vm = machine()
    control.snapshot(vm, "before patch")
    await asyncio.to_thread(leave, site, vm, "farshore-m-7-3", "farshore-enable-tracking")
    assert sorted(await site.reap(vm)) == ["farshore-enable-tracking", "farshore-m-7-3"]
    assert await site.reap(vm) == []
    assert names(control, vm) == ["before patch"]


async def test_an_old_snapshot_of_the_same_name_is_never_taken_for_a_new_cut(
    control, machine, replica_of, site
):
    """A final cycle after the shutdown must hold what the guest wrote last."""
    vm = machine()
    replica = await replica_of(vm)
    control.guest_write(vm, 0, 0, b"an old record !")

    def run():
        leave(site, vm, "farshore-m-1-1")
        control.guest_write(vm, 0, 0, b"the last record")
        cut = replica.cut()
        assert cut.name == "farshore-m-1-1"
        assert cut.read("2000", 0, 15) == b"the last record"
        cut.release()

    await asyncio.to_thread(run)


async def test_a_zombie_does_not_touch_the_snapshot_of_a_newer_writer(control, machine, site):
    vm = machine()
    await asyncio.to_thread(leave, site, vm, "farshore-m-7-1")
    source = site.open_source("m", vm)
    with failing(Code.SOURCE_BUSY, "newer writer"):
        await asyncio.to_thread(source.cut, "farshore-m-6-900", want=CRASH)
    assert names(control, vm) == ["farshore-m-7-1"]


async def test_a_creation_that_a_predecessor_started_is_waited_for_and_its_snapshot_removed(
    control, machine, site
):
    vm = machine()
    control.settings(task_seconds={"CreateSnapshot_Task": 1.0})
    client, entry = site._client, await asyncio.to_thread(site._inventory.find, vm)
    create = entry.reference.CreateSnapshot_Task
    await asyncio.to_thread(
        client.call,
        "x",
        lambda: create("farshore-m-1-1", "Farshore replicates m.", False, False),
        reading=False,
    )
    source = site.open_source("m", vm)

    def run():
        cut = source.cut("farshore-m-2-1", want=CRASH)
        assert names(control, vm) == ["farshore-m-2-1"]
        cut.release()

    await asyncio.to_thread(run)
    assert names(control, vm) == []


async def test_another_task_on_the_machine_is_busy_and_retryable(control, machine, site):
    vm = machine()
    control.add_fault("CreateSnapshot_Task", stage="task", vm=vm, fault="vim.fault.TaskInProgress")
    source = site.open_source("m", vm)
    with failing(Code.SOURCE_BUSY) as caught:
        await asyncio.to_thread(source.cut, "farshore-m-1-1", want=CRASH)
    assert caught.value.retryable


async def test_a_failed_creation_is_snapshot_failed_with_the_reason(control, machine, site):
    vm = machine()
    control.add_fault(
        "CreateSnapshot_Task", stage="task", vm=vm, fault="vim.fault.NoDiskSpace", message="No space left.",
        fields={"file": "[ds1] x", "datastore": "ds1"},
    )  # fmt: skip
    source = site.open_source("m", vm)
    with failing(Code.SNAPSHOT_FAILED, "No space left"):
        await asyncio.to_thread(source.cut, "farshore-m-1-1", want=Consistency.APPLICATION)
    assert calls(control, "CreateSnapshot_Task") == 1  # quiescing was not the reason: no second try


async def test_a_creation_that_never_ends_is_given_up(control, machine, site_of):
    vm = machine()
    site = site_of(snapshot_timeout=0.5, settle_timeout=0.5)
    control.add_fault("CreateSnapshot_Task", stage="task", action="stuck", vm=vm)
    source = site.open_source("m", vm)
    with failing(Code.SNAPSHOT_FAILED, "did not finish"):
        await asyncio.to_thread(source.cut, "farshore-m-1-1", want=CRASH)
    with failing(Code.SOURCE_BUSY, "did not finish"):
        await asyncio.to_thread(source.cut, "farshore-m-1-2", want=CRASH)


# -- dead servers ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(root):
    """The laboratory as its own process, which can be killed."""
    command = [sys.executable, "-m", "farshore.lab.vcenter", "--root", str(root)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield child, json.loads(child.stdout.readline())
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


async def test_a_killed_vcenter_is_unreachable_within_seconds_and_reaped_when_it_is_back(tmp_path):
    with process(tmp_path) as (child, ready):
        control = VCenterControl(ready["control"])
        control.create_vm("web", [8 * MIB])
        port = int(ready["sdk"].rsplit(":", 1)[1].split("/")[0])
        settings = VSphereSettings(
            host="127.0.0.1", port=port, user=DEFAULT_USER, password=DEFAULT_PASSWORD, ca_file=ready["ca"]
        )
        site = VSphereSite(settings)
        await site.enable_tracking("web")
        source = site.open_source("m", "web")
        cut = await asyncio.to_thread(source.cut, "farshore-m-1-1", want=CRASH)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        begun = time.monotonic()
        ticks = []
        with failing(Code.SOURCE_UNREACHABLE):
            await asyncio.to_thread(cut.read, "2000", 0, 4 * MIB)
        with failing(Code.SOURCE_UNREACHABLE):
            await asyncio.to_thread(cut.release)
        with failing(Code.SOURCE_UNREACHABLE):
            await site.inspect("web")
        with failing(Code.SOURCE_UNREACHABLE):
            await site.prove_off("web")
        with failing(Code.SOURCE_UNREACHABLE):
            await site.shut_down("web", guest_timeout=30, force=True, checkpoint=ticks.append)
        assert time.monotonic() - begun < 15
    with process(tmp_path):
        assert await asyncio.to_thread(source.reap) == ["farshore-m-1-1"]
        assert (await site.inspect("web")).name == "web"
        await site.close()


async def test_a_vcenter_killed_in_the_middle_of_a_task_is_unreachable(tmp_path):
    with process(tmp_path) as (child, ready):
        control = VCenterControl(ready["control"])
        control.create_vm("web", [8 * MIB])
        control.settings(task_seconds={"CreateSnapshot_Task": 30.0})
        port = int(ready["sdk"].rsplit(":", 1)[1].split("/")[0])
        site = VSphereSite(
            VSphereSettings(
                host="127.0.0.1", port=port, user=DEFAULT_USER, password=DEFAULT_PASSWORD, ca_file=ready["ca"]
            )
        )
        threading.Timer(1.0, child.kill).start()
        begun = time.monotonic()
        with failing(Code.SOURCE_UNREACHABLE):
            await asyncio.to_thread(site.open_source("m", "web").cut, "farshore-m-1-1", want=CRASH)
        assert time.monotonic() - begun < 15
        await site.close()


async def test_closing_twice_and_using_afterwards_is_no_surprise(machine, site):
    vm = machine()
    await site.inspect(vm)
    await site.close()
    await site.close()
    with failing(Code.SOURCE_UNREACHABLE):
        await site.inspect(vm)
