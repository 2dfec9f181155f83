"""The instance view: power, provisioning, the guest's agent."""

from __future__ import annotations

import time

from farshore.lab.azure import disks
from farshore.lab.azure.model import Json, Resource, sub
from farshore.lab.azure.operations import iso
from farshore.lab.azure.world import World


def agent_ready(vm: Resource) -> bool:
    """Whether the guest's agent reports: powered on, booted, and the scaled delay over."""
    return (
        vm.hidden.get("power") == "running"
        and not vm.hidden.get("boot_problem")
        and time.time() >= float(vm.hidden.get("agent_at", 0))
    )


_DISPLAY = {"creating": "VM creating", "starting": "VM starting", "running": "VM running", "stopping": "VM stopping",
            "stopped": "VM stopped", "deallocating": "VM deallocating", "deallocated": "VM deallocated"}  # fmt: skip


def instance_view(world: World, vm: Resource) -> Json:
    now, power_state, state = iso(time.time()), str(vm.hidden.get("power")), vm.state.lower()
    statuses: list[Json] = [
        {"code": f"ProvisioningState/{state}", "level": "Error" if state == "failed" else "Info",
         "displayStatus": f"Provisioning {state}", "time": iso(vm.changed)},
    ]  # fmt: skip
    if state == "failed" and vm.hidden.get("error"):
        error = vm.hidden["error"]
        statuses[0]["code"] = f"ProvisioningState/failed/{error['code']}"
        statuses[0]["message"] = error["message"]
    if power_state != "creating":
        statuses.append(
            {"code": f"PowerState/{power_state}", "level": "Info", "displayStatus": _DISPLAY[power_state]}
        )
    view: Json = {"hyperVGeneration": "V1", "statuses": statuses, "disks": []}
    for disk in disks.attached_disks(world, vm):
        view["hyperVGeneration"] = disk.properties.get("hyperVGeneration", view["hyperVGeneration"])
        view["disks"].append(
            {"name": disk.name, "statuses": [{"code": "ProvisioningState/succeeded", "level": "Info",
             "displayStatus": "Provisioning succeeded", "time": iso(disk.changed)}]}
        )  # fmt: skip
    if power_state == "running":
        ready = agent_ready(vm)
        problem = vm.hidden.get("boot_problem")
        view["vmAgent"] = {
            "vmAgentVersion": "2.9.1.1" if ready else "Unknown",
            "statuses": [
                {"code": "ProvisioningState/succeeded" if ready else "ProvisioningState/Unavailable",
                 "level": "Info" if ready else "Warning", "displayStatus": "Ready" if ready else "Not Ready",
                 "message": "Guest Agent is running" if ready else "VM status blob is found but not yet populated."
                 if not problem else f"The guest did not boot: {problem}.", "time": now},
            ],
        }  # fmt: skip
        if ready:
            view["computerName"] = vm.name
            os_type = sub(vm.properties, "storageProfile", "osDisk").get("osType")
            view["osName"] = "lab-linux" if os_type == "Linux" else "lab-windows"
            statuses.insert(1, {"code": "OSProvisioningComplete/succeeded", "level": "Info",
                                "displayStatus": "OS provisioning complete", "time": iso(vm.hidden["agent_at"])})  # fmt: skip
    return view
