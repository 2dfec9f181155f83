"""What each kind of run does, as one table: stages in order, and in each the steps of every machine.

A stage is a barrier: no machine enters the next one before all have ended this one. The order inside a stage is all
machines at once, boot groups one after another, or boot groups backwards. Kinds differ by this data, not by code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from farshore.contract.runs import RunKind
from farshore.domain.machine import MainState, Operation, TestState


class Order(StrEnum):
    TOGETHER = "together"
    BOOT = "boot"
    REVERSE = "reverse"


class Work(StrEnum):
    """Steps of a machine; each is a method of MachineFailover."""

    SEEK_POINT = "seek_point"
    BEGIN = "begin"
    CHECK_SOURCE = "check_source"
    SHUT_DOWN = "shut_down"
    TRY_SHUT_DOWN = "try_shut_down"
    HALT = "halt"
    FINAL_CYCLE = "final_cycle"
    TRY_FINAL_CYCLE = "try_final_cycle"
    FENCE = "fence"
    TRY_FENCE = "try_fence"
    PROMOTE = "promote"
    CHOOSE_POINT = "choose_point"
    REMOVE_FORMER = "remove_former"
    DISKS = "disks"
    NICS = "nics"
    BOOT = "boot"
    SETTLE = "settle"
    REMOVE_TEST = "remove_test"
    REMOVE_REPLICA_MACHINE = "remove_replica_machine"
    START_SOURCE = "start_source"
    COMMIT = "commit"


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    title: str  # what a person reads while it runs
    order: Order
    work: tuple[Work, ...]


@dataclass(frozen=True, slots=True)
class Course:
    """The course of a kind of run."""

    title: str
    operation: Operation
    stages: tuple[Stage, ...]
    stops_at_error: bool  # planned: the plan stops at the first error; else it runs on
    skips_in: frozenset[str]  # main or test states in which a machine is left out instead of refused
    skip_note: str
    is_test: bool = False


_READY = Stage("prepare", "Taking the machines' locks", Order.TOGETHER, (Work.BEGIN,))
_READY_WITH_POINT = Stage(
    "prepare", "Taking the machines' locks", Order.TOGETHER, (Work.SEEK_POINT, Work.BEGIN)
)
_PROMOTE = Stage(
    "failover",
    "Making disks",
    Order.TOGETHER,
    (Work.PROMOTE, Work.CHOOSE_POINT, Work.REMOVE_FORMER, Work.DISKS, Work.NICS),
)
_BOOT = Stage("boot", "Starting machines", Order.BOOT, (Work.BOOT, Work.SETTLE))
_FAILED_OVER = frozenset({MainState.PLANNED_COMMIT_PENDING.value, MainState.UNPLANNED_COMMIT_PENDING.value})
_NOT_FAILED_OVER = frozenset(s.value for s in MainState) - _FAILED_OVER
_NO_TEST = frozenset({TestState.NONE.value, TestState.MARKED_FOR_DELETION.value})


def _failover(
    title: str, operation: Operation, *until_the_source_is_off: Stage, stops_at_error: bool
) -> Course:
    """Both failovers end alike; they differ in what they do to the source before, and in what an error means."""
    return Course(
        title,
        operation,
        (*until_the_source_is_off, _PROMOTE, _BOOT),
        stops_at_error=stops_at_error,
        skips_in=_FAILED_OVER | {MainState.COMMITTED.value},
        skip_note="it has failed over already",
    )


COURSES: Mapping[RunKind, Course] = {
    RunKind.TEST: Course(
        "Test failover",
        Operation.TEST_FAILOVER,
        (
            _READY_WITH_POINT,
            Stage(
                "failover", "Making test disks", Order.TOGETHER, (Work.CHOOSE_POINT, Work.DISKS, Work.NICS)
            ),
            _BOOT,
        ),
        stops_at_error=False,
        skips_in=frozenset(),
        skip_note="",
        is_test=True,
    ),
    RunKind.CLEANUP: Course(
        "Clean-up of the test",
        Operation.TEST_CLEANUP,
        (_READY, Stage("remove", "Removing test machines", Order.REVERSE, (Work.REMOVE_TEST, Work.SETTLE))),
        stops_at_error=False,
        skips_in=_NO_TEST,
        skip_note="no test is open",
        is_test=True,
    ),
    RunKind.PLANNED: _failover(
        "Planned failover",
        Operation.PLANNED_FAILOVER,
        Stage("prepare", "Locks and checks", Order.TOGETHER, (Work.BEGIN, Work.CHECK_SOURCE)),
        Stage("shutdown", "Shutting down source machines", Order.REVERSE, (Work.SHUT_DOWN,)),
        Stage(
            "synchronize",
            "Last changes and proof that the source is off",
            Order.TOGETHER,
            (Work.HALT, Work.FENCE, Work.FINAL_CYCLE),
        ),
        stops_at_error=True,
    ),
    RunKind.UNPLANNED: _failover(
        "Unplanned failover",
        Operation.UNPLANNED_FAILOVER,
        _READY_WITH_POINT,
        Stage(
            "shutdown",
            "Shutting down what can be reached",
            Order.TOGETHER,
            (Work.TRY_SHUT_DOWN, Work.HALT, Work.TRY_FENCE, Work.TRY_FINAL_CYCLE),
        ),
        stops_at_error=False,
    ),
    RunKind.CHANGE_POINT: Course(
        "Change of recovery point",
        Operation.CHANGE_POINT,
        (
            _READY_WITH_POINT,
            Stage(
                "failover",
                "Replacing disks",
                Order.TOGETHER,
                (Work.CHOOSE_POINT, Work.REMOVE_FORMER, Work.DISKS, Work.NICS),
            ),
            _BOOT,
        ),
        stops_at_error=False,
        skips_in=_NOT_FAILED_OVER - {MainState.CHANGE_RECOVERY_POINT_FAILED.value},
        skip_note="it has no failover to change",
    ),
    RunKind.COMMIT: Course(
        "Commit",
        Operation.COMMIT,
        (_READY, Stage("commit", "Committing", Order.TOGETHER, (Work.COMMIT, Work.SETTLE))),
        stops_at_error=False,
        skips_in=_NOT_FAILED_OVER
        - {
            MainState.COMMIT_FAILOVER_FAILED_ON_RECOVERY.value,
            MainState.COMMIT_FAILOVER_FAILED_ON_PRIMARY.value,
        },
        skip_note="it has no failover to commit",
    ),
    RunKind.CANCEL: Course(
        "Cancel of the failover",
        Operation.CANCEL,
        (
            _READY,
            Stage("remove", "Removing recovered machines", Order.REVERSE, (Work.REMOVE_REPLICA_MACHINE,)),
            Stage("start", "Starting source machines", Order.BOOT, (Work.START_SOURCE, Work.SETTLE)),
        ),
        stops_at_error=False,
        skips_in=frozenset(
            {
                MainState.PROTECTED.value,
                MainState.COMMITTED.value,
                MainState.INITIAL_REPLICATION_IN_PROGRESS.value,
            }
        ),
        skip_note="it has no failover to cancel",
    ),
}
