"""The property collector: pages, paths, updates, cancellation, truncation, lost answers."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from pyVmomi import vim, vmodl

from .conftest import MIB, PC, Client, eventually


def machines(client: Client, paths: list[str]) -> Any:
    view = client.content.viewManager.CreateContainerView(
        client.content.rootFolder, [vim.VirtualMachine], True
    )
    step = PC.TraversalSpec(name="v", path="view", type=vim.view.ContainerView)
    return PC.FilterSpec(
        objectSet=[PC.ObjectSpec(obj=view, skip=True, selectSet=[step])],
        propSet=[PC.PropertySpec(type=vim.VirtualMachine, pathSet=paths)],
    )


def one(obj: Any, *paths: str) -> Any:
    return PC.FilterSpec(
        objectSet=[PC.ObjectSpec(obj=obj)], propSet=[PC.PropertySpec(type=type(obj), pathSet=list(paths))]
    )


@pytest.fixture
def collector(client: Client) -> Any:
    return client.content.propertyCollector


def test_results_come_in_pages_and_a_token_is_good_once(client: Client, control: Any, collector: Any) -> None:
    for number in range(7):
        control.create_vm(f"vm{number}", [MIB], power="poweredOff")
    spec = machines(client, ["name", "config.hardware.device", "runtime.powerState"])
    page = collector.RetrievePropertiesEx([spec], PC.RetrieveOptions(maxObjects=3))
    first = page.token
    sizes, names = [], []
    while True:
        sizes.append(len(page.objects))
        names += [p.val for o in page.objects for p in o.propSet if p.name == "name"]
        if not page.token:
            break
        page = collector.ContinueRetrievePropertiesEx(page.token)
    assert sizes == [3, 3, 1]
    assert sorted(names) == [f"vm{n}" for n in range(7)]
    with pytest.raises(vmodl.fault.InvalidArgument):
        collector.ContinueRetrievePropertiesEx(first)


def test_paths_reach_into_values_and_keys(client: Client, control: Any, collector: Any) -> None:
    control.create_vm("web", [16 * MIB], num_cpu=3)
    vm = client.vm("web")
    paths = [
        "config.hardware.numCPU",
        "config.hardware.device[2000].backing.fileName",
        "guest.ipAddress",
        "snapshot",
    ]
    content = collector.RetrieveProperties([one(vm, *paths)])[0]
    values = {p.name: p.val for p in content.propSet}
    assert values[paths[0]] == 3
    assert values[paths[1]] == "[ds1] web/web.vmdk"
    assert values["guest.ipAddress"].startswith("10.")
    assert "snapshot" not in values
    for bad in ("nonsense", "config.nonsense", "name.more"):
        with pytest.raises(vmodl.query.InvalidProperty):
            collector.RetrieveProperties([one(vm, bad)])


def test_a_vanished_object_is_not_found(client: Client, control: Any, collector: Any) -> None:
    control.create_vm("web", [16 * MIB])
    vm = client.vm("web")
    control.destroy_vm("web")
    with pytest.raises(vmodl.fault.ManagedObjectNotFound):
        collector.RetrieveProperties([one(vm, "name")])


def test_updates_tell_what_changed_and_nothing_else(client: Client, control: Any, collector: Any) -> None:
    control.create_vm("web", [16 * MIB])
    control.create_vm("app", [16 * MIB])
    handle = collector.CreateFilter(machines(client, ["name", "runtime.powerState"]), False)
    first = collector.WaitForUpdatesEx("", PC.WaitOptions(maxWaitSeconds=5))
    assert [u.kind for u in first.filterSet[0].objectSet] == ["enter", "enter"]
    control.power_off("web")
    control.create_vm("new", [16 * MIB], power="poweredOff")
    control.destroy_vm("app")
    seen: dict[str, Any] = {}
    version = first.version
    while update := collector.WaitForUpdatesEx(version, PC.WaitOptions(maxWaitSeconds=0)):
        version = update.version
        for change in update.filterSet[0].objectSet:
            seen[change.kind] = {c.name: c.val for c in change.changeSet}
    assert seen["modify"] == {"runtime.powerState": "poweredOff"}
    assert seen["enter"] == {"name": "new", "runtime.powerState": "poweredOff"}
    assert seen["leave"] == {}
    handle.DestroyPropertyFilter()


def test_a_wait_ends_after_its_seconds_with_nothing(client: Client, control: Any, collector: Any) -> None:
    control.create_vm("web", [16 * MIB])
    collector.CreateFilter(one(client.vm("web"), "name"), False)
    version = collector.WaitForUpdatesEx("", None).version
    begin = time.monotonic()
    assert collector.WaitForUpdatesEx(version, PC.WaitOptions(maxWaitSeconds=1)) is None
    assert time.monotonic() - begin >= 0.9


def test_a_lost_answer_can_be_asked_for_again(client: Client, control: Any, collector: Any) -> None:
    control.create_vm("web", [16 * MIB])
    collector.CreateFilter(one(client.vm("web"), "runtime.powerState"), False)
    first = collector.WaitForUpdatesEx("", None)
    control.power_off("web")
    for _ in range(2):
        again = collector.WaitForUpdatesEx(first.version, PC.WaitOptions(maxWaitSeconds=5))
        assert again.filterSet[0].objectSet[0].changeSet[0].val == "poweredOff"
    with pytest.raises(vmodl.query.InvalidCollectorVersion):
        collector.WaitForUpdatesEx("99", None)


def test_large_updates_come_truncated(client: Client, control: Any, collector: Any) -> None:
    for number in range(5):
        control.create_vm(f"vm{number}", [MIB], power="poweredOff")
    collector.CreateFilter(machines(client, ["name"]), False)
    options = PC.WaitOptions(maxWaitSeconds=0, maxObjectUpdates=2)
    version, sizes = "", []
    while update := collector.WaitForUpdatesEx(version, options):
        sizes.append((len(update.filterSet[0].objectSet), update.truncated))
        version = update.version
    assert sizes == [(2, True), (2, True), (1, False)]


def test_a_wait_can_be_cancelled_from_another_thread(client: Client, control: Any) -> None:
    control.create_vm("web", [16 * MIB])
    own = client.content.propertyCollector.CreatePropertyCollector()
    own.CreateFilter(one(client.vm("web"), "name"), False)
    version = own.WaitForUpdatesEx("", None).version
    caught: list[Exception] = []

    def wait() -> None:
        try:
            own.WaitForUpdatesEx(version, PC.WaitOptions(maxWaitSeconds=30))
        except vmodl.MethodFault as fault:
            caught.append(fault)

    control.clear_requests()
    thread = threading.Thread(target=wait)
    thread.start()
    while not caught:
        own.CancelWaitForUpdates()  # cancels only a wait that is under way: repeat until it was
        time.sleep(0.02)
    thread.join(60)
    assert [type(c) for c in caught] == [vmodl.fault.RequestCanceled]
    own.DestroyPropertyCollector()
    with pytest.raises(vmodl.fault.ManagedObjectNotFound):
        own.CheckForUpdates("")


def test_a_task_can_be_followed_to_its_end(client: Client, control: Any) -> None:
    control.create_vm("web", [16 * MIB])
    control.settings(task_seconds={"PowerOffVM_Task": 0.6})
    task = client.vm("web").PowerOffVM_Task()
    own = client.content.propertyCollector.CreatePropertyCollector()
    own.CreateFilter(one(task, "info.state", "info.progress"), False)
    version, states, progress = "", [], []
    while "success" not in states:
        update = own.WaitForUpdatesEx(version, PC.WaitOptions(maxWaitSeconds=10))
        version = update.version
        for change in update.filterSet[0].objectSet[0].changeSet:
            (states if change.name == "info.state" else progress).append(change.val)
    assert states[-1] == "success"
    assert progress == sorted(progress)
    assert len(progress) > 1
    assert client.vm("web").runtime.powerState == "poweredOff"


def test_what_a_session_leaves_open_is_seen_and_goes_with_it(
    client: Client, control: Any, collector: Any
) -> None:
    control.create_vm("web", [16 * MIB])
    collector.CreateFilter(machines(client, ["name"]), False)
    collector.CreatePropertyCollector()
    leaks = control.leaks()["sessions"][0]
    assert (leaks["views"], leaks["filters"], leaks["collectors"]) == (1, 1, 1)
    client.content.sessionManager.Logout()
    eventually(lambda: control.leaks()["open_sessions"] == 0, "the session's end")
