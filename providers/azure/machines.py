"""Virtual machines on specialised disks: create-only, look, stop, run a script."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from azure.core import MatchConditions
from azure.core.exceptions import AzureError
from azure.core.polling import AsyncLROPoller
from azure.mgmt.compute import models as cm

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names, scripts
from farshore.providers.azure.client import AzureClients
from farshore.providers.azure.ensure import Ensurer, Wanted, read_or_none, state_of
from farshore.providers.azure.errors import classify, is_missing, said
from farshore.providers.azure.lro import drive
from farshore.providers.azure.networks import Networks, locate
from farshore.providers.ports import (
    Checkpoint,
    MachineView,
    Owner,
    Power,
    Resource,
    ScriptResult,
    TargetSpec,
)

_POWER = {
    "running": Power.ON,
    "starting": Power.UNKNOWN,
    "stopping": Power.UNKNOWN,
    "deallocating": Power.UNKNOWN,
    "stopped": Power.OFF,
    "deallocated": Power.OFF,
}


class Machines:
    """Everything of Microsoft.Compute/virtualMachines that Farshore makes."""

    def __init__(self, clients: AzureClients, ensure: Ensurer, networks: Networks) -> None:
        self._clients = clients
        self._settings = clients.settings
        self._ensure = ensure
        self._networks = networks

    async def create(
        self,
        owner: Owner,
        spec: TargetSpec,
        disks: Sequence[Resource],
        nics: Sequence[Resource],
        *,
        resume: Mapping[str, Any],
        checkpoint: Checkpoint,
    ) -> Resource:
        """Create and start; `disks[0]` boots. Raises CapacityExhausted, QuotaExceeded, NameTaken, TargetNotVisibleYet."""
        name = names.machine(spec, owner.purpose)
        if not disks or not nics:
            raise FarshoreError(
                Code.INVALID_INPUT, f"{name} needs a boot disk and a network interface.", subject=spec.machine
            )
        rg, client = self._settings.resource_group, self._clients
        body = self._body(owner, spec, disks, nics)
        parts = [*disks, *nics]
        for part in parts:
            self._ensure.births.heard_of(part.id)

        async def make(token: str | None) -> AsyncLROPoller[cm.VirtualMachine]:
            if token is not None:
                return await client.compute.virtual_machines.begin_create_or_update(
                    rg, name, body, continuation_token=token
                )
            try:
                return await client.compute.virtual_machines.begin_create_or_update(
                    rg, name, body, etag="*", match_condition=MatchConditions.IfMissing
                )
            except AzureError as error:
                if is_missing(error) and any(self._ensure.births.is_young(p.id) for p in parts):
                    raise FarshoreError(
                        Code.TARGET_NOT_VISIBLE_YET,
                        f"Azure does not show every part of {name} yet: {said(error).message}",
                        subject=spec.machine,
                    ) from error
                raise

        wanted = Wanted[cm.VirtualMachine](
            what=f"virtual machine {name}",
            id=self._id(name),
            read=lambda: client.compute.virtual_machines.get(rg, name),
            make=make,
            delete=lambda: client.compute.virtual_machines.begin_delete(rg, name),
            owner=owner,
            step="machine",
        )
        made = await self._ensure(wanted, resume=resume, checkpoint=checkpoint)
        return Resource(id=made.id or wanted.id, kind="machine", name=name)

    async def view(self, machine: Resource) -> MachineView:
        """What the instance view tells. Raises TargetNotVisibleYet soon after creation, MachineNotRunning when it is gone."""
        group, name = locate(machine.id, self._settings.resource_group)
        found = await read_or_none(
            lambda: self._clients.compute.virtual_machines.get(group, name, expand="instanceView"),
            doing=f"reading machine {name}",
            subject=name,
        )
        if found is None:
            if self._ensure.births.is_young(machine.id):
                raise self._ensure.not_visible(f"virtual machine {name}")
            raise FarshoreError(
                Code.MACHINE_NOT_RUNNING,
                f"Virtual machine {name} does not exist any more.",
                subject=name,
                causes=("It was deleted by somebody or by a clean-up.",),
                action="Run the failover again to create it anew.",
                retryable=False,
            )
        view = found.properties.instance_view if found.properties is not None else None
        power, texts = _power(view)
        agent = _agent(view)
        provisioned = state_of(found).lower()
        addresses: list[str] = []
        profile = found.properties.network_profile if found.properties is not None else None
        for nic in (profile.network_interfaces if profile is not None else None) or []:
            if nic.id:
                addresses += await self._networks.addresses(nic.id)
        ready = power is Power.ON and provisioned == "succeeded" and agent in ("", "ready")
        detail = "; ".join([*texts, *([f"agent: {agent}"] if agent else [])])
        return MachineView(
            resource=Resource(id=found.id or machine.id, kind="machine", name=name),
            power=power,
            ready=ready,
            addresses=tuple(addresses),
            detail=detail,
        )

    async def stop(self, machine: Resource, *, checkpoint: Checkpoint) -> None:
        """Deallocate; gone or deallocated already is fine."""
        group, name = locate(machine.id, self._settings.resource_group)
        view = await read_or_none(
            lambda: self._clients.compute.virtual_machines.instance_view(group, name),
            doing=f"reading machine {name}",
            subject=name,
        )
        if view is None:
            if self._ensure.births.is_young(machine.id):
                raise self._ensure.not_visible(f"virtual machine {name}")
            return
        if _status(view, "powerstate/") == "deallocated":
            return
        doing = f"stopping machine {name}"

        async def begin(_token: str | None) -> AsyncLROPoller[None]:
            return await self._clients.compute.virtual_machines.begin_deallocate(group, name)

        try:
            await drive(
                begin,
                doing=doing,
                subject=name,
                # Without the token: a successor reads the power state instead.
                checkpoint=lambda _: checkpoint({"step": "stop"}),
            )
        except AzureError as error:
            if not is_missing(error):
                raise classify(error, doing=doing, subject=name) from error

    async def run_script(
        self, machine: Resource, script: str, *, timeout: float, checkpoint: Checkpoint
    ) -> ScriptResult:
        """Run a script in the guest through Run Command. Raises ActionTimeout, MachineNotRunning.

        Repeating it after a crash runs the script again: scripts have to bear that.
        """
        group, name = locate(machine.id, self._settings.resource_group)
        found = await read_or_none(
            lambda: self._clients.compute.virtual_machines.get(group, name),
            doing=f"reading machine {name}",
            subject=name,
        )
        if found is None:
            if self._ensure.births.is_young(machine.id):
                raise self._ensure.not_visible(f"virtual machine {name}")
            raise FarshoreError(
                Code.MACHINE_NOT_RUNNING,
                f"Virtual machine {name} does not exist any more.",
                subject=name,
                retryable=False,
            )
        call = scripts.wrap(script, windows=_is_windows(found))
        doing = f"running a script on {name}"

        async def begin(_token: str | None) -> AsyncLROPoller[cm.RunCommandResult]:
            return await self._clients.compute.virtual_machines.begin_run_command(
                group, name, cm.RunCommandInput(command_id=call.command, script=list(call.lines))
            )

        try:
            async with asyncio.timeout(timeout):
                answer: Any = await drive(
                    begin,
                    doing=doing,
                    subject=name,
                    checkpoint=lambda _: checkpoint({"step": "script"}),
                )
        except TimeoutError as error:
            raise FarshoreError(
                Code.ACTION_TIMEOUT,
                f"The script on {name} did not end within {timeout:g} s.",
                subject=name,
            ) from error
        except AzureError as error:
            raise classify(error, doing=doing, subject=name) from error
        entries = [
            (str(v.code or ""), str(v.message or ""))
            for v in (answer.value if answer is not None else None) or []
        ]
        return scripts.parse(entries, call)

    def _body(
        self, owner: Owner, spec: TargetSpec, disks: Sequence[Resource], nics: Sequence[Resource]
    ) -> cm.VirtualMachine:
        boot, *data = disks
        body = cm.VirtualMachine(
            location=self._settings.location,
            tags=names.tags(owner, spec.tags),
            properties=cm.VirtualMachineProperties(
                hardware_profile=cm.HardwareProfile(vm_size=spec.size),
                storage_profile=cm.StorageProfile(
                    os_disk=cm.OSDisk(
                        create_option="Attach",
                        os_type="Windows" if spec.os == "windows" else "Linux",
                        delete_option="Detach",
                        managed_disk=cm.ManagedDiskParameters(id=boot.id),
                    ),
                    data_disks=[
                        cm.DataDisk(
                            lun=lun,
                            create_option="Attach",
                            delete_option="Detach",
                            managed_disk=cm.ManagedDiskParameters(id=disk.id),
                        )
                        for lun, disk in enumerate(data)
                    ],
                ),
                network_profile=cm.NetworkProfile(
                    network_interfaces=[
                        cm.NetworkInterfaceReference(
                            id=nic.id,
                            properties=cm.NetworkInterfaceReferenceProperties(
                                primary=index == 0, delete_option="Detach"
                            ),
                        )
                        for index, nic in enumerate(nics)
                    ]
                ),
                diagnostics_profile=cm.DiagnosticsProfile(boot_diagnostics=cm.BootDiagnostics(enabled=True)),
            ),
        )
        if spec.zone:
            body.zones = [spec.zone]
        return body

    def _id(self, name: str) -> str:
        s = self._settings
        return (
            f"/subscriptions/{s.subscription}/resourceGroups/{s.resource_group}"
            f"/providers/Microsoft.Compute/virtualMachines/{name}"
        )


def _status(view: cm.VirtualMachineInstanceView | None, prefix: str) -> str:
    for status in (view.statuses if view is not None else None) or []:
        code = str(status.code or "").lower()
        if code.startswith(prefix):
            return code[len(prefix) :]
    return ""


def _power(view: cm.VirtualMachineInstanceView | None) -> tuple[Power, list[str]]:
    texts = [
        str(s.message or s.display_status or s.code)
        for s in (view.statuses if view is not None else None) or []
    ]
    return _POWER.get(_status(view, "powerstate/"), Power.UNKNOWN), texts


def _agent(view: cm.VirtualMachineInstanceView | None) -> str:
    """What the guest's agent says, in lower case; "" when none is there to say anything."""
    agent = view.vm_agent if view is not None else None
    for status in (agent.statuses if agent is not None else None) or []:
        text = str(status.display_status or "").lower()
        return text if text == "ready" else f"{text} ({status.message or 'no reason given'})"
    return ""


def _is_windows(machine: cm.VirtualMachine) -> bool:
    storage = machine.properties.storage_profile if machine.properties is not None else None
    os_disk = storage.os_disk if storage is not None else None
    kind: Any = os_disk.os_type if os_disk is not None else None
    return str(getattr(kind, "value", kind)).lower() == "windows"
