"""Virtual machines, against the laboratory Azure."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure.adapter import AzureSite
from farshore.providers.ports import MachineView, Owner, Power, Purpose, Resource, TargetSpec

from .bench import Azure, Killed, Notes, World, settled

VM = "/virtualmachines/"


async def parts(
    site: AzureSite, world: World, owner: Owner, spec: TargetSpec, disks: int = 1
) -> tuple[list[Resource], list[Resource]]:
    made = [
        await site.create_disk(owner, spec, world.request(world.replica(), n), resume={}, checkpoint=Notes())
        for n in range(disks)
    ]
    nics = [await site.create_nic(owner, spec, n, nic) for n, nic in enumerate(spec.nics)]
    return made, nics


async def ready(site: AzureSite, machine: Resource) -> MachineView:
    for _ in range(200):
        view = await site.view_machine(machine)
        if view.ready:
            return view
        await asyncio.sleep(0.02)
    raise AssertionError(f"never ready: {view.detail}")


async def test_a_machine_runs_on_its_disks_and_interfaces(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    spec = world.spec(
        size="Standard_B2s",
        zone="1",
        nics=(*world.spec().nics, replace(world.spec().nics[0], subnet="app", public=True)),
    )
    owner = world.owner()
    disks, nics = await parts(site, world, owner, spec, disks=3)
    made = await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes())
    assert (made.kind, made.name) == ("machine", spec.name)
    seen = await site._clients.compute.virtual_machines.get(site.settings.resource_group, made.name)
    storage, network = seen.properties.storage_profile, seen.properties.network_profile
    assert storage.os_disk.managed_disk.id == disks[0].id
    assert [(d.lun, d.managed_disk.id, d.delete_option) for d in storage.data_disks] == [
        (0, disks[1].id, "Detach"), (1, disks[2].id, "Detach"),
    ]  # fmt: skip
    assert [(n.id, n.properties.primary) for n in network.network_interfaces] == [
        (nics[0].id, True),
        (nics[1].id, False),
    ]
    assert seen.tags["farshore-run"] == owner.run
    view = await ready(site, made)
    assert view.power is Power.ON
    assert len(view.addresses) == 3  # two private, one public


async def test_a_test_machine_has_its_own_name(site: AzureSite, world: World) -> None:
    made, _, _ = await world.machine(site, world.owner(purpose=Purpose.TEST))
    assert made.name == f"web-{world.tag}-test"


async def test_asking_again_makes_no_second_machine(site: AzureSite, cloud: Azure, world: World) -> None:
    owner, spec = world.owner(), world.spec()
    disks, nics = await parts(site, world, owner, spec)
    one, two = [
        await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes()) for _ in range(2)
    ]
    assert one == two
    assert cloud.created(VM + spec.name) == {one.id.lower(): 1}


@pytest.mark.parametrize("keep_token", [True, False])
async def test_killed_between_put_and_poll_there_is_one_machine(
    cloud: Azure, site: AzureSite, world: World, keep_token: bool
) -> None:
    owner, spec = world.owner(), world.spec()
    disks, nics = await parts(site, world, owner, spec)
    notes = Notes(kill_when=lambda note: bool(note.get("token")))
    cloud.control.time_scale(0.01)
    first = AzureSite(cloud.settings, snapshot_url=str)
    with pytest.raises(Killed):
        await first.create_machine(owner, spec, disks, nics, resume={}, checkpoint=notes)
    await first.close()
    mark = cloud.last_request()
    made = await site.create_machine(
        owner, spec, disks, nics, resume=notes.last if keep_token else {}, checkpoint=Notes()
    )
    assert cloud.created(VM + spec.name) == {made.id.lower(): 1}
    assert cloud.states(VM + spec.name) == {"Succeeded"}  # it was waited for
    assert cloud.asked("compute.VirtualMachines.create_or_update", after=mark, text=world.tag) == 0


async def test_a_machine_that_somebody_makes_between_our_read_and_our_put_is_not_replaced(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    spec, other = world.spec(), world.owner("other", run="other")
    theirs = await parts(site, world, world.owner(), spec)
    ours = await parts(site, world, other, world.spec("other"))
    cloud.control.consistency(resources=0.5)  # theirs is there, reads say no
    with pytest.raises(Killed):
        await site.create_machine(
            world.owner(),
            spec,
            *theirs,
            resume={},
            checkpoint=Notes(kill_when=lambda note: bool(note.get("token"))),
        )
    with pytest.raises(FarshoreError) as caught:
        await settled(lambda: site.create_machine(other, spec, *ours, resume={}, checkpoint=Notes()))
    assert caught.value.code is Code.NAME_TAKEN
    (row,) = [r for r in cloud.control.resources() if (VM + spec.name) in r.id.lower()]
    assert row.tags["farshore-run"] == world.owner().run


@pytest.mark.parametrize("times", [1, 2])
async def test_a_lost_answer_makes_no_second_machine(
    site: AzureSite, cloud: Azure, world: World, times: int
) -> None:
    owner, spec = world.owner(), world.spec()
    disks, nics = await parts(site, world, owner, spec)
    cloud.control.fault(
        "drop_after", operation="compute.VirtualMachines.create_or_update", path=f"*{world.tag}*", count=times
    )
    # Once: the HTTP library repeats the PUT and create-only refuses it. Twice: the step fails and is tried again.
    made = await settled(lambda: site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes()))
    assert cloud.created(VM + spec.name) == {made.id.lower(): 1}


async def test_the_race_for_a_name_ends_with_the_same_machine(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    """Both read "absent", one PUT wins, the other is refused by If-None-Match and takes what is there."""
    owner, spec = world.owner(), world.spec()
    disks, nics = await parts(site, world, owner, spec)

    async def go() -> Resource:
        return await settled(
            lambda: site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes())
        )

    one, two = await asyncio.gather(go(), go())
    assert one == two
    assert cloud.created(VM + spec.name) == {one.id.lower(): 1}


@pytest.mark.parametrize(
    ("when", "code"),
    [
        ("first", "SkuNotAvailable"),
        ("lro", "AllocationFailed"),
        ("lro", "ZonalAllocationFailed"),
        ("first", "OverconstrainedAllocationRequest"),
    ],
)
async def test_no_capacity_is_told_and_the_next_attempt_starts_clean(
    site: AzureSite, cloud: Azure, world: World, when: str, code: str
) -> None:
    owner, spec = world.owner(), world.spec(size="Standard_F2s_v2")
    disks, nics = await parts(site, world, owner, spec)
    cloud.control.short_of("Standard_F2s_v2", code=code, when=when, remaining=1)
    notes = Notes()
    with pytest.raises(FarshoreError) as caught:
        await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=notes)
    assert caught.value.code is Code.CAPACITY_EXHAUSTED
    assert caught.value.info.details["azure_code"] == code
    made = await site.create_machine(owner, spec, disks, nics, resume=notes.last, checkpoint=Notes())
    assert len(cloud.there(VM + spec.name)) == 1
    assert (await site.view_machine(made)).power is Power.ON


async def test_a_used_up_quota_is_told_in_numbers_and_not_retried(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner, spec = world.owner(), world.spec(size="Standard_E32s_v5")
    disks, nics = await parts(site, world, owner, spec)
    cloud.control.quota("westeurope", cores=20)
    with pytest.raises(FarshoreError, match="quota") as caught:
        await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes())
    assert caught.value.code is Code.QUOTA_EXCEEDED
    assert not caught.value.retryable
    details = caught.value.info.details
    assert (details["limit"], details["required"], details["quota"]) == (20, 32, "Total Regional Cores")


async def test_a_foreign_machine_of_that_name_is_left_alone(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner, spec = world.owner(), world.spec()
    made, _, _ = await world.machine(site, owner, spec)
    cloud.control.change_behind(made.id, {"tags": {}})
    disks, nics = await parts(site, world, world.owner("other"), world.spec("other"))
    with pytest.raises(FarshoreError, match="not made by Farshore") as caught:
        await site.create_machine(world.owner("other"), spec, disks, nics, resume={}, checkpoint=Notes())
    assert caught.value.code is Code.NAME_TAKEN
    assert cloud.created(VM + spec.name) == {made.id.lower(): 1}


async def test_a_machine_of_another_run_is_named_with_that_run(site: AzureSite, world: World) -> None:
    spec = world.spec()
    await world.machine(site, world.owner(), spec)
    with pytest.raises(FarshoreError, match=f"run run-{world.tag} of plan plan-{world.tag}") as caught:
        await world.machine(site, world.owner(run="later"), spec)
    assert caught.value.code is Code.NAME_TAKEN


async def test_parts_that_azure_does_not_show_yet_are_worth_waiting_for(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner, spec = world.owner(), world.spec()
    disks, nics = await parts(site, world, owner, spec)
    cloud.control.fault(
        "status", operation="compute.VirtualMachines.create_or_update", path=f"*{world.tag}*", status=404, code="NotFound",
        message=f"Disk {disks[0].id} is not found.",
    )  # fmt: skip
    with pytest.raises(FarshoreError) as caught:
        await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes())
    assert (caught.value.code, caught.value.retryable) == (Code.TARGET_NOT_VISIBLE_YET, True)
    await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes())


async def test_parts_that_stay_away_are_drift(cloud: Azure, world: World) -> None:
    site = AzureSite(replace(cloud.settings, visibility_grace=0.0), snapshot_url=str)
    owner, spec = world.owner(), world.spec()
    disks, nics = await parts(site, world, owner, spec)
    cloud.control.delete_behind(disks[0].id)
    with pytest.raises(FarshoreError) as caught:
        await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes())
    await site.close()
    assert (caught.value.code, caught.value.retryable) == (Code.TARGET_REJECTED, False)


async def test_a_new_machine_that_reads_do_not_show_yet_is_found_in_the_end(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner, spec = world.owner(), world.spec()
    disks, nics = await parts(site, world, owner, spec)
    cloud.control.consistency(resources=1.0)
    notes = Notes(kill_when=lambda note: bool(note.get("token")))
    with pytest.raises(Killed):
        await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=notes)
    with pytest.raises(FarshoreError) as caught:  # no token: read says no, create-only says yes
        await site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes())
    assert caught.value.code is Code.TARGET_NOT_VISIBLE_YET
    made = await settled(lambda: site.create_machine(owner, spec, disks, nics, resume={}, checkpoint=Notes()))
    assert cloud.created(VM + spec.name) == {made.id.lower(): 1}


async def test_a_view_soon_after_creation_is_patient_and_later_is_not(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    made, _, _ = await world.machine(site)
    cloud.control.delete_behind(made.id)
    with pytest.raises(FarshoreError) as caught:
        await site.view_machine(made)
    assert caught.value.code is Code.TARGET_NOT_VISIBLE_YET
    other = AzureSite(cloud.settings, snapshot_url=str)  # never made it
    with pytest.raises(FarshoreError) as later:
        await other.view_machine(made)
    await other.close()
    assert (later.value.code, later.value.retryable) == (Code.MACHINE_NOT_RUNNING, False)


async def test_a_machine_that_does_not_boot_is_on_but_not_ready(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    cloud.control.turn(boot_check="signature")
    made, _, _ = await world.machine(site)
    await asyncio.sleep(0.1)
    view = await site.view_machine(made)
    assert (view.power, view.ready) == (Power.ON, False)
    assert "no boot signature" in view.detail


async def test_stopping_is_repeatable_and_a_missing_machine_counts_as_stopped(
    cloud: Azure, site: AzureSite, world: World
) -> None:
    made, _, _ = await world.machine(site)
    mark = cloud.last_request()
    await site.stop_machine(made, checkpoint=Notes())
    await site.stop_machine(made, checkpoint=Notes())
    assert (await site.view_machine(made)).power is Power.OFF
    assert cloud.asked("compute.VirtualMachines.deallocate", after=mark, text=world.tag) == 1
    cloud.control.delete_behind(made.id)
    other = AzureSite(cloud.settings, snapshot_url=str)
    await other.stop_machine(made, checkpoint=Notes())
    await other.close()


async def test_a_script_tells_exit_code_output_and_errors(site: AzureSite, world: World) -> None:
    made, _, _ = await world.machine(site)
    await ready(site, made)
    result = await site.run_script(
        made, 'echo "hello $LAB_VM_NAME"\necho oops >&2\nexit 3\n', timeout=20, checkpoint=Notes()
    )
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (3, f"hello web-{world.tag}\n", "oops")


async def test_a_script_that_takes_too_long_is_a_timeout(site: AzureSite, cloud: Azure, world: World) -> None:
    made, _, _ = await world.machine(site)
    await ready(site, made)
    cloud.control.fault("lro_stuck", operation="compute.VirtualMachines.run_command", path=f"*{world.tag}*")
    with pytest.raises(FarshoreError) as caught:
        await site.run_script(made, "true", timeout=0.3, checkpoint=Notes())
    cloud.control.release()
    assert caught.value.code is Code.ACTION_TIMEOUT


async def test_a_script_needs_a_running_machine(site: AzureSite, world: World) -> None:
    made, _, _ = await world.machine(site)
    await site.stop_machine(made, checkpoint=Notes())
    with pytest.raises(FarshoreError) as caught:
        await site.run_script(made, "true", timeout=5, checkpoint=Notes())
    assert caught.value.code is Code.MACHINE_NOT_RUNNING


async def test_a_token_that_expires_is_renewed(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.turn(token_seconds=2)
    mark = cloud.last_request()
    nic = world.spec().nics[0]
    await site.create_nic(world.owner("a"), world.spec("a"), 0, nic)
    await asyncio.sleep(2.1)
    await site.create_nic(world.owner("b"), world.spec("b"), 0, nic)
    assert cloud.asked("entra.token", after=mark) >= 2
    assert [r for r in cloud.control.requests(mark) if r.status == 401] == []


async def test_a_token_that_azure_revokes_is_replaced_at_the_next_attempt(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    nic = world.spec().nics[0]
    await site.create_nic(world.owner("a"), world.spec("a"), 0, nic)
    cloud.control.expire_tokens()
    with pytest.raises(FarshoreError) as caught:
        await site.create_nic(world.owner("b"), world.spec("b"), 0, nic)
    assert (caught.value.code, caught.value.retryable) == (Code.ACCESS_DENIED, True)
    await site.create_nic(world.owner("b"), world.spec("b"), 0, nic)


async def test_a_wrong_secret_is_an_access_problem_and_does_not_show(cloud: Azure, world: World) -> None:
    wrong = AzureSite(replace(cloud.settings, client_secret="not-the-secret"), snapshot_url=str)
    with pytest.raises(FarshoreError) as caught:
        await wrong.create_nic(world.owner(), world.spec(), 0, world.spec().nics[0])
    await wrong.close()
    assert (caught.value.code, caught.value.retryable) == (Code.ACCESS_DENIED, False)
    assert "not-the-secret" not in str(caught.value.info.to_dict())


async def test_a_dead_endpoint_is_unreachable(cloud: Azure, world: World) -> None:
    gone = AzureSite(replace(cloud.settings, base_url="https://127.0.0.1:1"), snapshot_url=str)
    with pytest.raises(FarshoreError) as caught:
        await gone.create_nic(world.owner(), world.spec(), 0, world.spec().nics[0])
    await gone.close()
    assert (caught.value.code, caught.value.retryable) == (Code.TARGET_UNREACHABLE, True)


async def test_a_region_in_outage_is_unreachable(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.outage("westeurope")
    with pytest.raises(FarshoreError) as caught:
        await site.create_nic(world.owner(), world.spec(), 0, world.spec().nics[0])
    assert caught.value.retryable
