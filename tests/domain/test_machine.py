"""The state machine, against a table typed out from the reference (recovery-semantics §2.1 to §2.3), not from the code."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from farshore.domain import capabilities as caps
from farshore.domain.capabilities import Capabilities, Direction, Location, Row
from farshore.domain.errors import Code, FarshoreError
from farshore.domain.machine import (
    VSPHERE_TO_AZURE,
    MachineState,
    MainState,
    Operation,
    ResyncState,
    TestState,
    advance,
    advance_test,
    allowed_operations,
    begin,
    cancel,
    fail,
    fail_resync,
    fail_test,
    is_test_transitional,
    is_transitional,
    replicates,
    require_resync,
    succeed,
    succeed_resync,
    succeed_test,
)

EVERYTHING = Row(
    test=True,
    planned=True,
    unplanned=True,
    change_point=True,
    cancel=True,
    repair=True,
    reverse_replicate=True,
    failback=True,
    complete_migration=True,
)
ALL = Capabilities("everything", EVERYTHING, EVERYTHING)
NOTHING = Capabilities("nothing", Row(), Row())

# §2.1, one line a state: operation=state entered. "?" marks what only a capability of §3 allows. What is not named is
# rejected.
REFERENCE = """
Unprotected                        Enable=EnablingProtection
EnablingProtection
EnablingFailed                     Enable=EnablingProtection Disable=DisablingProtection
InitialReplicationInProgress       Disable=DisablingProtection
InitialReplicationFailed           Disable=DisablingProtection Repair=InitialReplicationInProgress
Protected                          Disable=DisablingProtection PlannedFailover?=PlannedFailoverInitiated UnplannedFailover?=UnplannedFailoverInitiated Repair?=Protected TestFailover?=Protected
ProtectedReversed                  Disable=DisablingProtection PlannedFailover?=PlannedFailoverInitiated UnplannedFailover?=UnplannedFailoverInitiated Repair?=ProtectedReversed TestFailover?=ProtectedReversed
PlannedFailoverInitiated
PlannedFailoverCompleting
PlannedFailoverFailed              Disable=DisablingProtection PlannedFailover=PlannedFailoverInitiated UnplannedFailover?=UnplannedFailoverInitiated Cancel?=CancelFailoverInProgressOnRecovery
PlannedFailoverCompletionFailed    Disable=DisablingProtection PlannedFailover=PlannedFailoverInitiated UnplannedFailover?=UnplannedFailoverInitiated Cancel?=CancelFailoverInProgressOnRecovery
UnplannedFailoverInitiated
UnplannedFailoverCompleting
UnplannedFailoverFailed            Disable=DisablingProtection UnplannedFailover=UnplannedFailoverInitiated Cancel?=CancelFailoverInProgressOnRecovery
UnplannedFailoverCompletionFailed  Disable=DisablingProtection UnplannedFailover=UnplannedFailoverInitiated Cancel?=CancelFailoverInProgressOnRecovery
PlannedCommitPending               Disable=DisablingProtection ChangePoint?=ChangeRecoveryPointInitiated Commit=CommitFailoverInProgressOnRecovery Cancel?=CancelFailoverInProgressOnRecovery CompleteMigration?=CompletingMigration
UnplannedCommitPending             Disable=DisablingProtection ChangePoint?=ChangeRecoveryPointInitiated Commit=CommitFailoverInProgressOnRecovery Cancel?=CancelFailoverInProgressOnRecovery CompleteMigration?=CompletingMigration
ChangeRecoveryPointInitiated
ChangeRecoveryPointFailed          Disable=DisablingProtection ChangePoint?=ChangeRecoveryPointInitiated Cancel?=CancelFailoverInProgressOnRecovery
CommitFailoverInProgressOnRecovery
CommitFailoverInProgressOnPrimary
CommitFailoverFailedOnRecovery     Commit=CommitFailoverInProgressOnRecovery
CommitFailoverFailedOnPrimary      Commit=CommitFailoverInProgressOnPrimary
CancelFailoverInProgressOnRecovery
CancelFailoverInProgressOnPrimary
CancelFailoverFailedOnRecovery     Cancel=CancelFailoverInProgressOnRecovery
CancelFailoverFailedOnPrimary      Cancel=CancelFailoverInProgressOnPrimary
Committed                          Disable=DisablingProtection ReverseReplicate?=ReprotectInitiated Failback?=FailbackSync CompleteMigration?=CompletingMigration
ReprotectInitiated
ReprotectFailed                    Disable=DisablingProtection ReverseReplicate=ReprotectInitiated
FailbackSync
FailbackSyncWaiting                Cancel=Committed FinalizeFailback=PlannedFailoverCompleting
DisablingProtection
DisablingFailed                    Disable=DisablingProtection
CompletingMigration
"""


def _reference() -> dict[str, dict[str, tuple[str, bool]]]:
    table: dict[str, dict[str, tuple[str, bool]]] = {}
    for line in REFERENCE.strip().splitlines():
        state, *cells = line.split()
        table[state] = {}
        for cell in cells:
            operation, target = cell.split("=")
            table[state][operation.rstrip("?")] = (target, operation.endswith("?"))
    return table


TABLE = _reference()
AFTER_FLIP = {"PlannedCommitPending", "UnplannedCommitPending", "Committed", "ChangeRecoveryPointFailed"}


def in_state(main: str) -> MachineState:
    """A machine in a state of the main region, standing where such a machine stands."""
    state = MachineState(MainState(main))
    if main in AFTER_FLIP:
        return replace(state, active_location=Location.RECOVERY)
    if main == "ProtectedReversed":
        return replace(state, active_location=Location.RECOVERY, direction=Direction.RECOVERY_TO_PRIMARY)
    if main.startswith("FailbackSync"):
        return replace(
            state,
            active_location=Location.RECOVERY,
            direction=Direction.RECOVERY_TO_PRIMARY,
            failback=True,
        )
    return state


def protected(**changes: object) -> MachineState:
    return replace(MachineState(MainState.PROTECTED), **changes)  # type: ignore[arg-type]


def refused(
    state: MachineState, operation: Operation, row: Capabilities = ALL, **options: bool
) -> FarshoreError:
    with pytest.raises(FarshoreError) as caught:
        begin(state, operation, row, **options)
    assert caught.value.code is Code.OPERATION_NOT_ALLOWED
    return caught.value


def test_the_reference_knows_every_state_and_no_other():
    assert set(TABLE) == {state.value for state in MainState}
    assert len(TABLE) == 35
    named = {op for cells in TABLE.values() for op in cells} | {"TestCleanup"}
    assert named == {op.value for op in Operation}


@pytest.mark.parametrize(
    ("main", "operation"), list(itertools.product(MainState, Operation)), ids=lambda v: v.value
)
def test_every_pair_of_state_and_operation_does_what_the_reference_says(
    main: MainState, operation: Operation
):
    state = in_state(main)
    cell = TABLE[main.value].get(operation.value)
    expected_allowed = set(TABLE[main.value])
    assert {op.value for op in allowed_operations(state, ALL)} == expected_allowed
    if cell is None:
        error = refused(state, operation)
        assert set(error.info.details) == {"state", "test_state", "allowed_operations"}
        assert error.info.details["state"] == main.value
        assert error.info.details["test_state"] == "None"
        assert set(error.info.details["allowed_operations"]) == expected_allowed
        for word in (operation.value, main.value, *expected_allowed):
            assert word in str(error)
        if not expected_allowed:
            assert "Allowed operations: none." in str(error)
        return
    target, optional = cell
    assert begin(state, operation, ALL, fenced=True).main.value == target
    if optional:
        error = refused(state, operation, NOTHING)
        assert "nothing does not offer" in str(error)
        assert operation.value not in error.info.details["allowed_operations"]
    else:
        assert begin(state, operation, NOTHING, fenced=True).main.value == target


# §2.2: state, success, failure, call-off. "-" where there is none; ">" leads to the second half.
TRANSITIONS = """
EnablingProtection                  InitialReplicationInProgress          EnablingFailed                     Unprotected
InitialReplicationInProgress        Protected                             InitialReplicationFailed           -
PlannedFailoverInitiated            >PlannedFailoverCompleting            PlannedFailoverFailed              Protected
PlannedFailoverCompleting           PlannedCommitPending                  PlannedFailoverCompletionFailed    -
UnplannedFailoverInitiated          >UnplannedFailoverCompleting          UnplannedFailoverFailed            -
UnplannedFailoverCompleting         UnplannedCommitPending                UnplannedFailoverCompletionFailed  -
ChangeRecoveryPointInitiated        UnplannedCommitPending                ChangeRecoveryPointFailed          -
CommitFailoverInProgressOnRecovery  >CommitFailoverInProgressOnPrimary    CommitFailoverFailedOnRecovery     -
CommitFailoverInProgressOnPrimary   Committed                             CommitFailoverFailedOnPrimary      -
CancelFailoverInProgressOnRecovery  >CancelFailoverInProgressOnPrimary    CancelFailoverFailedOnRecovery     -
CancelFailoverInProgressOnPrimary   Protected                             CancelFailoverFailedOnPrimary      -
ReprotectInitiated                  ProtectedReversed                     ReprotectFailed                    Committed
FailbackSync                        FailbackSyncWaiting                   Committed                          Committed
DisablingProtection                 Unprotected                           DisablingFailed                    -
CompletingMigration                 Unprotected                           Committed                          -
"""
ENDS = {line.split()[0]: line.split()[1:] for line in TRANSITIONS.strip().splitlines()}


@pytest.mark.parametrize("main", list(MainState), ids=lambda s: s.value)
def test_every_transitional_state_ends_as_the_reference_says(main: MainState):
    state = in_state(main)
    success, failure, call_off = ENDS.get(main.value, ["-", "-", "-"])
    assert is_transitional(state) is (main.value in ENDS)
    for call, target in (
        (lambda s: advance(s, fenced=True), success[1:] if success.startswith(">") else "-"),
        (succeed, "-" if success.startswith(">") else success),
        (fail, failure),
        (cancel, call_off),
    ):
        if target == "-":
            with pytest.raises(FarshoreError):
                call(state)
        else:
            assert call(state).main.value == target


@pytest.mark.parametrize("main", ["PlannedFailoverInitiated", "UnplannedFailoverInitiated"])
def test_nothing_is_promoted_without_a_proven_fence(main: str):
    with pytest.raises(FarshoreError) as caught:
        advance(in_state(main))
    assert caught.value.code is Code.FENCE_NOT_PROVEN
    assert main in str(caught.value)


def test_finishing_a_failback_promotes_too_and_needs_the_fence():
    with pytest.raises(FarshoreError) as caught:
        begin(in_state("FailbackSyncWaiting"), Operation.FINALIZE_FAILBACK, ALL)
    assert caught.value.code is Code.FENCE_NOT_PROVEN


def test_a_planned_failover_can_be_called_off_only_while_its_source_runs():
    state = in_state("PlannedFailoverInitiated")
    assert cancel(state).main is MainState.PROTECTED
    with pytest.raises(FarshoreError, match="its source has been stopped"):
        cancel(state, source_stopped=True)


def test_initial_replication_is_ended_by_disable_and_the_error_says_so():
    with pytest.raises(FarshoreError, match="Disable") as caught:
        cancel(in_state("InitialReplicationInProgress"))
    assert caught.value.info.details["allowed_operations"] == ["Disable"]


# ---- where the machine runs, and which way its data flows -------------------------------------------------------------


def failed_over(kind: Operation, row: Capabilities = ALL) -> MachineState:
    return succeed(advance(begin(protected(), kind, row), fenced=True))


def committed(state: MachineState, row: Capabilities = ALL) -> MachineState:
    return succeed(advance(begin(state, Operation.COMMIT, row)))


@pytest.mark.parametrize("kind", [Operation.PLANNED_FAILOVER, Operation.UNPLANNED_FAILOVER])
def test_the_active_location_flips_when_the_failover_has_succeeded_not_before(kind: Operation):
    state = begin(protected(), kind, ALL)
    assert state.active_location == "Primary"
    state = advance(state, fenced=True)
    assert state.active_location == "Primary"
    assert fail(state).active_location == "Primary"
    assert succeed(state).active_location == "Recovery"


def test_out_and_home_again_through_reverse_replication():
    state = committed(failed_over(Operation.PLANNED_FAILOVER))
    assert (state.main, state.active_location, state.direction) == (
        "Committed",
        "Recovery",
        "PrimaryToRecovery",
    )
    state = succeed(begin(state, Operation.REVERSE_REPLICATE, ALL))
    assert (state.main, state.active_location, state.direction) == (
        "ProtectedReversed",
        "Recovery",
        "RecoveryToPrimary",
    )
    state = succeed(advance(begin(state, Operation.PLANNED_FAILOVER, ALL), fenced=True))
    assert (state.main, state.active_location) == ("PlannedCommitPending", "Primary")
    state = succeed(begin(committed(state), Operation.REVERSE_REPLICATE, ALL))
    assert state == protected()


def test_home_again_from_azure_to_hyper_v_with_the_source_running():
    row = caps.HYPERV_REPLICA_AZURE
    away = committed(failed_over(Operation.PLANNED_FAILOVER, row), row)
    waiting = succeed(begin(away, Operation.FAILBACK, row))
    assert (waiting.main, waiting.direction) == ("FailbackSyncWaiting", "RecoveryToPrimary")
    assert begin(waiting, Operation.CANCEL, row) == away
    state = succeed(begin(waiting, Operation.FINALIZE_FAILBACK, row, fenced=True))
    assert (state.main, state.active_location) == ("PlannedCommitPending", "Primary")
    state = committed(state, row)
    assert set(allowed_operations(state, row)) == {Operation.DISABLE, Operation.REVERSE_REPLICATE}
    assert succeed(begin(state, Operation.REVERSE_REPLICATE, row)) == protected()


def test_home_again_from_azure_to_hyper_v_with_the_source_down():
    row = caps.HYPERV_REPLICA_AZURE
    away = committed(failed_over(Operation.PLANNED_FAILOVER, row), row)
    state = begin(away, Operation.FAILBACK, row, keep_source_running=False)
    assert (state.main, state.direction) == ("PlannedFailoverInitiated", "RecoveryToPrimary")
    assert not replicates(state)
    assert cancel(state) == away
    again = begin(fail(state), Operation.PLANNED_FAILOVER, row)
    assert succeed(advance(again, fenced=True)).active_location == "Primary"


@pytest.mark.parametrize("end", [fail, cancel])
def test_a_failback_that_did_not_happen_leaves_the_machine_as_it_was(end):
    away = committed(failed_over(Operation.UNPLANNED_FAILOVER))
    assert end(begin(away, Operation.FAILBACK, ALL)) == away


def test_a_failback_given_up_after_its_promotion_leads_back_to_committed():
    away = committed(failed_over(Operation.UNPLANNED_FAILOVER))
    home = succeed(
        begin(succeed(begin(away, Operation.FAILBACK, ALL)), Operation.FINALIZE_FAILBACK, ALL, fenced=True)
    )
    assert succeed(advance(begin(home, Operation.CANCEL, ALL))) == away


@pytest.mark.parametrize("kind", [Operation.PLANNED_FAILOVER, Operation.UNPLANNED_FAILOVER])
def test_a_cancelled_failover_is_protected_in_the_old_direction(kind: Operation):
    state = succeed(advance(begin(failed_over(kind), Operation.CANCEL, ALL)))
    assert state == protected()


def test_a_machine_that_is_home_again_has_nowhere_to_fail_back_to():
    home = replace(
        in_state("Committed"), active_location=Location.PRIMARY, direction=Direction.RECOVERY_TO_PRIMARY
    )
    assert "at home already" in str(refused(home, Operation.FAILBACK))


def test_a_cancelled_failover_that_lost_its_deltas_must_resynchronise():
    state = advance(begin(failed_over(Operation.UNPLANNED_FAILOVER), Operation.CANCEL, ALL))
    assert succeed(state, resync_required=True).resync is ResyncState.REQUIRED


def test_a_cancelled_failover_of_a_reversed_machine_stays_at_the_recovery_side():
    state = succeed(
        advance(begin(in_state("ProtectedReversed"), Operation.PLANNED_FAILOVER, ALL), fenced=True)
    )
    assert state.active_location == "Primary"
    assert succeed(advance(begin(state, Operation.CANCEL, ALL))) == in_state("ProtectedReversed")


def test_another_point_after_a_planned_failover_gives_up_zero_loss_for_good():
    state = failed_over(Operation.PLANNED_FAILOVER)
    for _ in range(2):
        state = succeed(begin(state, Operation.CHANGE_POINT, ALL))
        assert state.main is MainState.UNPLANNED_COMMIT_PENDING
        assert state.active_location == "Recovery"


def test_a_san_failover_is_committed_at_once():
    row = caps.HYPERV_REPLICA_SAN
    state = advance(begin(protected(), Operation.PLANNED_FAILOVER, row), fenced=True)
    state = succeed(state, auto_commit=row.row(state.direction).auto_commit)
    assert (state.main, state.active_location) == ("Committed", "Recovery")
    assert set(allowed_operations(state, row)) == {Operation.DISABLE, Operation.REVERSE_REPLICATE}


def test_disable_leaves_nothing_of_the_protection_but_where_the_machine_runs():
    assert (
        succeed(begin(protected(resync=ResyncState.REQUIRED), Operation.DISABLE, ALL))
        == MachineState.initial()
    )
    away = succeed(begin(in_state("Committed"), Operation.DISABLE, ALL))
    assert away == replace(MachineState.initial(), active_location=Location.RECOVERY)
    assert begin(away, Operation.ENABLE, ALL).active_location == "Primary"


# ---- the test region --------------------------------------------------------------------------------------------------

# §2.3: state; then advance, success, failure
TEST_TRANSITIONS = {
    "None": ("-", "-", "-"),
    "Initiated": ("Completing", "-", "Failed"),
    "Completing": ("-", "WaitingForCompletion", "CompletionFailed"),
    "WaitingForCompletion": ("-", "-", "-"),
    "Failed": ("-", "-", "-"),
    "CompletionFailed": ("-", "-", "-"),
    "CleanupInitiated": ("CleanupCompleting", "-", "WaitingForCompletion"),
    "CleanupCompleting": ("-", "MarkedForDeletion", "WaitingForCompletion"),
    "MarkedForDeletion": ("-", "None", "-"),
}
CLEANABLE = {"WaitingForCompletion", "Failed", "CompletionFailed"}


@pytest.mark.parametrize("test", list(TestState), ids=lambda s: s.value)
def test_every_test_state_goes_where_the_reference_says(test: TestState):
    state = protected(test=test)
    for call, target in zip(
        (advance_test, succeed_test, fail_test), TEST_TRANSITIONS[test.value], strict=True
    ):
        if target == "-":
            with pytest.raises(FarshoreError):
                call(state)
        else:
            assert call(state) == protected(test=TestState(target))
    assert is_test_transitional(state) is (
        test.value in {"Initiated", "Completing", "CleanupInitiated", "CleanupCompleting"}
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("test", list(TestState), ids=lambda s: s.value)
def test_what_a_protected_machine_allows_beside_each_test_state(test: TestState, strict: bool):
    allowed = {op.value for op in allowed_operations(protected(test=test), ALL, asr_strict=strict)}
    match test.value:
        case "None" | "MarkedForDeletion":
            expected = {"Disable", "PlannedFailover", "UnplannedFailover", "Repair", "TestFailover"}
        case "WaitingForCompletion" | "Failed" | "CompletionFailed":
            expected = {"TestCleanup"} if strict else {"TestCleanup", "UnplannedFailover"}
        case "Initiated" | "Completing":
            expected = set()
        case _:  # being cleaned up: a disaster does not wait for it
            expected = set() if strict else {"UnplannedFailover"}
    assert allowed == expected


@pytest.mark.parametrize("test", list(TestState), ids=lambda s: s.value)
def test_cleanup_starts_from_an_open_test_only(test: TestState):
    if test.value in CLEANABLE:
        assert begin(protected(test=test), Operation.TEST_CLEANUP, ALL).test is TestState.CLEANUP_INITIATED
    else:
        refused(protected(test=test), Operation.TEST_CLEANUP)


def test_a_test_changes_nothing_but_its_own_region():
    state = begin(protected(), Operation.TEST_FAILOVER, ALL)
    assert state == protected(test=TestState.INITIATED)
    assert replicates(state)


@pytest.mark.parametrize("test", sorted(CLEANABLE))
def test_a_planned_failover_waits_for_the_clean_up_and_the_error_says_so(test: str):
    error = refused(protected(test=TestState(test)), Operation.PLANNED_FAILOVER)
    assert "Clean up the test first" in error.info.recommended_action
    assert test in str(error)
    assert error.info.details["allowed_operations"] == ["UnplannedFailover", "TestCleanup"]


def test_an_open_test_is_cleaned_in_parallel_with_a_disaster():
    state = begin(protected(test=TestState.WAITING_FOR_COMPLETION), Operation.UNPLANNED_FAILOVER, ALL)
    state = begin(state, Operation.TEST_CLEANUP, ALL)
    assert (state.main, state.test) == ("UnplannedFailoverInitiated", "CleanupInitiated")
    state = succeed_test(advance_test(succeed(advance(state, fenced=True))))
    assert (state.main, state.test) == ("UnplannedCommitPending", "MarkedForDeletion")


def test_an_open_test_holds_up_neither_commit_nor_change_of_point_nor_cancel_but_disable():
    state = replace(in_state("UnplannedCommitPending"), test=TestState.WAITING_FOR_COMPLETION)
    assert set(allowed_operations(state, ALL)) == {
        Operation.CHANGE_POINT,
        Operation.COMMIT,
        Operation.CANCEL,
        Operation.TEST_CLEANUP,
    }
    refused(state, Operation.DISABLE)


# ---- the resync region ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resync", list(ResyncState), ids=lambda s: s.value)
def test_an_incomplete_replica_blocks_a_planned_failover_and_never_an_unplanned_one(resync: ResyncState):
    state = protected(resync=resync)
    if resync.value in {"None", "ResynchronizationCompleted"}:
        begin(state, Operation.PLANNED_FAILOVER, ALL)
    else:
        error = refused(state, Operation.PLANNED_FAILOVER)
        assert "Repair" in error.info.recommended_action
        refused(replace(in_state("PlannedFailoverFailed"), resync=resync), Operation.PLANNED_FAILOVER)
    assert begin(state, Operation.UNPLANNED_FAILOVER, ALL).main is MainState.UNPLANNED_FAILOVER_INITIATED


def test_a_resynchronisation_runs_beside_the_protection():
    state = begin(require_resync(protected()), Operation.REPAIR, ALL)
    assert state == protected(resync=ResyncState.INITIATED)
    assert require_resync(state) == state
    refused(state, Operation.REPAIR)
    assert succeed_resync(state).resync is ResyncState.COMPLETED
    assert begin(fail_resync(state), Operation.REPAIR, ALL) == state
    for event in (succeed_resync, fail_resync):
        with pytest.raises(FarshoreError):
            event(protected())


def test_a_failover_in_the_middle_of_a_resynchronisation_leaves_it_required():
    state = begin(protected(resync=ResyncState.INITIATED), Operation.UNPLANNED_FAILOVER, ALL)
    assert state.resync is ResyncState.REQUIRED


# ---- providers --------------------------------------------------------------------------------------------------------

# The names of the enum ReplicationProtectedItemOperation for ours.
ASR = {
    "DisableProtection": "Disable",
    "TestFailoverCleanup": "TestCleanup",
    "RepairReplication": "Repair",
    "ChangePit": "ChangePoint",
}
# §2.4, line by line: provider, state, allowedOperations as the examples of the specification have them.
EXAMPLES = [
    (
        caps.HYPERV_REPLICA_AZURE,
        protected(),
        "PlannedFailover, UnplannedFailover, DisableProtection, TestFailover",
    ),
    (
        caps.HYPERV_REPLICA_AZURE,
        protected(test=TestState.MARKED_FOR_DELETION),
        "PlannedFailover, UnplannedFailover, DisableProtection, TestFailover",
    ),
    (caps.A2A, protected(), "RepairReplication, UnplannedFailover, DisableProtection, TestFailover"),
    (caps.INMAGE_AZURE_V2, protected(), "UnplannedFailover, DisableProtection, TestFailover"),
    (caps.INMAGE_RCM, protected(), "UnplannedFailover, DisableProtection, TestFailover"),
    (caps.INMAGE_RCM_FAILBACK, protected(), "PlannedFailover, DisableProtection"),
    (caps.INMAGE_RCM, in_state("ProtectedReversed"), "PlannedFailover, DisableProtection"),
    (caps.HYPERV_REPLICA_AZURE, protected(test=TestState.WAITING_FOR_COMPLETION), "TestFailoverCleanup"),
    (
        caps.HYPERV_REPLICA_AZURE,
        in_state("UnplannedCommitPending"),
        "CompleteMigration, Commit, DisableProtection, ChangePit",
    ),
    (
        caps.HYPERV_REPLICA_AZURE,
        in_state("PlannedCommitPending"),
        "CompleteMigration, Commit, DisableProtection, ChangePit",
    ),
    (caps.HYPERV_REPLICA_AZURE, in_state("Committed"), "CompleteMigration, DisableProtection, Failback"),
    (caps.HYPERV_REPLICA_AZURE, in_state("InitialReplicationInProgress"), "DisableProtection"),
    (caps.HYPERV_REPLICA_2012, in_state("Committed"), "ReverseReplicate, DisableProtection"),
]


@pytest.mark.parametrize(("row", "state", "examples"), EXAMPLES)
def test_allowed_operations_are_those_of_the_specifications_examples(
    row: Capabilities, state: MachineState, examples: str
):
    expected = {ASR.get(name, name) for name in examples.split(", ")}
    assert {op.value for op in allowed_operations(state, row, asr_strict=True)} == expected


def test_vsphere_to_azure_offers_every_failover_and_not_yet_the_way_home():
    everything = {op for state in MainState for op in allowed_operations(in_state(state), VSPHERE_TO_AZURE)}
    assert everything >= {
        Operation.TEST_FAILOVER,
        Operation.PLANNED_FAILOVER,
        Operation.UNPLANNED_FAILOVER,
        Operation.CHANGE_POINT,
        Operation.CANCEL,
        Operation.COMMIT,
        Operation.REPAIR,
        Operation.DISABLE,
    }
    assert allowed_operations(in_state("Committed"), VSPHERE_TO_AZURE) == (Operation.DISABLE,)


def test_replication_runs_until_the_promotion_and_not_during_an_unplanned_failover():
    assert {state.value for state in MainState if replicates(in_state(state))} == {
        "InitialReplicationInProgress",
        "Protected",
        "ProtectedReversed",
        "PlannedFailoverInitiated",
        "PlannedFailoverFailed",
    }


def test_an_event_that_a_state_does_not_have_is_a_defect_and_is_not_tried_again():
    with pytest.raises(FarshoreError) as caught:
        succeed(protected())
    assert caught.value.code is Code.INTERNAL
    assert not caught.value.retryable


def test_a_state_survives_as_json():
    adapter = TypeAdapter(MachineState)
    for main in MainState:
        state = replace(in_state(main), test=TestState.WAITING_FOR_COMPLETION, resync=ResyncState.REQUIRED)
        assert adapter.validate_json(adapter.dump_json(state)) == state
