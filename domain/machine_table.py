"""The state machine of a protected machine as data: §2 of the recovery semantics, one table a region.

`OPERATIONS` says what a person may ask for in a state and which state that enters; `EVENTS` says where the work that
then runs can end. `machine.py` only looks things up here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class MainState(StrEnum):
    """The main region. The value is what people read."""

    UNPROTECTED = "Unprotected"
    ENABLING_PROTECTION = "EnablingProtection"
    ENABLING_FAILED = "EnablingFailed"
    INITIAL_REPLICATION_IN_PROGRESS = "InitialReplicationInProgress"
    INITIAL_REPLICATION_FAILED = "InitialReplicationFailed"
    PROTECTED = "Protected"
    PROTECTED_REVERSED = "ProtectedReversed"
    PLANNED_FAILOVER_INITIATED = "PlannedFailoverInitiated"
    PLANNED_FAILOVER_COMPLETING = "PlannedFailoverCompleting"
    PLANNED_FAILOVER_FAILED = "PlannedFailoverFailed"
    PLANNED_FAILOVER_COMPLETION_FAILED = "PlannedFailoverCompletionFailed"
    UNPLANNED_FAILOVER_INITIATED = "UnplannedFailoverInitiated"
    UNPLANNED_FAILOVER_COMPLETING = "UnplannedFailoverCompleting"
    UNPLANNED_FAILOVER_FAILED = "UnplannedFailoverFailed"
    UNPLANNED_FAILOVER_COMPLETION_FAILED = "UnplannedFailoverCompletionFailed"
    PLANNED_COMMIT_PENDING = "PlannedCommitPending"
    UNPLANNED_COMMIT_PENDING = "UnplannedCommitPending"
    CHANGE_RECOVERY_POINT_INITIATED = "ChangeRecoveryPointInitiated"
    CHANGE_RECOVERY_POINT_FAILED = "ChangeRecoveryPointFailed"
    COMMIT_FAILOVER_IN_PROGRESS_ON_RECOVERY = "CommitFailoverInProgressOnRecovery"
    COMMIT_FAILOVER_IN_PROGRESS_ON_PRIMARY = "CommitFailoverInProgressOnPrimary"
    COMMIT_FAILOVER_FAILED_ON_RECOVERY = "CommitFailoverFailedOnRecovery"
    COMMIT_FAILOVER_FAILED_ON_PRIMARY = "CommitFailoverFailedOnPrimary"
    CANCEL_FAILOVER_IN_PROGRESS_ON_RECOVERY = "CancelFailoverInProgressOnRecovery"
    CANCEL_FAILOVER_IN_PROGRESS_ON_PRIMARY = "CancelFailoverInProgressOnPrimary"
    CANCEL_FAILOVER_FAILED_ON_RECOVERY = "CancelFailoverFailedOnRecovery"
    CANCEL_FAILOVER_FAILED_ON_PRIMARY = "CancelFailoverFailedOnPrimary"
    COMMITTED = "Committed"
    REPROTECT_INITIATED = "ReprotectInitiated"
    REPROTECT_FAILED = "ReprotectFailed"
    FAILBACK_SYNC = "FailbackSync"
    FAILBACK_SYNC_WAITING = "FailbackSyncWaiting"
    DISABLING_PROTECTION = "DisablingProtection"
    DISABLING_FAILED = "DisablingFailed"
    COMPLETING_MIGRATION = "CompletingMigration"


class TestState(StrEnum):
    """The test failover region, beside the main one: replication goes on throughout."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    NONE = "None"
    INITIATED = "Initiated"
    COMPLETING = "Completing"
    WAITING_FOR_COMPLETION = "WaitingForCompletion"
    FAILED = "Failed"
    COMPLETION_FAILED = "CompletionFailed"
    CLEANUP_INITIATED = "CleanupInitiated"
    CLEANUP_COMPLETING = "CleanupCompleting"
    MARKED_FOR_DELETION = "MarkedForDeletion"


class ResyncState(StrEnum):
    """The resynchronisation region. Required, Initiated and Failed mean that the replica lacks something."""

    NONE = "None"
    REQUIRED = "ResyncRequired"
    INITIATED = "ResynchronizationInitiated"
    COMPLETED = "ResynchronizationCompleted"
    FAILED = "ResynchronizationFailed"


class Health(StrEnum):
    """How replication is doing. It informs; it never decides what is allowed."""

    NORMAL = "Normal"
    WARNING = "Warning"
    CRITICAL = "Critical"


class Operation(StrEnum):
    """What a person or a run may ask of a machine."""

    ENABLE = "Enable"
    DISABLE = "Disable"
    PLANNED_FAILOVER = "PlannedFailover"
    UNPLANNED_FAILOVER = "UnplannedFailover"
    CHANGE_POINT = "ChangePoint"
    COMMIT = "Commit"
    CANCEL = "Cancel"
    REVERSE_REPLICATE = "ReverseReplicate"
    FAILBACK = "Failback"
    FINALIZE_FAILBACK = "FinalizeFailback"
    REPAIR = "Repair"
    COMPLETE_MIGRATION = "CompleteMigration"
    TEST_FAILOVER = "TestFailover"
    TEST_CLEANUP = "TestCleanup"


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of §2.1: the state entered, and the capability (a field of `Row`) that it needs, if any."""

    enters: MainState
    needs: str | None = None


@dataclass(frozen=True, slots=True)
class Ends:
    """A row of §2.2. None: this cannot happen in the state.

    The target PROTECTED means ProtectedReversed where the data flows from recovery to primary.
    """

    advance: MainState | None = None
    succeed: MainState | None = None
    fail: MainState | None = None
    cancel: MainState | None = None
    promotes: bool = False  # `advance` makes the replica the writer: only with a proven fence


M, O = MainState, Operation  # noqa: E741  the table below is read as a table

_EN = Cell(M.ENABLING_PROTECTION)
_DI = Cell(M.DISABLING_PROTECTION)
_IR = Cell(M.INITIAL_REPLICATION_IN_PROGRESS)
_PF = Cell(M.PLANNED_FAILOVER_INITIATED)
_PF_P = Cell(M.PLANNED_FAILOVER_INITIATED, "planned")
_UF = Cell(M.UNPLANNED_FAILOVER_INITIATED)
_UF_P = Cell(M.UNPLANNED_FAILOVER_INITIATED, "unplanned")
_CP = Cell(M.CHANGE_RECOVERY_POINT_INITIATED, "change_point")
_CM_R = Cell(M.COMMIT_FAILOVER_IN_PROGRESS_ON_RECOVERY)
_CM_P = Cell(M.COMMIT_FAILOVER_IN_PROGRESS_ON_PRIMARY)  # a retry goes on where it failed
_CA = Cell(M.CANCEL_FAILOVER_IN_PROGRESS_ON_RECOVERY, "cancel")
_CA_R = Cell(M.CANCEL_FAILOVER_IN_PROGRESS_ON_RECOVERY)
_CA_P = Cell(M.CANCEL_FAILOVER_IN_PROGRESS_ON_PRIMARY)
_RP = Cell(M.REPROTECT_INITIATED)
_RP_P = Cell(M.REPROTECT_INITIATED, "reverse_replicate")
_FS = Cell(M.FAILBACK_SYNC, "failback")
_MG = Cell(M.COMPLETING_MIGRATION, "complete_migration")

Cells = Mapping[Operation, Cell]

# Repair in a protected state enters the resync region and leaves the main one where it is.
_AT_REST_OPERATIONS: Cells = {O.DISABLE: _DI, O.PLANNED_FAILOVER: _PF_P, O.UNPLANNED_FAILOVER: _UF_P}
_AT_REST: Mapping[MainState, Cells] = {
    state: {**_AT_REST_OPERATIONS, O.REPAIR: Cell(state, "repair")}
    for state in (M.PROTECTED, M.PROTECTED_REVERSED)
}


def _same(states: Iterable[MainState], cells: Cells) -> dict[MainState, Cells]:
    return dict.fromkeys(states, cells)


# §2.1. A state that is not here accepts no operation of the main region. Numbers are the reference's rows.
OPERATIONS: Mapping[MainState, Cells] = {
    M.UNPROTECTED: {O.ENABLE: _EN},  # 0
    M.ENABLING_FAILED: {O.ENABLE: _EN, O.DISABLE: _DI},  # 1
    M.INITIAL_REPLICATION_IN_PROGRESS: {O.DISABLE: _DI},  # 2
    M.INITIAL_REPLICATION_FAILED: {O.DISABLE: _DI, O.REPAIR: _IR},  # 3
    **_AT_REST,  # 4, 5
    **_same(  # 6
        (M.PLANNED_FAILOVER_FAILED, M.PLANNED_FAILOVER_COMPLETION_FAILED),
        {O.DISABLE: _DI, O.PLANNED_FAILOVER: _PF, O.UNPLANNED_FAILOVER: _UF_P, O.CANCEL: _CA},
    ),
    **_same(  # 7
        (M.UNPLANNED_FAILOVER_FAILED, M.UNPLANNED_FAILOVER_COMPLETION_FAILED),
        {O.DISABLE: _DI, O.UNPLANNED_FAILOVER: _UF, O.CANCEL: _CA},
    ),
    **_same(  # 8
        (M.PLANNED_COMMIT_PENDING, M.UNPLANNED_COMMIT_PENDING),
        {O.DISABLE: _DI, O.CHANGE_POINT: _CP, O.COMMIT: _CM_R, O.CANCEL: _CA, O.COMPLETE_MIGRATION: _MG},
    ),
    M.CHANGE_RECOVERY_POINT_FAILED: {O.DISABLE: _DI, O.CHANGE_POINT: _CP, O.CANCEL: _CA},  # 9
    M.COMMIT_FAILOVER_FAILED_ON_RECOVERY: {O.COMMIT: _CM_R},  # 10
    M.COMMIT_FAILOVER_FAILED_ON_PRIMARY: {O.COMMIT: _CM_P},  # 10
    M.CANCEL_FAILOVER_FAILED_ON_RECOVERY: {O.CANCEL: _CA_R},  # 11
    M.CANCEL_FAILOVER_FAILED_ON_PRIMARY: {O.CANCEL: _CA_P},  # 11
    # 12; a failback with the source down enters PlannedFailoverInitiated instead
    M.COMMITTED: {O.DISABLE: _DI, O.REVERSE_REPLICATE: _RP_P, O.FAILBACK: _FS, O.COMPLETE_MIGRATION: _MG},
    M.REPROTECT_FAILED: {O.DISABLE: _DI, O.REVERSE_REPLICATE: _RP},  # 13
    M.FAILBACK_SYNC_WAITING: {  # 14; cancel only drops the copy
        O.CANCEL: Cell(M.COMMITTED),
        O.FINALIZE_FAILBACK: Cell(M.PLANNED_FAILOVER_COMPLETING),
    },
    M.DISABLING_FAILED: {O.DISABLE: _DI},  # 15
}

# §2.2. A state that is not here is settled.
EVENTS: Mapping[MainState, Ends] = {
    M.ENABLING_PROTECTION: Ends(
        succeed=M.INITIAL_REPLICATION_IN_PROGRESS, fail=M.ENABLING_FAILED, cancel=M.UNPROTECTED
    ),
    M.INITIAL_REPLICATION_IN_PROGRESS: Ends(succeed=M.PROTECTED, fail=M.INITIAL_REPLICATION_FAILED),
    M.PLANNED_FAILOVER_INITIATED: Ends(
        advance=M.PLANNED_FAILOVER_COMPLETING,
        fail=M.PLANNED_FAILOVER_FAILED,
        cancel=M.PROTECTED,
        promotes=True,
    ),
    M.PLANNED_FAILOVER_COMPLETING: Ends(
        succeed=M.PLANNED_COMMIT_PENDING, fail=M.PLANNED_FAILOVER_COMPLETION_FAILED
    ),
    M.UNPLANNED_FAILOVER_INITIATED: Ends(
        advance=M.UNPLANNED_FAILOVER_COMPLETING, fail=M.UNPLANNED_FAILOVER_FAILED, promotes=True
    ),
    M.UNPLANNED_FAILOVER_COMPLETING: Ends(
        succeed=M.UNPLANNED_COMMIT_PENDING, fail=M.UNPLANNED_FAILOVER_COMPLETION_FAILED
    ),
    # Another point than the last one is a loss, also after a planned failover: the label says so from then on.
    M.CHANGE_RECOVERY_POINT_INITIATED: Ends(
        succeed=M.UNPLANNED_COMMIT_PENDING, fail=M.CHANGE_RECOVERY_POINT_FAILED
    ),
    M.COMMIT_FAILOVER_IN_PROGRESS_ON_RECOVERY: Ends(
        advance=M.COMMIT_FAILOVER_IN_PROGRESS_ON_PRIMARY, fail=M.COMMIT_FAILOVER_FAILED_ON_RECOVERY
    ),
    M.COMMIT_FAILOVER_IN_PROGRESS_ON_PRIMARY: Ends(
        succeed=M.COMMITTED, fail=M.COMMIT_FAILOVER_FAILED_ON_PRIMARY
    ),
    M.CANCEL_FAILOVER_IN_PROGRESS_ON_RECOVERY: Ends(
        advance=M.CANCEL_FAILOVER_IN_PROGRESS_ON_PRIMARY, fail=M.CANCEL_FAILOVER_FAILED_ON_RECOVERY
    ),
    M.CANCEL_FAILOVER_IN_PROGRESS_ON_PRIMARY: Ends(
        succeed=M.PROTECTED, fail=M.CANCEL_FAILOVER_FAILED_ON_PRIMARY
    ),
    M.REPROTECT_INITIATED: Ends(succeed=M.PROTECTED, fail=M.REPROTECT_FAILED, cancel=M.COMMITTED),
    M.FAILBACK_SYNC: Ends(succeed=M.FAILBACK_SYNC_WAITING, fail=M.COMMITTED, cancel=M.COMMITTED),
    M.DISABLING_PROTECTION: Ends(succeed=M.UNPROTECTED, fail=M.DISABLING_FAILED),
    M.COMPLETING_MIGRATION: Ends(succeed=M.UNPROTECTED, fail=M.COMMITTED),
}


@dataclass(frozen=True, slots=True)
class TestEnds:
    """A row of §2.3: where the test's own work can end."""

    __test__ = False

    advance: TestState | None = None
    succeed: TestState | None = None
    fail: TestState | None = None


TEST_EVENTS: Mapping[TestState, TestEnds] = {
    TestState.INITIATED: TestEnds(advance=TestState.COMPLETING, fail=TestState.FAILED),
    TestState.COMPLETING: TestEnds(
        succeed=TestState.WAITING_FOR_COMPLETION, fail=TestState.COMPLETION_FAILED
    ),
    TestState.CLEANUP_INITIATED: TestEnds(
        advance=TestState.CLEANUP_COMPLETING, fail=TestState.WAITING_FOR_COMPLETION
    ),
    TestState.CLEANUP_COMPLETING: TestEnds(
        succeed=TestState.MARKED_FOR_DELETION, fail=TestState.WAITING_FOR_COMPLETION
    ),
    TestState.MARKED_FOR_DELETION: TestEnds(succeed=TestState.NONE),
}

NO_TEST = frozenset({TestState.NONE, TestState.MARKED_FOR_DELETION})  # [SPEC]: both offer every operation
TEST_BEING_MADE = frozenset({TestState.INITIATED, TestState.COMPLETING})
TEST_CLEANABLE = frozenset({TestState.WAITING_FOR_COMPLETION, TestState.FAILED, TestState.COMPLETION_FAILED})
# What an open test does not hold up: a disaster and what follows it. The test is cleaned up in parallel. Everything
# else would leave the test's machine without an owner, or would change what the test stands on.
DESPITE_TEST = frozenset({O.UNPLANNED_FAILOVER, O.CHANGE_POINT, O.COMMIT, O.CANCEL})

REPLICA_INCOMPLETE = frozenset({ResyncState.REQUIRED, ResyncState.INITIATED, ResyncState.FAILED})

REPLICATING = frozenset(
    {
        M.INITIAL_REPLICATION_IN_PROGRESS,
        M.PROTECTED,
        M.PROTECTED_REVERSED,
        M.PLANNED_FAILOVER_INITIATED,
        M.PLANNED_FAILOVER_FAILED,
    }
)
