"""From a plan and a kind of run to groups and actions in order. Pure data: a workflow walks it, a person reads it.

The order is that of site recovery: shutdown (left out in a test), failover of all machines at once, boot groups one
after another. Actions of other kinds of run are gone from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from farshore.domain.errors import Code, FarshoreError
from farshore.plans.model import KINDS, BootGroup, ManualAction, Plan, ScriptAction

GROUP_SIZE = 50  # machines in one child workflow: more of them fight over one lock


def batches(machines: Sequence[str], size: int = GROUP_SIZE) -> tuple[tuple[str, ...], ...]:
    """Machines in parts of at most `size`, in order."""
    return tuple(tuple(machines[i : i + size]) for i in range(0, len(machines), size))


@dataclass(frozen=True, slots=True)
class Step:
    """An action at its place. `id` is stable for a version of the plan: `boot.data.after.1`."""

    id: str
    action: ManualAction | ScriptAction


@dataclass(frozen=True, slots=True)
class Group:
    """Machines that are worked on together, and the actions around them."""

    name: str
    machines: tuple[str, ...]
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()

    def batches(self, size: int = GROUP_SIZE) -> tuple[tuple[str, ...], ...]:
        """The machines in parts of at most `size`."""
        return batches(self.machines, size)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a run goes through. `shutdown_before` and `shutdown_after` stand around all shutdown groups."""

    kind: str
    shutdown: tuple[Group, ...]  # empty in a test
    failover: Group
    boot: tuple[Group, ...]
    shutdown_before: tuple[Step, ...] = ()
    shutdown_after: tuple[Step, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every action in the order of the run."""
        around = [step for group in self.boot for step in (*group.before, *group.after)]
        return (*self.shutdown_before, *self.shutdown_after, *around)


def schedule(plan: Plan, kind: str, machines: Iterable[str] = ()) -> Schedule:
    """The schedule of a run of `plan`; `kind` is one of KINDS.

    `machines` restricts it to some machines (empty: all); groups that have none of them fall out with their actions,
    while groups that only hold actions stay. Raises MachineUnknown and InvalidInput.
    """
    if kind not in KINDS:
        raise FarshoreError(
            Code.INVALID_INPUT, f"{kind!r} is not a kind of failover; kinds are {', '.join(KINDS)}."
        )
    wanted = set(machines)
    unknown = sorted(wanted - plan.machines.keys())
    if unknown:
        raise FarshoreError(
            Code.MACHINE_UNKNOWN,
            f"Plan {plan.plan} has no machine {', '.join(unknown)}; it has {', '.join(plan.machines)}.",
            subject=plan.plan,
        )
    boot = tuple(
        group
        for group in (_group(g, kind, wanted) for g in plan.boot)
        if group.machines or not _held(plan, group)
    )
    everything = tuple(name for group in boot for name in group.machines)
    failover = Group("failover", everything)
    if kind == "test":
        return Schedule(kind, (), failover, boot)
    if plan.shutdown.order == "parallel":
        shutdown: tuple[Group, ...] = (Group("shutdown", everything),)
    else:
        shutdown = tuple(Group(g.name, tuple(reversed(g.machines))) for g in reversed(boot) if g.machines)
    return Schedule(
        kind,
        shutdown,
        failover,
        boot,
        shutdown_before=_steps("shutdown.before", plan.shutdown.before, kind),
        shutdown_after=_steps("shutdown.after", plan.shutdown.after, kind),
    )


def _group(group: BootGroup, kind: str, wanted: set[str]) -> Group:
    return Group(
        group.group,
        tuple(name for name in group.machines if not wanted or name in wanted),
        _steps(f"boot.{group.group}.before", group.before, kind),
        _steps(f"boot.{group.group}.after", group.after, kind),
    )


def _held(plan: Plan, group: Group) -> bool:
    """Whether the group of the plan has machines at all."""
    return any(g.group == group.name and g.machines for g in plan.boot)


def _steps(place: str, actions: Sequence[ManualAction | ScriptAction], kind: str) -> tuple[Step, ...]:
    # numbered before filtering, so that an id means the same action in every kind of run
    return tuple(Step(f"{place}.{i}", a) for i, a in enumerate(actions, 1) if a.runs_in(kind))
