"""A plan that was edited between two runs: machines are where they are, whatever the file says now."""

from __future__ import annotations

from typing import Any

import pytest

from farshore.contract.runs import Outcome, ProtectionInput, RunKind, RunStatus
from farshore.domain.errors import Code

from .harness import Harness, by_machine
from .test_machine_protection import refused
from .world import World

pytestmark = pytest.mark.asyncio(loop_scope="session")


def edit(world: World, **changes: Any) -> None:
    """Save the plan anew."""
    world.plan = world.plan.model_copy(update=changes)


def move(world: World, **sites: str) -> None:
    edit(world, sites=world.plan.sites.model_copy(update=sites))


def from_source(world: World, short: str, source: str) -> None:
    name = world.machine(short)
    machines = world.plan.machines | {name: world.plan.machines[name].model_copy(update={"source": source})}
    edit(world, machines=machines)


@pytest.mark.parametrize("sites", [{"source": "north"}, {"target": "south"}])
@pytest.mark.parametrize("kind", [RunKind.PLANNED, RunKind.UNPLANNED, RunKind.TEST])
async def test_a_run_at_other_sites_than_those_of_the_protection_touches_nothing(
    lab: Harness, kind: RunKind, sites: dict[str, str]
) -> None:
    world = await lab.protected(machines=("a",))
    move(world, **sites)
    failure = await lab.fails(world, kind)
    assert failure.error.code == Code.NOT_READY
    assert "east → west" in failure.error.message
    assert next(iter(sites.values())) in failure.error.message
    assert "Restore" in failure.error.recommended_action
    asked = {c.what for c in world.calls if c.step != "replicate_leg"}
    assert asked <= {"load_plan", "update_machine a:begin"}
    status = await lab.status(world, "a")
    assert (status.state.main, status.holder) == ("Protected", "")


async def test_what_follows_a_failover_is_bound_to_its_sites_too(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.PLANNED)
    made = set(world.resources)
    move(world, target="south")
    for kind in (RunKind.COMMIT, RunKind.CANCEL):
        assert (await lab.fails(world, kind)).error.code == Code.NOT_READY
    assert set(world.resources) == made
    move(world, target="west")
    assert (await lab.run(world, RunKind.COMMIT)).status is RunStatus.SUCCEEDED


async def test_protect_again_hands_on_settings_but_neither_sites_nor_another_machine(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    protect = ProtectionInput(plan=world.name)
    edit(world, replication=world.plan.replication.model_copy(update={"interval": 77.0}))
    result = await (await lab.client.protection(protect)).result()
    assert by_machine(world, result)["a"].outcome is Outcome.SKIPPED
    assert (await lab.status(world, "a")).source_site == "east"

    move(world, source="north")
    with pytest.raises(Exception, match="east → west") as refusal:
        await (await lab.client.protection(protect, id=f"{world.name}/moved")).result()
    assert "north → west" in str(refusal.value)
    move(world, source="east")

    from_source(world, "a", "folder/another-machine")
    with pytest.raises(Exception, match="is protected from") as refusal:
        await (await lab.client.protection(protect, id=f"{world.name}/other")).result()
    assert world.machine("a") in str(refusal.value)
    assert (await lab.status(world, "a")).source == world.machine("a")


async def test_settings_are_free_while_a_machine_has_not_been_enabled(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    world.fail("enable_tracking", "a", Code.SOURCE_NOT_ELIGIBLE)
    with pytest.raises(Exception, match="enable_tracking"):
        await (await lab.client.protection(ProtectionInput(plan=world.name))).result()
    world.heal()
    handle = lab.protection(world, "a")
    renamed = lab.spec(world, "a").model_copy(update={"source": "folder/renamed", "source_site": "north"})
    status = await handle.execute_update("configure", renamed)
    assert status["source"] == "folder/renamed"
    assert status["source_site"] == "north"


async def test_the_pinned_id_of_a_source_survives_new_settings_by_name(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    handle = lab.protection(world, "a")
    spec = lab.spec(world, "a")
    pinned = spec.model_copy(update={"source": f"{spec.source}#vm-42"})
    assert (await handle.execute_update("configure", pinned))["source"] == pinned.source
    assert (await handle.execute_update("configure", spec))["source"] == pinned.source
    other = spec.model_copy(update={"source": "another#vm-42"})
    assert (await refused(handle, "configure", other)).type == Code.NOT_READY
