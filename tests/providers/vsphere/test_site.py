"""Finding, inspecting, shutting down, proving off and powering on machines."""

from __future__ import annotations

import asyncio
import time

import pytest
from pyVmomi import vim

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.lab import tls
from farshore.lab.vcenter.service import LabVCenter
from farshore.providers.ports import Power, Severity
from farshore.providers.vsphere import VSphereSite
from farshore.providers.vsphere.client import Client
from farshore.providers.vsphere.inventory import Entry, Inventory, split_pin

MIB = 1 << 20


class Ticks:
    def __init__(self, limit=None):
        self.seen = []
        self.first = asyncio.Event()
        self.limit = limit

    def __call__(self, details):
        self.seen.append(details)
        self.first.set()
        if self.limit is not None and len(self.seen) >= self.limit:
            raise KeyError("cancelled by the test")


async def failure(awaitable):
    with pytest.raises(FarshoreError) as caught:
        await awaitable
    return caught.value


# -- finding ---------------------------------------------------------------------------------------------------------


async def test_a_machine_is_found_by_name_path_and_ids(control, machine, site):
    vm = machine()
    shown = control.vm(vm)
    for source in (
        vm,
        f"/DC0/vm/{vm}",
        f"DC0/vm/{vm}",
        f"DC0/{vm}",
        shown["uuid"],
        shown["instance_uuid"].upper(),
    ):
        seen = await site.inspect(source)
        assert (seen.name, seen.id) == (vm, shown["instance_uuid"])


async def test_an_unknown_machine_is_not_found(site):
    error = await failure(site.inspect("nobody"))
    assert error.code is Code.SOURCE_MACHINE_NOT_FOUND
    assert not error.retryable
    assert "'nobody'" in error.info.message


async def test_an_ambiguous_name_lists_the_paths(tmp_path, settings_of):
    config = {"datacenters": [{"name": "DC0", "folder": "Europe/North"}, {"name": "DC1"}]}
    with LabVCenter(tmp_path, config) as lab:
        from farshore.lab.vcenter import VCenterControl

        control = VCenterControl(lab.control_url)
        for datacenter in ("Europe/North/DC0", "DC1"):
            control.create_vm("web", [MIB], datacenter=datacenter, power="poweredOff")
        site = VSphereSite(settings_of(port=lab.port, ca_file=str(lab.ca_file)))
        error = await failure(site.inspect("web"))
        assert error.code is Code.SOURCE_MACHINE_NOT_FOUND
        assert "/DC1/vm/web" in error.info.message and "/Europe/North/DC0/vm/web" in error.info.message
        source = site.open_source("m", "Europe/North/DC0/vm/web")
        assert (
            (await site.inspect("Europe/North/DC0/vm/web")).disks[0].eligible
        )  # its descriptor was read by dcPath
        assert await asyncio.to_thread(source.reap) == []
        one = VSphereSite(
            settings_of(port=lab.port, ca_file=str(lab.ca_file), datacenter="DC1", encode_twice=True)
        )
        assert (await one.inspect("web")).disks[0].eligible
        await site.close()
        await one.close()


async def test_a_machine_that_was_replaced_by_another_of_its_name_is_noticed(control, machine, site):
    vm = machine()
    first = await site.inspect(vm)
    control.destroy_vm(vm)
    assert (await failure(site.inspect(vm))).code is Code.SOURCE_MACHINE_NOT_FOUND
    control.create_vm(vm, [MIB])
    second = await site.inspect(vm)
    assert first.id != second.id


async def test_a_pinned_machine_is_found_by_its_id_and_never_replaced_by_another_of_its_name(
    control, machine, site
):
    vm = machine(power="poweredOff")
    first = (await site.inspect(vm)).id
    pinned = f"{vm}#{first.upper()}"
    assert (await site.inspect(pinned)).id == first
    assert (await site.inspect(f"/DC0/vm/{vm}#{first}")).id == first
    control.destroy_vm(vm)
    error = await failure(site.inspect(pinned))
    assert error.code is Code.SOURCE_MACHINE_NOT_FOUND
    assert "the machine with this id is gone" in error.info.message
    control.create_vm(vm, [MIB])
    await site.inspect(vm)
    source = site.open_source("m", pinned)
    steps = [
        lambda: site.inspect(pinned),
        lambda: site.enable_tracking(pinned),
        lambda: site.shut_down(pinned, guest_timeout=1, force=True, checkpoint=Ticks()),
        lambda: site.prove_off(pinned),
        lambda: site.power_on(pinned),
        lambda: site.reap(pinned),
        lambda: asyncio.to_thread(source.reap),
        lambda: asyncio.to_thread(source.cut, "farshore-m-1-1", want=Consistency.CRASH),
    ]
    for step in steps:
        error = await failure(step())
        assert error.code is Code.SOURCE_MACHINE_NOT_FOUND
        assert "another machine has this name now" in error.info.message
        assert control.vm(vm)["instance_uuid"] in error.info.message
    seen = await site.inspect(vm)
    assert (seen.power, seen.tracking) == (Power.ON, False)
    assert control.vm(vm)["snapshots"] == []


ONE, TWO = "50210000-0000-0000-0000-00000000000a", "50210000-0000-0000-0000-00000000000b"
KNOWN = [  # (name, instance UUID) of all machines; what a source means, or what the error says
    ([("web", ONE), ("db", TWO)], f"web#{ONE}", ONE),
    ([("web-old", ONE), ("db", TWO)], f"web#{ONE}", ONE),  # renamed
    ([("web", ONE), ("web", TWO)], f"web#{TWO}", TWO),  # the name is not unique, the id is
    ([("web-old", ONE), ("web", TWO)], f"web#{ONE}", "another machine has this name now"),
    ([("web", TWO)], f"web#{ONE}", "another machine has this name now"),
    ([("db", TWO)], f"web#{ONE}", "the machine with this id is gone"),
    ([("web#3", ONE)], "web#3", ONE),
    ([("web#3", ONE), ("web", TWO)], f"web#3#{ONE}", ONE),
    ([(f"web#{TWO}", ONE)], f"web#{TWO}#{ONE}", ONE),
]


@pytest.mark.parametrize(("machines", "source", "expected"), KNOWN)
def test_which_machine_a_pinned_source_means(site, monkeypatch, machines, source, expected):
    entries = [
        Entry(vim.VirtualMachine(f"vm-{n}"), name, f"DC{n}/vm/{name}", f"DC{n}", f"u{n}", identity)
        for n, (name, identity) in enumerate(machines)
    ]
    monkeypatch.setattr(Inventory, "_known", lambda self, fresh: entries)
    monkeypatch.setattr(Inventory, "_still", lambda self, entry, source: True)
    try:
        found = site._inventory.find(source).instance_uuid
    except FarshoreError as error:
        found = error.info.message
    assert expected in found


def test_only_a_uuid_behind_the_last_hash_is_an_id():
    assert split_pin(f"a#b#{ONE.upper()}") == ("a#b", ONE)
    for source in ("web", "web#3", f"#web#{ONE}x", ONE):
        assert split_pin(source) == (source, "")


async def test_many_machines_cost_one_bulk_read(control, machine, site):
    names = [machine(MIB, power="poweredOff") for _ in range(4)]
    await site.inspect(names[0])
    control.clear_requests()
    await asyncio.gather(*(site.inspect(name) for name in names))
    assert control.requests("CreateContainerView") == []


# -- inspecting ------------------------------------------------------------------------------------------------------


async def test_inspect_shows_what_the_plan_needs(control, machine, site):
    vm = machine(
        4 * MIB, {"size": 8 * MIB, "label": "Data"}, num_cpu=4, memory_mb=2048, firmware="efi",
        networks=["VM Network", "Backend"],
    )  # fmt: skip
    seen = await site.inspect(vm)
    assert (seen.power, seen.tools_running, seen.tracking) == (Power.ON, True, False)
    assert (seen.firmware, seen.cpus, seen.memory_mib) == ("efi", 4, 2048)
    assert [(d.key, d.label, d.size, d.eligible, d.reason) for d in seen.disks] == [
        ("2000", "Hard disk 1", 4 * MIB, True, ""),
        ("2001", "Data", 8 * MIB, True, ""),
    ]
    assert [n.network for n in seen.nics] == ["VM Network", "Backend"]
    assert all(n.mac.count(":") == 5 for n in seen.nics)
    assert seen.findings == ()
    await site.enable_tracking(vm)
    assert (await site.inspect(vm)).tracking


REFUSALS = [
    ({"backing": "rdm_physical"}, "vmfs", "raw device mapping"),
    ({"backing": "flat_v1"}, "vmfs", "version 1"),
    ({}, "vsan", "vsan"),
    ({}, "vvol", "vvol"),
]


@pytest.mark.parametrize(("disk", "datastore", "says"), REFUSALS)
async def test_a_disk_that_does_not_qualify_is_named_with_the_reason(
    control, machine, site, disk, datastore, says
):
    vm = machine(MIB, {"size": MIB, "label": "Data", "datastore": "ds2", **disk}, power="poweredOff")
    control.set_datastore("ds2", datastore)
    seen = await site.inspect(vm)
    assert [d.eligible for d in seen.disks] == [True, False]
    assert says in seen.disks[1].reason.lower()
    assert [(f.severity, "Data" in f.message) for f in seen.findings] == [(Severity.ERROR, True)]
    error = await failure(site.enable_tracking(vm))
    assert error.code is Code.SOURCE_NOT_ELIGIBLE
    assert "Data" in error.info.message and says in error.info.message.lower()
    assert not (await site.inspect(vm)).tracking


async def test_tracking_is_not_switched_on_under_a_foreign_snapshot(control, machine, site):
    vm = machine()
    control.snapshot(vm, "before patch")
    error = await failure(site.enable_tracking(vm))
    assert error.code is Code.SOURCE_NOT_ELIGIBLE
    assert "'before patch'" in error.info.message
    assert [f.severity for f in (await site.inspect(vm)).findings] == [Severity.ERROR]


async def test_another_kind_of_datastore_is_accepted_with_a_warning(control, machine, site):
    vm = machine()
    control.set_datastore("ds1", "nfs_whole")
    seen = await site.inspect(vm)
    assert seen.disks[0].eligible
    assert [f.severity for f in seen.findings] == [Severity.WARNING]


async def test_enable_tracking_is_safe_to_repeat_and_leaves_no_snapshot(control, machine, site):
    vm = machine()
    for _ in range(2):
        await site.enable_tracking(vm)
    assert len(control.requests("ReconfigVM_Task")) == 1
    assert len(control.requests("CreateSnapshot_Task")) == 1
    assert control.vm(vm)["snapshots"] == []


async def test_enable_tracking_does_not_disturb_a_running_cycle(control, machine, site):
    vm = machine()
    await site.enable_tracking(vm)
    cut = await asyncio.to_thread(site.open_source("m", vm).cut, "farshore-m-1-1", want=Consistency.CRASH)
    await site.enable_tracking(vm)
    assert await asyncio.to_thread(cut.read, "2000", 0, 512) == bytes(512)
    await asyncio.to_thread(cut.release)


# -- shutting down ---------------------------------------------------------------------------------------------------


async def test_a_guest_that_shuts_itself_down_is_graceful(control, machine, site):
    vm = machine(shutdown={"seconds": 0.5})
    done = await site.shut_down(vm, guest_timeout=20, force=False, checkpoint=Ticks())
    assert (done.already_off, done.graceful) == (False, True)
    assert done.at.tzinfo is not None
    again = await site.shut_down(vm, guest_timeout=20, force=False, checkpoint=Ticks())
    assert (again.already_off, again.graceful) == (True, False)


async def test_a_guest_that_hangs_is_reported_or_powered_off(control, machine, site):
    vm = machine(shutdown={"hangs": True})
    ticks = Ticks()
    error = await failure(site.shut_down(vm, guest_timeout=2.0, force=False, checkpoint=ticks))
    assert error.code is Code.SHUTDOWN_FAILED
    assert "still up after 2 s" in error.info.message and "Tools are running" in error.info.message
    assert ticks.seen
    assert (await site.inspect(vm)).power is Power.ON
    done = await site.shut_down(vm, guest_timeout=1.0, force=True, checkpoint=Ticks())
    assert (done.already_off, done.graceful) == (False, False)
    assert (await site.inspect(vm)).power is Power.OFF


async def test_without_tools_the_guest_cannot_be_asked(control, machine, site):
    vm = machine(tools="notRunning")
    begun = time.monotonic()
    error = await failure(site.shut_down(vm, guest_timeout=60, force=False, checkpoint=Ticks()))
    assert error.code is Code.SHUTDOWN_FAILED
    assert "Tools are not running" in error.info.message
    done = await site.shut_down(vm, guest_timeout=60, force=True, checkpoint=Ticks())
    assert not done.graceful
    assert time.monotonic() - begun < 10


async def test_many_machines_shut_down_side_by_side(control, machine, site):
    vms = {machine(MIB, shutdown={"hangs": True}): Ticks() for _ in range(12)}
    steps = [
        asyncio.create_task(site.shut_down(vm, guest_timeout=100, force=False, checkpoint=ticks))
        for vm, ticks in vms.items()
    ]
    await asyncio.wait_for(
        asyncio.gather(*(ticks.first.wait() for ticks in vms.values())), 60
    )  # all wait at once
    for vm in vms:
        control.power_off(vm)
    assert all(step.graceful for step in await asyncio.gather(*steps))


async def test_a_lost_answer_of_the_shutdown_is_waited_out(control, machine, site):
    vm = machine(shutdown={"seconds": 0.2})
    control.add_fault("ShutdownGuest", action="drop", when="after", vm=vm)
    done = await site.shut_down(vm, guest_timeout=20, force=False, checkpoint=Ticks())
    assert done.graceful


async def test_a_checkpoint_that_raises_ends_the_step_with_its_own_error(control, machine, site):
    vm = machine(shutdown={"hangs": True})
    with pytest.raises(KeyError, match="cancelled by the test"):
        await site.shut_down(vm, guest_timeout=60, force=True, checkpoint=Ticks(limit=1))
    assert (await site.inspect(vm)).power is Power.ON


async def test_a_cancelled_step_ends_at_once_and_does_nothing_more(control, machine, site):
    vm = machine(shutdown={"hangs": True})
    ticks = Ticks()
    step = asyncio.create_task(site.shut_down(vm, guest_timeout=2.0, force=True, checkpoint=ticks))
    await asyncio.wait_for(ticks.first.wait(), 10)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    seen = len(ticks.seen)
    await asyncio.sleep(2.5)  # longer than the whole step would have taken
    assert len(ticks.seen) == seen
    assert control.requests("PowerOffVM_Task") == []


# -- proving and powering on -----------------------------------------------------------------------------------------


async def test_off_is_proven_by_a_fresh_read(control, machine, site):
    vm = machine()
    await site.inspect(vm)
    error = await failure(site.prove_off(vm))
    assert error.code is Code.FENCE_NOT_PROVEN
    control.power_off(vm)
    proof = await site.prove_off(vm)
    assert proof.kind == "powered-off"
    assert (
        vm in proof.evidence
        and control.vm(vm)["instance_uuid"] in proof.evidence
        and "127.0.0.1" in proof.evidence
    )
    control.power_on(vm)
    assert (await failure(site.prove_off(vm))).code is Code.FENCE_NOT_PROVEN


async def test_a_host_that_vcenter_has_lost_proves_nothing(control, machine, site, monkeypatch):
    vm = machine(power="poweredOff")
    read = Client.read

    def stale(self, reference, paths, **rest):
        values = read(self, reference, paths, **rest)
        return values | (
            {"runtime.connectionState": "disconnected"} if "runtime.connectionState" in values else {}
        )

    monkeypatch.setattr(Client, "read", stale)
    error = await failure(site.prove_off(vm))
    assert error.code is Code.FENCE_NOT_PROVEN
    assert "lost the host" in error.info.message


async def test_power_on_is_safe_to_repeat_and_survives_a_lost_answer(control, machine, site):
    vm = machine(power="poweredOff")
    control.add_fault("PowerOnVM_Task", action="drop", when="after", vm=vm)
    await site.power_on(vm)
    await site.power_on(vm)
    assert (await site.inspect(vm)).power is Power.ON


# -- trust -----------------------------------------------------------------------------------------------------------


async def test_a_vcenter_with_a_strangers_certificate_is_refused(machine, site_of, tmp_path):
    vm = machine()
    site = site_of(ca_file=str(tls.ensure_ca(tmp_path).ca_file))
    for _ in range(2):
        error = await failure(site.inspect(vm))
        assert error.code is Code.CONFIGURATION_INVALID
        assert not error.retryable


async def test_a_pinned_thumbprint_is_enough_and_a_wrong_one_is_refused(machine, site_of, vcenter):
    vm = machine()
    assert (await site_of(ca_file=None, thumbprint=vcenter.thumbprint).inspect(vm)).name == vm
    error = await failure(site_of(thumbprint="11" * 32).inspect(vm))
    assert error.code is Code.CONFIGURATION_INVALID
    assert "thumbprint" in error.info.message


async def test_the_password_is_in_no_representation(settings_of):
    assert settings_of().password not in repr(settings_of())
