"""A scripted world behind the real activity names: it records what is asked in order, fails and blocks on demand.

Only steps that reach outside are played. Machine state is the real thing: `update_machine` and its like go through the
product's own control activities to real MachineProtection workflows, unless a world says `stateless`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn

from temporalio import activity

from farshore.activities import messages as m
from farshore.activities import signatures as s
from farshore.activities.control import ControlActivities
from farshore.contract.machine import MachineStatus
from farshore.contract.runs import PointView, ResourceView
from farshore.domain.errors import Code, FarshoreError
from farshore.domain.machine import MachineState, MainState
from farshore.plans.model import Plan

SOURCE_QUEUE, TARGET_QUEUE, DEAD_QUEUE = "site.east.fake", "site.west.fake", "site.gone.fake"
_numbers = itertools.count(1)

# As long as real ones, so that sizes measured here mean something.
_ARM = "/subscriptions/5e0a6a2c-7d0c-4a44-9a3f-3f6a7f0c2b11/resourceGroups/farshore-recovery/providers/Microsoft.Compute"


@dataclass(frozen=True)
class Call:
    """One attempt of one activity."""

    step: str
    machine: str
    value: Any
    attempt: int

    @property
    def what(self) -> str:
        """As tests read it: `create_disk db:0`, `update_machine db:begin`."""
        detail = ""
        if isinstance(self.value, m.UpdateCall):
            detail = f":{self.value.update}"
        elif isinstance(self.value, m.DiskCall):
            detail = f":{self.value.disk.index}"
        return f"{self.step} {self.machine}{detail}".strip()


class Gate:
    """Blocks a step until it is opened."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self.waiting = 0

    def open(self) -> None:
        self._open.set()

    async def pass_through(self) -> None:
        self.waiting += 1
        try:
            await self._open.wait()
        finally:
            self.waiting -= 1


@dataclass
class _Failure:
    code: Code
    message: str
    retryable: bool
    left: int | None  # None: always


@dataclass
class World:
    """The sites of one plan. Machine names are unique, so that tests share a server without meeting."""

    name: str
    plan: Plan
    source_queue: str = SOURCE_QUEUE
    target_queue: str = TARGET_QUEUE
    leg_seconds: float = 3600.0
    stateless: bool = False  # answer updates without any MachineProtection (for measurements)
    disks: int = 2
    calls: list[Call] = field(default_factory=list[Call])
    ended: list[str] = field(default_factory=list[str])
    resources: dict[str, tuple[ResourceView, m.OwnedCall]] = field(default_factory=dict[str, Any])
    created: Counter[str] = field(default_factory=Counter[str])
    off: set[str] = field(default_factory=set[str])
    points: dict[str, list[PointView]] = field(default_factory=dict[str, list[PointView]])
    findings: list[m.FindingView] = field(default_factory=list[m.FindingView])
    shutdown_takes: float = 0.0
    scripts: dict[str, m.ScriptOutput] = field(default_factory=dict[str, m.ScriptOutput])
    leg_ends: Callable[[m.LegCall], bool] | None = None  # legs that end by themselves at once
    leg_report: Callable[[m.LegCall], m.LegReport | None] | None = None  # what a leg says instead of going on
    lost: set[str] = field(default_factory=set[str])  # steps whose first attempt dies without a word
    busy: Counter[str] = field(default_factory=Counter[str])
    busiest: Counter[str] = field(default_factory=Counter[str])
    _failures: dict[tuple[str, str], _Failure] = field(default_factory=dict[tuple[str, str], _Failure])
    _gates: dict[tuple[str, str], Gate] = field(default_factory=dict[tuple[str, str], Gate])
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    # -- what a test says ---------------------------------------------------------------------------------------------

    def machine(self, short: str) -> str:
        """The unique name of a machine."""
        return f"{self.name}-{short}"

    def short(self, machine: str) -> str:
        return machine.removeprefix(f"{self.name}-")

    def fail(
        self,
        step: str,
        short: str = "*",
        code: Code = Code.TARGET_REJECTED,
        message: str = "",
        *,
        retryable: bool = False,
        times: int | None = None,
    ) -> None:
        """Let a step fail; `step` may be `update_machine:settle` for one update, `create_disk:1` for one disk."""
        self._failures[step, short] = _Failure(code, message or f"{step} fails by order", retryable, times)

    def heal(self) -> None:
        """Nothing fails any more."""
        self._failures.clear()

    def hold(self, step: str, short: str = "*") -> Gate:
        """Block a step; returns what opens it."""
        gate = Gate()
        self._gates[step, short] = gate
        return gate

    async def reached(self, step: str, short: str = "", *, times: int = 1, within: float = 60.0) -> None:
        """Wait until a step has been asked for."""

        def there() -> bool:
            return sum(c.step == step and short in ("", c.machine) for c in self.calls) >= times

        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(there)

    def asked(self, *steps: str) -> list[str]:
        """What was asked, in order; only these steps if any are named."""
        return [c.what for c in self.calls if not steps or c.step in steps]

    def forget(self) -> None:
        """Begin a new record."""
        self.calls.clear()
        self.ended.clear()

    def position(self, what: str, *, ended: bool = False) -> int:
        """Where `create_machine db` stands in the one order of begins and ends."""
        return self.order.index(f"{'end' if ended else 'begin'} {what}")

    order: list[str] = field(default_factory=list[str])

    # -- how steps come in --------------------------------------------------------------------------------------------

    async def enter(self, call: Call) -> None:
        """Record, block, fail: in this order."""
        keys = [f"{call.step}:{call.value.update}" if isinstance(call.value, m.UpdateCall) else call.step]
        if isinstance(call.value, m.DiskCall):
            keys.append(f"{call.step}:{call.value.disk.index}")
        places = [(key, machine) for key in keys for machine in (call.machine, "*")]
        async with self._changed:
            self.calls.append(call)
            self.order.append(f"begin {call.what}")
            self._changed.notify_all()
        for where in places:
            gate = self._gates.get(where)
            if gate is not None:
                await gate.pass_through()
        for where in places:
            failure = self._failures.get(where)
            if failure is not None and (failure.left is None or failure.left > 0):
                if failure.left is not None:
                    failure.left -= 1
                subject = self.machine(call.machine) if call.machine else self.name
                raise FarshoreError(
                    failure.code, failure.message, subject=subject, retryable=failure.retryable
                )

    @contextlib.contextmanager
    def count(self, step: str) -> Iterator[None]:
        """How many of a step run at the same time."""
        self.busy[step] += 1
        self.busiest[step] = max(self.busiest[step], self.busy[step])
        try:
            yield
        finally:
            self.busy[step] -= 1

    # -- what steps do ------------------------------------------------------------------------------------------------

    def new_point(self, machine: str, *, final: bool = False) -> PointView:
        mine = self.points.setdefault(machine, [])
        cycle = len(mine) + 1
        point = PointView(
            id=f"p-{cycle:010d}-{next(_numbers):08x}",
            machine=machine,
            cycle=cycle,
            taken_at=datetime.now(UTC),
            consistency="crash-consistent",
            final=final,
            size_bytes=2 << 30,
        )
        mine.append(point)
        return point

    def make(self, call: m.OwnedCall, kind: str, name: str) -> ResourceView:
        id_ = f"{_ARM}/{kind}/{name}"
        view = ResourceView(id=id_, kind=kind, name=name)
        if id_ not in self.resources:
            self.created[id_] += 1
        self.resources[id_] = (view, call)
        return view

    def remove(self, call: m.RemoveCall) -> tuple[ResourceView, ...]:
        gone: list[ResourceView] = []
        for id_, (view, owner) in list(self.resources.items()):
            mine = owner.test == call.test and (not call.plan or owner.plan == call.plan)
            mine = mine and (not call.run or owner.run == call.run)
            mine = mine and (not call.machine or owner.machine == call.machine)
            mine = mine and (not call.run_level or not owner.machine)
            if mine and owner.run != call.except_run:
                del self.resources[id_]
                gone.append(view)
        return tuple(gone)

    def of(self, *, test: bool) -> list[str]:
        """Names of what stands at the target."""
        return sorted(view.name for view, owner in self.resources.values() if owner.test == test)


def _now() -> datetime:
    return datetime.now(UTC)


class Stage:
    """All worlds of a session, and the activities that play in them."""

    def __init__(self, control: ControlActivities) -> None:
        self._control = control
        self._by_plan: dict[str, World] = {}

    def add(self, world: World) -> World:
        self._by_plan[world.name] = world
        return world

    def leave(self) -> list[World]:
        """Forget all worlds, and return them."""
        left = list(self._by_plan.values())
        self._by_plan.clear()
        return left

    def world(self, value: Any) -> World:
        plan = getattr(value, "plan", None)
        if isinstance(plan, str) and plan in self._by_plan:
            return self._by_plan[plan]
        if isinstance(plan, Plan):
            return self._by_plan[plan.plan]
        if isinstance(value, m.IsolationCall):
            return next(w for w in self._by_plan.values() if w.plan.network.test == value.network)
        spec = getattr(value, "spec", None)
        machine = spec.machine if spec is not None else getattr(value, "machine", "")
        if isinstance(value, m.StatusCall):
            machine = value.machines[0]
        found = self._by_plan.get(machine.split("-", 1)[0])
        if found is None:
            raise FarshoreError(Code.PLAN_NOT_FOUND, f"There is no plan {plan!r}.", subject=str(plan))
        return found

    def activities(self) -> list[Callable[..., Any]]:
        """One activity for each row of the table of signatures, with its types."""
        return [self._played(step) for step in s.STEPS]

    def _played(self, step: s.Step[Any, Any]) -> Callable[..., Any]:
        play = getattr(self, f"_{step.name}")

        async def perform(call: Any) -> Any:
            world = self.world(call)
            spec = getattr(call, "spec", None)
            machine = spec.machine if spec is not None else getattr(call, "machine", "") or ""
            one = Call(step.name, world.short(machine), call, activity.info().attempt)
            if step.name in world.lost and one.attempt == 1:
                world.calls.append(one)
                await asyncio.sleep(3600)  # its worker has died: no heartbeat, no answer
            async with _beating():
                with world.count(step.name):
                    await world.enter(one)
                    answer = await play(world, call)
                world.order.append(f"end {one.what}")
                return answer

        perform.__annotations__ = {"call": step.input, "return": step.output}
        return activity.defn(name=step.name)(perform)

    # control
    async def _load_plan(self, world: World, call: m.LoadPlan) -> m.PinnedPlan:
        unknown = [name for name in call.machines if name not in world.plan.machines]
        if unknown:
            raise FarshoreError(
                Code.MACHINE_UNKNOWN, f"Plan {call.plan} has no machine {', '.join(unknown)}."
            )
        return m.PinnedPlan(
            plan=world.plan,
            sha256="5" * 64,
            source_queue=world.source_queue,
            target_queue=world.target_queue,
            leg_seconds=world.leg_seconds,
        )

    async def _update_machine(self, world: World, call: m.UpdateCall) -> MachineStatus:
        if world.stateless:
            return MachineStatus(
                machine=call.machine, plan=world.name, state=MachineState(MainState.PROTECTED)
            )
        return await self._control.update_machine(call)

    async def _start_protection(self, world: World, call: m.StartProtection) -> MachineStatus:
        return await self._control.start_protection(call)

    async def _machine_status(self, world: World, call: m.StatusCall) -> m.StatusList:
        return await self._control.machine_status(call)

    async def _read_script(self, world: World, call: m.ReadScript) -> str:
        return f"# {call.script}"

    async def _run_worker_script(self, world: World, call: m.WorkerScript) -> m.ScriptOutput:
        return world.scripts.get(call.script, m.ScriptOutput(exit_code=0))

    # source
    async def _inspect_source(self, world: World, call: m.SourceCall) -> m.InspectReport:
        power = "off" if call.machine in world.off else "on"
        return m.InspectReport(machine=call.machine, power=power, tools_running=True, disks=2, bytes=2 << 30)

    _enable_tracking = _inspect_source

    async def _shut_down_source(self, world: World, call: m.ShutDownCall) -> m.ShutDownReport:
        before = call.machine in world.off
        await asyncio.sleep(0 if before else world.shutdown_takes)
        world.off.add(call.machine)
        return m.ShutDownReport(already_off=before, graceful=not before, at=_now())

    async def _prove_source_off(self, world: World, call: m.SourceCall) -> m.FenceReport:
        if call.machine not in world.off:
            raise FarshoreError(Code.FENCE_NOT_PROVEN, f"{call.machine} is running.", subject=call.machine)
        return m.FenceReport(kind="powered-off", evidence=f"{call.machine} is powered off", at=_now())

    async def _power_on_source(self, world: World, call: m.SourceCall) -> m.InspectReport:
        world.off.discard(call.machine)
        return await self._inspect_source(world, call)

    async def _reap_source(self, world: World, call: m.SourceCall) -> m.Removed:
        return m.Removed(ids=())

    async def _replicate_leg(self, world: World, call: m.LegCall) -> m.LegReport:
        said = world.leg_report(call) if world.leg_report else None
        if said is not None:
            return said
        newest = world.new_point(call.spec.machine)
        if not call.stop_after_first and not (world.leg_ends and world.leg_ends(call)):
            await asyncio.sleep(call.until_seconds)
        return m.LegReport(
            cycles=1, points=1, newest=newest, full_copies=1, bytes_shipped=1 << 20, stopped_because="time"
        )

    async def _final_cycle(self, world: World, call: m.FinalCycleCall) -> PointView:
        return world.new_point(call.spec.machine, final=call.spec.machine in world.off)

    # target
    async def _check_target(self, world: World, call: m.CheckTargetCall) -> list[m.FindingView]:
        return world.findings

    async def _ensure_test_network(self, world: World, call: m.TestNetworkCall) -> str:
        return world.make(call, "virtual-network", f"{world.name}-test-net").name

    async def _check_isolated(self, world: World, call: m.IsolationCall) -> str:
        return call.network

    async def _choose_point(self, world: World, call: m.ChoosePointCall) -> m.ChosenPoint:
        known = world.points.get(call.machine) or [world.new_point(call.machine)]
        point = next((p for p in known if p.id == call.choice), known[-1])
        disks = tuple(
            m.PointDisk(key=str(2000 + i), label=f"Hard disk {i + 1}", size=1 << 30, index=i)
            for i in range(world.disks)
        )
        return m.ChosenPoint(point=point, disks=disks)

    async def _fence_replica(self, world: World, call: m.StoreCall) -> m.Removed:
        return m.Removed(ids=("epoch 2",))

    async def _list_points(self, world: World, call: m.StoreCall) -> m.PointList:
        return m.PointList(machine=call.machine, points=tuple(world.points.get(call.machine, ())))

    async def _keep_only_point(self, world: World, call: m.StoreCall) -> m.Removed:
        mine = world.points.get(call.machine, [])
        gone = [p.id for p in mine if p.id != call.point]
        mine[:] = [p for p in mine if p.id == call.point]
        return m.Removed(ids=tuple(gone))

    async def _release_holds(self, world: World, call: m.StoreCall) -> m.Removed:
        return m.Removed(ids=())

    async def _remove_replica(self, world: World, call: m.StoreCall) -> m.Removed:
        world.points.pop(call.machine, None)
        return m.Removed(ids=(call.machine,))

    async def _create_disk(self, world: World, call: m.DiskCall) -> ResourceView:
        return world.make(call, "disk", f"{call.machine}-{_purpose(call)}-{call.point}-{call.disk.index}")

    async def _create_nic(self, world: World, call: m.NicCall) -> list[ResourceView]:
        return [world.make(call, "network-interface", f"{call.machine}-{_purpose(call)}-nic0")]

    async def _create_machine(self, world: World, call: m.MachineCall) -> ResourceView:
        return world.make(call, "machine", f"{call.machine}-{_purpose(call)}")

    async def _wait_until_running(self, world: World, call: m.WaitRunningCall) -> m.RunningReport:
        return m.RunningReport(addresses=("10.20.3.10",), detail="VM running", at=_now())

    async def _find_machine(self, world: World, call: m.OwnedCall) -> ResourceView:
        for view, owner in world.resources.values():
            if view.kind == "machine" and owner.machine == call.machine and owner.test == call.test:
                return view
        return _no(Code.MACHINE_NOT_RUNNING, f"{call.machine} has no recovered machine.")

    async def _remove_resources(self, world: World, call: m.RemoveCall) -> m.RemoveReport:
        return m.RemoveReport(deleted=world.remove(call), leftovers=())

    async def _run_guest_script(self, world: World, call: m.GuestScriptCall) -> m.ScriptOutput:
        return world.scripts.get(call.script.removeprefix("# "), m.ScriptOutput(exit_code=0))


def _purpose(call: m.OwnedCall) -> str:
    return "test" if call.test else "failover"


def _no(code: Code, message: str) -> NoReturn:
    raise FarshoreError(code, message, retryable=False)


@contextlib.asynccontextmanager
async def _beating():
    """Heartbeats ten times a second: cancellations arrive with their answers, and tests need not wait for them."""

    async def keep() -> None:
        while True:
            await asyncio.sleep(0.1)  # first: a step that ends at once costs no call
            activity.heartbeat({"stage": "playing"})

    task = asyncio.create_task(keep())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
