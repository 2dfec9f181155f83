"""Finding and deleting what Farshore made: all of it, in order, and nothing else."""

from __future__ import annotations

import asyncio

import pytest
from azure.mgmt.compute import models as cm

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names
from farshore.providers.azure.adapter import AzureSite
from farshore.providers.azure.cleanup import ORDER
from farshore.providers.ports import Owner, Purpose, TargetNic

from .bench import Azure, Killed, Notes, World


async def rehearsal(site: AzureSite, world: World, machine: str = "web", run: str = "run") -> Owner:
    """A test with its own network, a machine, a disk, an interface with a public address, and a staging blob left over."""
    whole = world.owner("", purpose=Purpose.TEST, run=run)
    network = await site.ensure_test_network(Owner(whole.plan, whole.run, "", Purpose.TEST), like=["dr-vnet"])
    owner = world.owner(machine, purpose=Purpose.TEST, run=run)
    spec = world.spec(machine, nics=(TargetNic(network, "web", public=True),))
    await world.machine(site, owner, spec)
    blob = world.cloud.container.get_blob_client(names.staging_blob(owner, 7))
    blob.create_page_blob(512, metadata=names.metadata(owner, "p-1"))
    blob.close()
    return owner


async def test_what_a_rehearsal_made_is_listed_and_then_gone(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner = await rehearsal(site, world)
    listed = await site.list_resources(run=owner.run, purpose=Purpose.TEST)
    assert {r.kind for r in listed} == set(ORDER)
    notes = Notes()
    removal = await site.remove(purpose=Purpose.TEST, run=owner.run, checkpoint=notes)
    assert removal.leftovers == ()
    assert set(removal.deleted) == set(listed)
    kinds = [r.kind for r in removal.deleted]
    assert kinds == sorted(kinds, key=ORDER.index)
    assert await site.list_resources(run=owner.run, purpose=Purpose.TEST) == []
    assert [r for r in cloud.control.resources() if r.tags.get("farshore-run") == owner.run] == []
    assert cloud.staged(world.tag) == []
    assert notes.seen


async def test_a_test_never_touches_a_failover_nor_the_other_way_round(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    await world.machine(site, world.owner(run="real"))
    await rehearsal(site, world, run="test")
    plan = world.owner().plan
    real = await site.list_resources(plan=plan, purpose=Purpose.FAILOVER)
    await site.remove(purpose=Purpose.TEST, plan=plan, checkpoint=Notes())
    assert await site.list_resources(plan=plan, purpose=Purpose.FAILOVER) == real
    assert len(real) == 3
    removal = await site.remove(purpose=Purpose.FAILOVER, plan=plan, checkpoint=Notes())
    assert removal.leftovers == ()
    assert await site.list_resources(plan=plan, purpose=Purpose.FAILOVER) == []


async def test_nothing_foreign_is_touched(site: AzureSite, cloud: Azure, world: World) -> None:
    """What has no tags, half of our tags, or another plan's, is there as before."""
    owner = await rehearsal(site, world)
    rg, location = site.settings.resource_group, site.settings.location

    async def foreign(name: str, tags: dict[str, str] | None) -> str:
        poller = await site._clients.compute.disks.begin_create_or_update(
            rg,
            f"foreign-{name}-{world.tag}",
            cm.Disk(
                location=location,
                tags=tags,
                properties=cm.DiskProperties(
                    creation_data=cm.CreationData(create_option="Empty"), disk_size_gb=1
                ),
            ),
        )
        return str((await poller.result()).id)

    kept = [
        await foreign("plain", None),
        await foreign("run-only", {"farshore-run": owner.run}),
        await foreign(
            "no-purpose",
            {"farshore-run": owner.run, "farshore-plan": owner.plan, "farshore-machine": owner.machine},
        ),
        await foreign("other-plan", names.tags(Owner("other", "other", owner.machine, Purpose.TEST))),
        await foreign("team", {"team": "crm"}),
    ]
    plain = cloud.container.get_blob_client(f"staging/somebody-{world.tag}.vhd")
    plain.create_page_blob(512)
    for call in ({"run": owner.run}, {"plan": owner.plan}, {"plan": owner.plan, "machine": owner.machine}):
        removal = await site.remove(purpose=Purpose.TEST, checkpoint=Notes(), **call)
        assert removal.leftovers == ()
    there = {r.id for r in cloud.control.resources()}
    assert set(kept) <= there
    assert plain.exists()
    plain.close()


async def test_one_machine_goes_and_the_runs_network_stays(site: AzureSite, world: World) -> None:
    one, two = await rehearsal(site, world, "one"), await rehearsal(site, world, "two")
    removal = await site.remove(purpose=Purpose.TEST, plan=one.plan, machine=one.machine, checkpoint=Notes())
    assert removal.leftovers == ()
    left = await site.list_resources(plan=one.plan, purpose=Purpose.TEST)
    assert {r.kind for r in left} == set(ORDER)
    assert {r.name for r in left if r.kind == "machine"} == {f"two-{world.tag}-test"}
    assert two.machine


async def test_a_run_can_be_spared(site: AzureSite, world: World) -> None:
    old, new = world.owner("old", run="old"), world.owner("new", run="new")
    await world.disk(site, old)
    await world.disk(site, new)
    await site.remove(purpose=Purpose.FAILOVER, plan=old.plan, except_run=new.run, checkpoint=Notes())
    left = await site.list_resources(plan=old.plan, purpose=Purpose.FAILOVER)
    assert [r.name for r in left] == [names.disk(new, 0)]


async def test_what_cannot_go_is_told_with_the_reason_and_the_rest_goes(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner = await rehearsal(site, world)
    cloud.control.fault(
        "status", operation="compute.Disks.delete", path=f"*{world.tag}*", status=409, code="ScopeLocked",
        message="The scope is locked.", count=None,
    )  # fmt: skip
    removal = await site.remove(purpose=Purpose.TEST, run=owner.run, checkpoint=Notes())
    assert [(r.kind, "locked" in why) for r, why in removal.leftovers] == [("disk", True)]
    assert {r.kind for r in removal.deleted} == set(ORDER) - {"disk"}
    cloud.control.clear_faults()
    again = await site.remove(purpose=Purpose.TEST, run=owner.run, checkpoint=Notes())
    assert ([r.kind for r in again.deleted], again.leftovers) == (["disk"], ())


async def test_a_busy_deletion_is_tried_again_in_the_same_call(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner = world.owner()
    await world.disk(site, owner)
    cloud.control.fault(
        "status", operation="compute.Disks.delete", path=f"*{world.tag}*", status=429,
        code="RetryableErrorDueToAnotherOperation", count=2,
    )  # fmt: skip
    removal = await site.remove(purpose=Purpose.FAILOVER, run=owner.run, checkpoint=Notes())
    assert removal.leftovers == ()
    assert len(removal.deleted) == 1


async def test_what_a_foreign_machine_holds_is_left_over_without_a_long_wait(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner = world.owner()
    machine, disk, nic = await world.machine(site, owner)
    cloud.control.change_behind(machine.id, {"tags": {"owner": "somebody"}})
    removal = await site.remove(purpose=Purpose.FAILOVER, run=owner.run, checkpoint=Notes())
    assert removal.deleted == ()
    assert {r for r, _ in removal.leftovers} == {disk, nic}
    assert all(machine.name in why for _, why in removal.leftovers)
    assert machine.id in cloud.there(world.tag)


async def test_a_clean_up_that_was_killed_is_finished_by_the_next(
    cloud: Azure, site: AzureSite, world: World
) -> None:
    owner = await rehearsal(site, world)
    cloud.control.time_scale(0.01)
    first = AzureSite(cloud.settings, snapshot_url=str)
    notes = Notes(kill_when=lambda note: note.get("step") == "remove network-interface")
    with pytest.raises(Killed):
        await first.remove(purpose=Purpose.TEST, run=owner.run, checkpoint=notes)
    await first.close()
    removal = await site.remove(purpose=Purpose.TEST, run=owner.run, checkpoint=Notes())
    assert removal.leftovers == ()
    assert await site.list_resources(run=owner.run, purpose=Purpose.TEST) == []


async def test_two_clean_ups_at_once_leave_nothing(cloud: Azure, site: AzureSite, world: World) -> None:
    owner = await rehearsal(site, world)
    other = AzureSite(cloud.settings, snapshot_url=str)
    await asyncio.gather(
        *(s.remove(purpose=Purpose.TEST, run=owner.run, checkpoint=Notes()) for s in (site, other))
    )
    await other.close()
    assert await site.list_resources(run=owner.run, purpose=Purpose.TEST) == []


async def test_removing_all_failovers_of_a_site_at_once_is_refused(site: AzureSite) -> None:
    with pytest.raises(FarshoreError) as caught:
        await site.remove(purpose=Purpose.FAILOVER, checkpoint=Notes())
    assert caught.value.code is Code.INVALID_INPUT


async def test_a_cancel_in_the_checkpoint_stops_the_clean_up(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner = world.owner()
    await world.disk(site, owner)

    def cancelled(_note: object) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await site.remove(purpose=Purpose.FAILOVER, run=owner.run, checkpoint=cancelled)
