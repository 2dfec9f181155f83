"""Fault rules: before and after the work, dropped answers, tasks that fail, hang or crawl."""

from __future__ import annotations

import http.client
import time
from typing import Any

import pytest
from pyVmomi import vim, vmodl

from .conftest import MIB, Client, eventually


@pytest.fixture
def vm(client: Client, control: Any) -> Any:
    control.create_vm("web", [16 * MIB])
    control.create_vm("app", [16 * MIB])
    return client.vm("web")


def test_a_fault_before_the_work_leaves_nothing_done(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("CreateSnapshot_Task", fault="vim.fault.TaskInProgress", vm="web", message="busy")
    with pytest.raises(vim.fault.TaskInProgress, match="busy"):
        vm.CreateSnapshot_Task("x", "", False, False)
    assert vm.snapshot is None
    client.snapshot(vm)
    assert control.faults()[0]["hits"] == 1


def test_a_rule_counts_skips_and_keeps_to_its_machine(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("Fetch", fault="vmodl.fault.HostCommunication", vm="web", count=2, skip=1)
    app = client.vm("app")
    control.clear_faults()
    control.add_fault("Fetch", fault="vmodl.fault.HostCommunication", vm="web", count=2, skip=1)
    outcomes = []
    for _ in range(5):
        assert app.name == "app"
        try:
            outcomes.append(vm.name)
        except vmodl.fault.HostCommunication:
            outcomes.append("fault")
    assert outcomes == ["web", "fault", "fault", "web", "web"]


def test_chance_is_seeded(client: Client, control: Any, vm: Any) -> None:
    def run() -> list[bool]:
        control.clear_faults()
        control.add_fault("Fetch", vm="web", count=None, probability=0.5, seed=4)
        outcomes = []
        for _ in range(20):
            try:
                _ = vm.name
                outcomes.append(True)
            except vmodl.fault.SystemError:
                outcomes.append(False)
        return outcomes

    first = run()
    assert first == run()
    assert True in first
    assert False in first


def test_a_lost_answer_means_the_work_was_done(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("CreateSnapshot_Task", action="drop", when="after", vm="web")
    with pytest.raises((http.client.HTTPException, OSError)):
        vm.CreateSnapshot_Task("lost", "", False, False)
    eventually(lambda: vm.snapshot, "the snapshot")
    assert vm.snapshot.rootSnapshotList[0].name == "lost"


def test_a_dropped_request_means_nothing_was_done(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("CreateSnapshot_Task", action="drop", when="before", vm="web")
    with pytest.raises((http.client.HTTPException, OSError)):
        vm.CreateSnapshot_Task("x", "", False, False)
    assert vm.snapshot is None


def test_an_http_status_instead_of_soap(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("Fetch", action="status", status=503, vm="web")
    with pytest.raises(Exception, match="503"):
        _ = vm.name


def test_a_delay(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("Fetch", action="delay", delay=0.3, vm="web")
    begin = time.monotonic()
    assert vm.name == "web"
    assert time.monotonic() - begin >= 0.3


def test_a_task_fails_on_its_way_or_after_its_work(client: Client, control: Any, vm: Any) -> None:
    control.add_fault(
        "CreateSnapshot_Task",
        stage="task",
        fault="vim.fault.NoDiskSpace",
        percent=30,
        fields={"file": "[ds1] web/web-000001.vmdk", "datastore": "ds1"},
    )
    with pytest.raises(vim.fault.NoDiskSpace) as caught:
        client.snapshot(vm)
    assert caught.value.datastore == "ds1"
    assert vm.snapshot is None
    control.add_fault("CreateSnapshot_Task", stage="task", when="after")
    with pytest.raises(vmodl.fault.SystemError):
        client.snapshot(vm)
    assert vm.snapshot is not None


def test_a_stuck_task_blocks_the_machine_until_it_is_cancelled(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("PowerOffVM_Task", stage="task", action="stuck", percent=40)
    stuck = vm.PowerOffVM_Task()
    eventually(lambda: stuck.info.progress == 40, "progress")
    with pytest.raises(vim.fault.TaskInProgress):
        client.snapshot(vm)
    assert stuck in client.content.taskManager.recentTask
    assert stuck in vm.recentTask
    stuck.CancelTask()
    with pytest.raises(vmodl.fault.RequestCanceled):
        client.wait(stuck)
    assert vm.runtime.powerState == "poweredOn"
    client.snapshot(vm)


def test_a_slow_task_shows_progress(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("PowerOffVM_Task", stage="task", action="delay", delay=10)
    task = vm.PowerOffVM_Task()
    eventually(lambda: 0 < (task.info.progress or 0) < 100, "progress")
    task.CancelTask()
    with pytest.raises(vmodl.fault.RequestCanceled):
        client.wait(task)


def test_a_defect_of_the_laboratory_is_a_fault_too(client: Client, lab: Any, vm: Any) -> None:
    lab.machine("web").nics = None
    with pytest.raises(vmodl.fault.SystemError, match="general system error"):
        _ = vm.network


def test_the_request_log_tells_what_happened(client: Client, control: Any, vm: Any) -> None:
    control.clear_requests()
    _ = vm.name
    client.request("GET", "web/web-flat.vmdk", Range="bytes=0-1")
    fetch, get = control.requests()[-2:]
    assert (fetch["method"], fetch["target"], fetch["outcome"]) == ("Fetch", "web", "ok")
    assert (get["method"], get["target"], get["outcome"]) == ("GET", "web", "500")
