"""Record one history per workflow type and kind of run: `python tests/histories/record.py` from the repository's root.

The files are kept for ever: a workflow that began under an older release must replay under every later one. Record a
new set (`--release 0.2`) when a release changes what workflows do, and leave the old files where they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from farshore.activities import messages as m  # noqa: E402
from farshore.contract.client import Run  # noqa: E402
from farshore.contract.runs import (  # noqa: E402
    Confirmation,
    FailoverInput,
    PointsInput,
    ProtectionInput,
    ProtectionKind,
    RunKind,
)
from farshore.domain.errors import Code  # noqa: E402
from tests.workflows.harness import Harness, approve, ended_badly, pending, running  # noqa: E402
from tests.workflows.world import World  # noqa: E402


class Recorder:
    """Runs workflows of one world and writes their histories."""

    def __init__(self, lab: Harness, release: str) -> None:
        self._lab = lab
        self._release = release
        self.files: list[Path] = []

    async def keep(self, id: str, name: str, *, run_id: str | None = None) -> None:
        history = await self._lab.temporal.get_workflow_handle(id, run_id=run_id).fetch_history()
        path = HERE / f"{self._release}-{name}.json"
        content = {"workflow_id": history.workflow_id, "history": json.loads(history.to_json())}
        path.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True) + "\n")
        self.files.append(path)

    async def keep_run(self, run: Run, name: str, world: World) -> None:
        """The run, its first group, its first machine."""
        machine = next(iter(world.plan.machines))
        group = world.plan.boot[0].group
        await self.keep(run.id, f"failover-{name}")
        await self.keep(f"{run.id}/group/{group}", f"failover-group-{name}")
        await self.keep(f"{run.id}/{machine}", f"machine-failover-{name}")

    async def failover(self, world: World, kind: RunKind, name: str = "", **more: Any) -> None:
        run = await self._lab.start(world, kind, **more)
        await run.result()
        await self.keep_run(run, name or kind.value, world)


def a_plan(lab: Harness, **more: Any) -> World:
    look = {"manual": "Look", "instructions": "closely", "on": ["planned", "test"]}
    return lab.world(
        machines=("a", "b"),
        boot=[("one", ["a"]), ("two", ["b"])],
        actions={"two": {"before": [look], "after": [{"script": "smoke.sh"}]}},
        **more,
    )


async def answered(lab: Harness, world: World, kind: RunKind) -> Run:
    run = await lab.start(world, kind, reason="recorded")
    await pending(run, "look")
    await run.decide(approve("look", "ann", "fine"))
    await run.result()
    return run


async def record(lab: Harness, release: str) -> list[Path]:
    keeper = Recorder(lab, release)
    world = a_plan(lab)
    protecting = await lab.client.protection(ProtectionInput(plan=world.name))
    await protecting.result()
    await keeper.keep(protecting.id, "protection-protect")
    await keeper.keep_run(await answered(lab, world, RunKind.TEST), "test", world)
    await keeper.failover(world, RunKind.CLEANUP)
    await keeper.keep_run(await answered(lab, world, RunKind.PLANNED), "planned", world)
    older = {name: known[0].id for name, known in world.points.items()}
    await keeper.failover(world, RunKind.CHANGE_POINT, points=older, accept_data_loss=True)
    await keeper.failover(world, RunKind.CANCEL)
    world.fail("prove_source_off", code=Code.FENCE_NOT_PROVEN)
    run = await lab.start(world, RunKind.UNPLANNED, break_glass=(Confirmation(by="ann"),))
    await pending(run, "fence")
    await run.decide(approve("fence", "bob"))
    await run.result()
    await keeper.keep_run(run, "unplanned", world)
    world.heal()
    await keeper.failover(world, RunKind.COMMIT)
    id_ = f"{world.name}-points"
    await lab.temporal.execute_workflow(
        "RecoveryPoints", PointsInput(plan=world.name), id=id_, task_queue="farshore"
    )
    await keeper.keep(id_, "recovery-points")
    disabling = await lab.client.protection(ProtectionInput(plan=world.name, kind=ProtectionKind.DISABLE))
    await disabling.result()
    await keeper.keep(disabling.id, "protection-disable")
    await keeper.keep(f"machine/{world.machine('a')}", "machine-protection")
    await stopped(lab, keeper)
    return keeper.files


async def stopped(lab: Harness, keeper: Recorder) -> None:
    """A planned failover that stops half-way, and one that is cancelled through Temporal."""
    world = a_plan(lab)
    await (await lab.client.protection(ProtectionInput(plan=world.name))).result()
    world.fail("final_cycle", "b", Code.SOURCE_NOT_ELIGIBLE)
    world.findings = [m.FindingView(severity="warning", code="Slow", subject="", message="slow", action="")]
    run = await lab.client.failover(FailoverInput(plan=world.name, kind=RunKind.PLANNED))
    await ended_badly(run)
    await keeper.keep_run(run, "planned-stopped", world)
    world.heal()
    world.forget()
    gate = world.hold("shut_down_source", "b")
    run = await lab.client.failover(FailoverInput(plan=world.name, kind=RunKind.PLANNED))
    await world.reached("shut_down_source", "b")
    await run.handle.cancel()
    gate.open()
    await ended_badly(run)
    await keeper.keep_run(run, "planned-cancelled", world)


async def main(release: str) -> None:
    async with running() as lab:
        files = await record(lab, release)
    print(f"{len(files)} histories, {sum(f.stat().st_size for f in files) / 1024:.0f} KiB, in {HERE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", default="0.1", help="prefix of the files")
    asyncio.run(main(parser.parse_args().release))
    sys.stdout.flush()
    os._exit(0)  # the SDK may crash the interpreter at its end (temporal.md §12)
