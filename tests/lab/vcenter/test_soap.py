"""Sessions, faults and the inventory over SOAP: what a client does wrong gets a fault, never a closed connection."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import vim, vmodl

from farshore.lab.vcenter import DEFAULT_USER, VCenterControl
from farshore.lab.vcenter.service import LabVCenter, RootInUseError

from .conftest import MIB, PC, Client, disks, eventually

ENVELOPE = (
    '<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" '
    'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>{}</soapenv:Body></soapenv:Envelope>'
)


def post(lab: LabVCenter, body: Any, **headers: str) -> tuple[int, str]:
    web = http.client.HTTPSConnection(
        "127.0.0.1", lab.port, context=ssl.create_default_context(cafile=lab.ca_file), timeout=60
    )
    try:
        web.request("POST", "/sdk", body, {"SOAPAction": "urn:vim25/7.0", **headers})
        answer = web.getresponse()
        return answer.status, answer.read().decode()
    finally:
        web.close()


@pytest.mark.parametrize(
    ("inner", "fault"),
    [
        ('<Nonsense xmlns="urn:vim25"><_this type="X">y</_this></Nonsense>', "MethodNotFound"),
        (
            '<Login xmlns="urn:vim25"><_this type="SessionManager">SessionManager</_this><x>1</x></Login>',
            "InvalidRequest",
        ),
        ('<CurrentTime xmlns="urn:vim25"></CurrentTime>', "InvalidRequest"),
        ("", "InvalidRequest"),
        (
            '<CurrentTime xmlns="urn:vim25"><_this type="ServiceInstance">gone</_this></CurrentTime>',
            "ManagedObjectNotFound",
        ),
        (
            '<PowerOnVM_Task xmlns="urn:vim25"><_this type="VirtualMachine">vm-1</_this></PowerOnVM_Task>',
            "NotAuthenticated",
        ),
        (
            '<QueryChangedDiskAreas xmlns="urn:vim25"><_this type="VirtualMachine">vm-1</_this>'
            "<deviceKey>many</deviceKey></QueryChangedDiskAreas>",
            "InvalidRequest",
        ),
        ('<CurrentTime xmlns="urn:vim25"><_this type="ServiceInstance">ServiceInstance', "InvalidRequest"),
    ],
)
def test_every_bad_request_gets_a_fault(lab: LabVCenter, inner: str, fault: str) -> None:
    status, text = post(lab, ENVELOPE.format(inner))
    assert status == 500
    assert f'<{fault}Fault xmlns="urn:vim25" xsi:type="{fault}">' in text
    assert "<faultstring>" in text


def test_chunked_requests_are_understood(lab: LabVCenter) -> None:
    body = ENVELOPE.format(
        '<RetrieveServiceContent xmlns="urn:vim25"><_this type="ServiceInstance">ServiceInstance</_this>'
        "</RetrieveServiceContent>"
    ).encode()
    status, text = post(lab, iter([body[:50], body[50:]]))
    assert status == 200
    assert 'xsi:type="ManagedObject"' not in text
    assert "versionId" not in text


def test_a_method_that_the_laboratory_lacks_is_not_supported(client: Client, control: Any) -> None:
    control.create_vm("web", [16 * MIB])
    with pytest.raises(vmodl.fault.NotSupported):
        client.vm("web").MarkAsTemplate()


def test_a_refused_login(lab: LabVCenter) -> None:
    with pytest.raises(vim.fault.InvalidLogin):
        Client(lab, lab.port, lab.ca_file, password="wrong").login()


def test_after_logout_nothing_answers(client: Client, control: Any) -> None:
    control.create_vm("web", [16 * MIB], power="poweredOff")
    vm = client.vm("web")
    assert client.request("GET", "web/web-flat.vmdk", Range="bytes=0-1")[0] == 206
    client.content.sessionManager.Logout()
    with pytest.raises(vim.fault.NotAuthenticated):
        _ = vm.name
    assert client.request("GET", "web/web-flat.vmdk", Range="bytes=0-1")[0] == 401


def test_sessions_expire_when_idle_and_reading_bytes_does_not_keep_them(client: Client, control: Any) -> None:
    control.create_vm("web", [16 * MIB], power="poweredOff")
    vm = client.vm("web")
    control.advance_clock(1700)
    assert vm.name == "web"
    control.advance_clock(1700)
    assert client.request("HEAD", "web/web-flat.vmdk")[0] == 200
    control.advance_clock(200)
    assert client.request("HEAD", "web/web-flat.vmdk")[0] == 401
    with pytest.raises(vim.fault.NotAuthenticated):
        _ = vm.name


def test_a_killed_session_ends_a_wait_with_a_fault(client: Client, control: Any) -> None:
    import threading

    control.create_vm("web", [16 * MIB])
    collector = client.content.propertyCollector
    caught: list[Exception] = []

    def wait() -> None:
        try:
            collector.WaitForUpdatesEx("", PC.WaitOptions(maxWaitSeconds=60))
        except vmodl.MethodFault as fault:
            caught.append(fault)

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: control.sessions()[0]["calls"] > 0, "the session")
    assert control.kill_sessions() == 1
    thread.join(60)
    assert [type(c) for c in caught] == [vim.fault.NotAuthenticated]


def test_too_many_sessions_are_refused_with_503(client: Client, control: Any, lab: LabVCenter) -> None:
    control.settings(max_sessions=1)
    with pytest.raises(Exception, match="503"):
        Client(lab, lab.port, lab.ca_file).login()


def test_session_is_active_and_terminate(client: Client, lab: LabVCenter) -> None:
    other = Client(lab, lab.port, lab.ca_file).login()
    manager = client.content.sessionManager
    keys = [s.key for s in manager.sessionList]
    mine = manager.currentSession.key
    theirs = next(k for k in keys if k != mine)
    assert manager.SessionIsActive(theirs, DEFAULT_USER)
    manager.TerminateSession([theirs])
    assert not manager.SessionIsActive(theirs, DEFAULT_USER)
    with pytest.raises(vim.fault.NotAuthenticated):
        _ = other.content.rootFolder.name


def test_a_lost_privilege_is_no_permission_on_calls_and_missing_on_reads(
    client: Client, control: Any
) -> None:
    control.create_vm("web", [16 * MIB])
    vm = client.vm("web")
    control.deny("CreateSnapshot_Task", vm="web")
    with pytest.raises(vim.fault.NoPermission):
        vm.CreateSnapshot_Task("x", "", False, False)
    control.allow_all()
    control.deny("System.Read", vm="web", path="config")
    with pytest.raises(vim.fault.NoPermission):
        _ = vm.config
    spec = PC.FilterSpec(
        objectSet=[PC.ObjectSpec(obj=vm)],
        propSet=[PC.PropertySpec(type=vim.VirtualMachine, pathSet=["name", "config.uuid"])],
    )
    content = client.content.propertyCollector.RetrievePropertiesEx([spec], PC.RetrieveOptions()).objects[0]
    assert [p.name for p in content.propSet] == ["name"]
    assert [(m.path, type(m.fault)) for m in content.missingSet] == [("config.uuid", vim.fault.NoPermission)]


def test_the_tree_can_be_walked_from_the_root(client: Client, control: Any) -> None:
    control.create_vm("web", [16 * MIB], folder="crm/front")
    root = client.content.rootFolder
    datacenter = root.childEntity[0]
    assert (datacenter.name, datacenter.parent) == ("DC0", root)
    assert [d.name for d in datacenter.datastore] == ["ds1", "ds2"]
    front = datacenter.vmFolder.childEntity[0].childEntity[0]
    assert [c.name for c in front.childEntity] == ["web"]
    cluster = datacenter.hostFolder.childEntity[0]
    assert [h.name for h in cluster.host] == ["esx1.lab.local", "esx2.lab.local"]
    assert cluster.resourcePool.owner == cluster
    assert [n.name for n in datacenter.networkFolder.childEntity] == ["VM Network", "Backend"]
    index = client.content.searchIndex
    vm = index.FindByInventoryPath("DC0/vm/crm/front/web")
    assert vm == front.childEntity[0]
    assert index.FindByInventoryPath("DC0/vm/nothing") is None
    assert index.FindByUuid(None, vm.config.uuid, True) == vm
    assert index.FindByUuid(None, vm.config.instanceUuid, True, True) == vm
    assert index.FindByUuid(None, "no", True) is None
    assert vm.network[0].vm == [vm]
    assert vm.datastore[0].vm == [vm]
    assert vm.runtime.host in cluster.host
    assert vm.resourcePool.vm == [vm]


def test_every_property_of_every_object_fits_the_schema(client: Client, control: Any) -> None:
    control.create_vm("web", [16 * MIB, 16 * MIB], networks=["VM Network", "Backend"])
    client.snapshot(client.vm("web"))
    view = client.content.viewManager.CreateContainerView(client.content.rootFolder, None, True)
    kinds = {type(e) for e in view.view}
    assert {
        vim.VirtualMachine,
        vim.HostSystem,
        vim.Datastore,
        vim.Network,
        vim.ResourcePool,
        vim.Folder,
    } <= kinds
    spec = PC.FilterSpec(
        objectSet=[
            PC.ObjectSpec(
                obj=view,
                skip=True,
                selectSet=[PC.TraversalSpec(name="v", path="view", type=vim.view.ContainerView)],
            )
        ],
        propSet=[PC.PropertySpec(type=kind, all=True) for kind in kinds],
    )
    result = client.content.propertyCollector.RetrievePropertiesEx([spec], PC.RetrieveOptions())
    assert len(result.objects) == len(view.view)
    view.DestroyView()


def test_create_reconfigure_unregister_register_destroy(
    client: Client, control: Any, lab: LabVCenter
) -> None:
    datacenter = client.content.rootFolder.childEntity[0]
    pool = datacenter.hostFolder.childEntity[0].resourcePool
    new_disk = vim.vm.device.VirtualDisk(
        key=-1,
        controllerKey=1000,
        unitNumber=0,
        capacityInKB=16 * 1024,
        backing=vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
            fileName="", diskMode="persistent", thinProvisioned=True
        ),
    )
    add = vim.vm.device.VirtualDeviceSpec(operation="add", fileOperation="create", device=new_disk)
    spec = vim.vm.ConfigSpec(
        name="made",
        files=vim.vm.FileInfo(vmPathName="[ds2]"),
        numCPUs=4,
        memoryMB=1024,
        guestId="rhel9_64Guest",
        deviceChange=[add],
    )
    vm = client.wait(datacenter.vmFolder.CreateVM_Task(spec, pool))
    assert (vm.name, vm.config.hardware.numCPU, vm.config.files.vmPathName) == (
        "made",
        4,
        "[ds2] made/made.vmx",
    )
    with pytest.raises(vim.fault.DuplicateName):
        client.wait(datacenter.vmFolder.CreateVM_Task(spec, pool))
    client.wait(vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[add])))
    assert [d.key for d in disks(vm)] == [2000, 2001]
    control.guest_write("made", 1, 0, b"kept")
    client.wait(vm.PowerOnVM_Task())
    with pytest.raises(vim.fault.InvalidPowerState):
        vm.UnregisterVM()
    client.wait(vm.PowerOffVM_Task())
    vm.UnregisterVM()
    assert datacenter.vmFolder.childEntity == []
    with pytest.raises(vim.fault.NotFound):
        client.wait(datacenter.vmFolder.RegisterVM_Task("[ds2] nothing/nothing.vmx", None, False, pool))
    again = client.wait(datacenter.vmFolder.RegisterVM_Task("[ds2] made/made.vmx", "back", False, pool))
    assert again.name == "back"
    assert control.guest_read("back", 1, 0, 4) == b"kept"
    client.wait(again.Destroy_Task())
    assert datacenter.vmFolder.childEntity == []
    assert not (lab.root / "datastores" / "ds2" / "made").exists()


def test_a_root_belongs_to_one_laboratory(lab: LabVCenter) -> None:
    with pytest.raises(RootInUseError):
        LabVCenter(lab.root)


def test_the_control_api_explains_its_refusals(control: VCenterControl) -> None:
    for call, words in (
        (lambda: control.vm("none"), "no machine 'none'"),
        (lambda: control.call("nonsense"), "no operation"),
        (lambda: control.settings(speed=1), "no setting 'speed'"),
        (lambda: control.settings(idle_timeout="x"), "takes float"),
        (lambda: control.create_vm("x", [100]), "at least 1 MiB"),
        (lambda: control.create_vm("x", [16 * MIB], networks=["none"]), "no network"),
        (lambda: control.create_vm("x", [16 * MIB], workload={"speed": 1}), "unknown workload"),
        (lambda: control.add_fault("PowerOnVM_Task", fault="vim.fault.Nonsense"), "not a fault rule"),
        (lambda: control.add_fault("PowerOnVM_Task", colour="red"), "not a fault rule"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_a_configuration_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown keys"):
        LabVCenter(tmp_path / "x", {"machines": []})
