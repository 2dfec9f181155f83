"""Machines on specialised disks: creation once, power, guests, quota and capacity."""

from __future__ import annotations

import asyncio

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import ResourceExistsError

RG, LOCATION = "farshore-dr", "westeurope"


async def test_a_machine_holds_its_disks_and_interface(azure) -> None:
    vm = await azure.vm("vm1", tags={"plan": "crm"})
    assert (vm.properties.provisioning_state, vm.tags, await azure.power("vm1")) == (
        "Succeeded",
        {"plan": "crm"},
        "running",
    )
    disk = await azure.compute.disks.get(RG, "vm1-os")
    assert (disk.managed_by, disk.properties.disk_state) == (vm.id, "Attached")
    nic = await azure.network.network_interfaces.get(RG, "vm1-nic")
    assert (nic.properties.virtual_machine.id, nic.properties.primary) == (vm.id, True)
    await azure.agent_ready("vm1")
    shown = await azure.compute.virtual_machines.get(RG, "vm1", expand="instanceView")
    assert [s.code for s in shown.properties.instance_view.statuses] == [
        "ProvisioningState/succeeded",
        "OSProvisioningComplete/succeeded",
        "PowerState/running",
    ]
    assert [v.name async for v in azure.compute.virtual_machines.list_all()] == ["vm1"]


async def test_create_only_refuses_a_machine_that_is_there_and_etags_guard_changes(azure, finish) -> None:
    vm = await azure.vm("vm1")
    machines = azure.compute.virtual_machines
    body = azure.machine(
        azure.id("Microsoft.Compute/disks", "vm1-os"),
        azure.id("Microsoft.Network/networkInterfaces", "vm1-nic"),
    )
    with pytest.raises(ResourceExistsError) as caught:
        await azure.create("vm1", body)
    assert (caught.value.status_code, caught.value.error.code) == (412, "PreconditionFailed")
    update = {"tags": {"a": "b"}}
    with azure.refused("PreconditionFailed", 412):
        await machines.begin_update(
            RG, "vm1", update, etag='"stale"', match_condition=MatchConditions.IfNotModified
        )
    etag = (await machines.get(RG, "vm1")).etag
    await finish(
        machines.begin_update(RG, "vm1", update, etag=etag, match_condition=MatchConditions.IfNotModified)
    )
    assert (await machines.get(RG, "vm1")).tags == {"a": "b"}
    assert (await azure.ctl(azure.control.creations))[vm.id.lower()] == 1


async def test_power_goes_through_its_states(azure, finish) -> None:
    await azure.vm("vm1")
    machines = azure.compute.virtual_machines
    await azure.ctl(azure.control.fault, "lro_stuck", operation="compute.VirtualMachines.deallocate")
    poller = await machines.begin_deallocate(RG, "vm1")
    assert await azure.power("vm1") == "deallocating"
    await azure.ctl(azure.control.release)
    await poller.result()
    assert await azure.power("vm1") == "deallocated"
    assert (await azure.compute.disks.get(RG, "vm1-os")).properties.disk_state == "Reserved"
    with azure.refused("OperationNotAllowed", 409):
        await machines.begin_restart(RG, "vm1")
    await finish(machines.begin_start(RG, "vm1"))
    assert await azure.power("vm1") == "running"
    await finish(machines.begin_start(RG, "vm1"))  # nothing to do, and no error
    await finish(machines.begin_restart(RG, "vm1"))
    await finish(machines.begin_power_off(RG, "vm1"))
    assert await azure.power("vm1") == "stopped"


async def test_a_machine_takes_only_free_sound_disks_and_interfaces(azure) -> None:
    await azure.vm("vm1")
    disk, nic = await asyncio.gather(azure.disk("d2"), azure.nic("n2"))
    other = azure.id("Microsoft.Compute/disks", "vm1-os")
    with azure.refused("ConflictingUserInput", 409):
        await azure.create("vm2", azure.machine(other, nic.id))
    with azure.refused("NicInUse", 400):
        await azure.create(
            "vm2", azure.machine(disk.id, azure.id("Microsoft.Network/networkInterfaces", "vm1-nic"))
        )
    with azure.refused("NotFound", 404):
        await azure.create("vm2", azure.machine(disk.id + "x", nic.id))
    with azure.refused("InvalidParameter", 400):
        await azure.create("vm2", azure.machine(disk.id, nic.id, size="Standard_Huge"))
    with azure.refused("BadRequest", 400):
        await azure.create("vm2", {**azure.machine(disk.id, nic.id), "colour": "red"})
    two = [{"lun": 0, "createOption": "Attach", "managedDisk": {"id": disk.id}}]
    with azure.refused("ConflictingUserInput", 409):
        await azure.create("vm2", azure.machine(disk.id, nic.id, data=two))
    assert (await azure.compute.disks.get(RG, "d2")).managed_by is None


async def test_data_disks_come_and_go(azure, finish) -> None:
    await azure.vm("vm1")
    data = await azure.disk("data1")
    machines = azure.compute.virtual_machines
    entry = {"lun": 0, "createOption": "Attach", "managedDisk": {"id": data.id}}
    vm = await finish(
        machines.begin_update(RG, "vm1", {"properties": {"storageProfile": {"dataDisks": [entry]}}})
    )
    assert vm.properties.storage_profile.data_disks[0].name == "data1"
    await finish(machines.begin_update(RG, "vm1", {"properties": {"storageProfile": {"dataDisks": []}}}))
    assert (await azure.compute.disks.get(RG, "data1")).managed_by is None


async def test_deleting_keeps_what_is_detached_and_deletes_what_is_marked(azure, finish) -> None:
    os_disk, data, nic = await asyncio.gather(azure.disk("os"), azure.disk("data"), azure.nic("nic"))
    entry = {"lun": 0, "createOption": "Attach", "managedDisk": {"id": data.id}, "deleteOption": "Delete"}
    await azure.create("vm1", azure.machine(os_disk.id, nic.id, data=[entry]))
    await finish(azure.compute.virtual_machines.begin_delete(RG, "vm1"))
    await finish(azure.compute.virtual_machines.begin_delete(RG, "vm1"))
    left = {r.id.rsplit("/", 1)[1] for r in await azure.ctl(azure.control.resources) if "Compute" in r.type}
    assert left == {"os"}
    assert (await azure.network.network_interfaces.get(RG, "nic")).properties.virtual_machine is None


async def test_deletion_overtakes_a_running_creation(azure, finish) -> None:
    disk, nic = await asyncio.gather(azure.disk("d"), azure.nic("n"))
    await azure.ctl(azure.control.fault, "lro_stuck", operation="compute.VirtualMachines.create_or_update")
    poller = await azure.compute.virtual_machines.begin_create_or_update(
        RG, "vm1", azure.machine(disk.id, nic.id)
    )
    await finish(azure.compute.virtual_machines.begin_delete(RG, "vm1"))
    with azure.refused("OperationPreempted"):
        await poller.result()
    assert (await azure.compute.disks.get(RG, "d")).managed_by is None


async def test_scripts_really_run_beside_the_disks(azure, finish, noise) -> None:
    url = await azure.vhd("d.vhd", {0: b"farshore" + noise(504)})
    disk, nic = await asyncio.gather(azure.disk("d", creationData=azure.imported(url)), azure.nic("n"))
    await azure.create("vm1", azure.machine(disk.id, nic.id))
    await azure.agent_ready("vm1")
    run = azure.compute.virtual_machines.begin_run_command
    script = ["echo $LAB_VM_NAME $colour", "head -c 8 $LAB_DISK_0", "echo oops >&2"]
    body = {
        "commandId": "RunShellScript",
        "script": script,
        "parameters": [{"name": "colour", "value": "red"}],
    }
    (status,) = (await finish(run(RG, "vm1", body))).value
    assert status.code == "ProvisioningState/succeeded"
    assert status.message == "Enable succeeded: \n[stdout]\nvm1 red\nfarshore\n[stderr]\noops\n"
    with azure.refused("VMExtensionProvisioningError"):
        await finish(run(RG, "vm1", {"commandId": "RunPowerShellScript", "script": ["dir"]}))
    await azure.ctl(azure.control.turn, run_command_timeout=0.2)
    with azure.refused("VMExtensionProvisioningTimeout"):
        await finish(run(RG, "vm1", {"commandId": "RunShellScript", "script": ["sleep 30"]}))
    await finish(azure.compute.virtual_machines.begin_power_off(RG, "vm1"))
    with azure.refused("OperationNotAllowed", 409):
        await run(RG, "vm1", body)


async def test_a_guest_that_cannot_boot_runs_without_an_agent(azure, finish) -> None:
    await azure.ctl(azure.control.turn, boot_check="signature", time_scale=0.0)
    await azure.vm("vm1")
    view = await azure.compute.virtual_machines.instance_view(RG, "vm1")
    assert view.vm_agent.statuses[0].display_status == "Not Ready"
    assert "no boot signature" in view.vm_agent.statuses[0].message
    with azure.refused("VMAgentStatusCommunicationError"):
        await finish(
            azure.compute.virtual_machines.begin_run_command(
                RG, "vm1", {"commandId": "RunShellScript", "script": ["true"]}
            )
        )


async def test_the_quota_is_counted_in_cores_by_region_and_family(azure) -> None:
    await azure.ctl(azure.control.quota, LOCATION, cores=5)
    await azure.vm("vm1", size="Standard_D4s_v5")
    usage = {u.name.value: (u.current_value, u.limit) async for u in azure.compute.usage.list(LOCATION)}
    assert (usage["cores"], usage["standardDSv5Family"], usage["virtualMachines"][0]) == ((4, 5), (4, 100), 1)
    with azure.refused("OperationNotAllowed", 409) as refusal:
        await azure.vm("vm2", size="Standard_D2s_v5")
    for words in ("Current Limit: 5", "Current Usage: 4", "Additional Required: 2", "Total Regional Cores"):
        assert words in refusal.message
    await azure.ctl(azure.control.quota, LOCATION, cores=50, standardDSv5Family=4)
    with azure.refused("OperationNotAllowed", 409) as refusal:
        await azure.vm("vm2", size="Standard_D2s_v5")
    assert "standardDSv5Family" in refusal.message
    await azure.vm("vm2", size="Standard_E2s_v5")


async def test_missing_capacity_refuses_at_once_or_fails_the_operation(azure, finish) -> None:
    await azure.ctl(azure.control.short_of, "Standard_D*", code="SkuNotAvailable", when="first", listed=True)
    with azure.refused("SkuNotAvailable", 409):
        await azure.vm("vm1")
    skus = azure.compute.resource_skus.list(filter="location eq 'westeurope'")
    restricted = {s.name for s in [s async for s in skus] if s.restrictions}
    assert "Standard_D2s_v5" in restricted
    assert "Standard_E2s_v5" not in restricted
    await azure.ctl(azure.control.enough)
    await azure.ctl(azure.control.short_of, "Standard_D2s_v5", remaining=1)
    with azure.refused("AllocationFailed", 200):
        await azure.vm("vm1")
    failed = await azure.compute.virtual_machines.get(RG, "vm1")
    assert failed.properties.provisioning_state == "Failed"
    view = await azure.compute.virtual_machines.instance_view(RG, "vm1")
    assert view.statuses[0].code == "ProvisioningState/failed/AllocationFailed"
    body = azure.machine(
        failed.properties.storage_profile.os_disk.managed_disk.id,
        failed.properties.network_profile.network_interfaces[0].id,
    )
    vm = await finish(azure.compute.virtual_machines.begin_create_or_update(RG, "vm1", body))
    assert (vm.properties.provisioning_state, await azure.power("vm1")) == ("Succeeded", "running")


async def test_zones_of_machine_disk_and_capacity_agree(azure, finish) -> None:
    body = {
        "location": LOCATION,
        "zones": ["1"],
        "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1},
    }
    disk = await finish(azure.compute.disks.begin_create_or_update(RG, "d", body))
    nic = await azure.nic("n")
    with azure.refused("BadRequest", 400):
        await azure.create("vm1", azure.machine(disk.id, nic.id, zones=["2"]))
    await azure.ctl(azure.control.short_of, "*", zone="1", code="ZonalAllocationFailed", when="first")
    with azure.refused("ZonalAllocationFailed", 409):
        await azure.create("vm1", azure.machine(disk.id, nic.id, zones=["1"]))
