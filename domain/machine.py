"""The protected machine: what may be asked of it, and what becomes of it. Pure: a state in, a state or an error out.

The tables are in `machine_table.py`, what a provider offers in `capabilities.py`; this module looks things up and
keeps the three facts that the tables leave out: where the machine runs, which way its data flows, and that nothing is
promoted without a fence. A rejected operation changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from farshore.domain.capabilities import VSPHERE_TO_AZURE, Capabilities, Direction, Location, Row
from farshore.domain.errors import Code, FarshoreError
from farshore.domain.machine_table import (
    DESPITE_TEST,
    EVENTS,
    NO_TEST,
    OPERATIONS,
    REPLICA_INCOMPLETE,
    REPLICATING,
    TEST_BEING_MADE,
    TEST_CLEANABLE,
    TEST_EVENTS,
    Health,
    MainState,
    Operation,
    ResyncState,
    TestState,
)

__all__ = [
    "VSPHERE_TO_AZURE",
    "Capabilities",
    "Direction",
    "Health",
    "Location",
    "MachineState",
    "MainState",
    "Operation",
    "ResyncState",
    "Row",
    "TestState",
    "advance",
    "advance_test",
    "allowed_operations",
    "begin",
    "cancel",
    "fail",
    "fail_resync",
    "fail_test",
    "is_test_transitional",
    "is_transitional",
    "replicates",
    "require_resync",
    "succeed",
    "succeed_resync",
    "succeed_test",
    "with_health",
]

_PROTECTED = frozenset({MainState.PROTECTED, MainState.PROTECTED_REVERSED})
_HOME_AGAIN = _PROTECTED | {MainState.COMMITTED, MainState.UNPROTECTED}


@dataclass(frozen=True, slots=True)
class MachineState:
    """The four regions of a machine, where it runs and which way its data flows.

    `failback` is true from the start of a failback that has no reverse protection (Azure to Hyper-V) until it is
    committed or given up: giving it up leads back to Committed, not to a protected state.
    """

    main: MainState
    test: TestState = TestState.NONE
    resync: ResyncState = ResyncState.NONE
    health: Health = Health.NORMAL
    active_location: Location = Location.PRIMARY
    direction: Direction = Direction.PRIMARY_TO_RECOVERY
    failback: bool = False

    @classmethod
    def initial(cls) -> MachineState:
        """A machine that nobody protects yet."""
        return cls(MainState.UNPROTECTED)


def allowed_operations(
    state: MachineState, capabilities: Capabilities, *, asr_strict: bool = False
) -> tuple[Operation, ...]:
    """What `begin` would accept now, in the order of `Operation`.

    `asr_strict` offers only the clean-up while a test is open, as Azure Site Recovery does.
    """
    return tuple(op for op in Operation if _refusal(state, op, capabilities, asr_strict) is None)


def begin(
    state: MachineState,
    operation: Operation,
    capabilities: Capabilities,
    *,
    asr_strict: bool = False,
    fenced: bool = False,
    keep_source_running: bool = True,
) -> MachineState:
    """The state that an operation enters.

    `fenced` matters to FinalizeFailback only, which promotes at once: the source is off and cannot write.
    `keep_source_running=False` makes Failback copy while the source is down (no waiting in between).

    Raises OperationNotAllowed (details: state, test_state, allowed_operations) and FenceNotProven.
    """
    refusal = _refusal(state, operation, capabilities, asr_strict)
    if refusal is not None:
        reason, action = refusal
        allowed = allowed_operations(state, capabilities, asr_strict=asr_strict)
        raise FarshoreError(
            Code.OPERATION_NOT_ALLOWED,
            f"{operation} is not allowed now: {reason} State: {state.main}; test: {state.test}. "
            f"Allowed operations: {', '.join(allowed) or 'none'}.",
            causes=(reason,),
            action=action,
            details={
                "state": state.main.value,
                "test_state": state.test.value,
                "allowed_operations": [op.value for op in allowed],
            },
        )
    if operation is Operation.TEST_FAILOVER:
        return replace(state, test=TestState.INITIATED)
    if operation is Operation.TEST_CLEANUP:
        return replace(state, test=TestState.CLEANUP_INITIATED)
    if operation is Operation.REPAIR and state.main in _PROTECTED:
        return replace(state, resync=ResyncState.INITIATED)
    if operation is Operation.FINALIZE_FAILBACK and not fenced:
        raise _fence_not_proven(state)

    entered = OPERATIONS[state.main][operation].enters
    if operation is Operation.ENABLE:
        return _enter(MachineState(entered, test=state.test), entered)
    if operation is Operation.FAILBACK:
        if not keep_source_running:
            entered = MainState.PLANNED_FAILOVER_INITIATED
        return replace(state, main=entered, direction=state.direction.reversed, failback=True)
    if operation is Operation.CANCEL and entered is MainState.COMMITTED:
        state = _given_up(state)  # only a copy is dropped
    if operation is Operation.UNPLANNED_FAILOVER and state.resync is ResyncState.INITIATED:
        state = replace(state, resync=ResyncState.REQUIRED)  # interrupted; the choice of point must know
    return _enter(state, entered)


def advance(state: MachineState, *, fenced: bool = False) -> MachineState:
    """The second half of a transitional state: Initiated to Completing, on the recovery side to on the primary side.

    Raises FenceNotProven when this would promote a replica and `fenced` is false.
    """
    ends = EVENTS.get(state.main)
    if ends is None or ends.advance is None:
        raise _no_such_event("advance", state.main)
    if ends.promotes and not fenced:
        raise _fence_not_proven(state)
    return _enter(state, ends.advance)


def succeed(state: MachineState, *, auto_commit: bool = False, resync_required: bool = False) -> MachineState:
    """The work of a transitional state is done.

    `auto_commit`: the provider commits a failover at once (`Row.auto_commit`). `resync_required`: a cancelled failover
    has lost the record of what changed, so that the replica must be compared again.
    """
    ends = EVENTS.get(state.main)
    if ends is None or ends.succeed is None:
        raise _no_such_event("succeed", state.main)
    target = ends.succeed
    match state.main:
        case MainState.PLANNED_FAILOVER_COMPLETING | MainState.UNPLANNED_FAILOVER_COMPLETING:
            if auto_commit:
                target = MainState.COMMITTED
            return _enter(replace(state, active_location=state.direction.target), target)
        case MainState.CANCEL_FAILOVER_IN_PROGRESS_ON_PRIMARY:
            if state.failback:
                return _enter(_given_up(state), MainState.COMMITTED)
            resync = ResyncState.REQUIRED if resync_required else state.resync
            return _enter(_given_up(replace(state, resync=resync)), target)
        case MainState.REPROTECT_INITIATED:
            return _enter(replace(state, direction=state.direction.reversed, resync=ResyncState.NONE), target)
        case MainState.DISABLING_PROTECTION | MainState.COMPLETING_MIGRATION:
            # The machine goes on running where it runs; nothing else of the protection is left.
            return MachineState(target, test=state.test, active_location=state.active_location)
        case _:
            return _enter(state, target)


def fail(state: MachineState) -> MachineState:
    """The work of a transitional state has failed; the state that follows says what is left."""
    ends = EVENTS.get(state.main)
    if ends is None or ends.fail is None:
        raise _no_such_event("fail", state.main)
    if state.main is MainState.FAILBACK_SYNC:
        state = _given_up(state)
    return _enter(state, ends.fail)


def cancel(state: MachineState, *, source_stopped: bool = False) -> MachineState:
    """The running job is called off (a person cancels the run, not the failover).

    A planned failover can be called off only while its source has not been stopped. Raises OperationNotAllowed where
    the work can only go on or fail.
    """
    ends = EVENTS.get(state.main)
    if ends is None or ends.cancel is None or (ends.promotes and source_stopped):
        why = "its source has been stopped" if ends and ends.cancel else "work in this state runs to its end"
        if state.main is MainState.INITIAL_REPLICATION_IN_PROGRESS:
            why = "initial replication ends with Disable"
        raise FarshoreError(
            Code.OPERATION_NOT_ALLOWED,
            f"The run cannot be called off: {why}. State: {state.main}; test: {state.test}.",
            causes=("The point of no return is passed, or nothing is running.",),
            action="Let the work end, then choose among the operations that the machine allows.",
            details={
                "state": state.main.value,
                "test_state": state.test.value,
                "allowed_operations": [op.value for op in OPERATIONS.get(state.main, {})],
            },
        )
    target = ends.cancel
    if state.failback:
        state, target = _given_up(state), MainState.COMMITTED
    return _enter(state, target)


def advance_test(state: MachineState) -> MachineState:
    """The second half of a test or of its clean-up."""
    ends = TEST_EVENTS.get(state.test)
    if ends is None or ends.advance is None:
        raise _no_such_event("advance_test", state.test)
    return replace(state, test=ends.advance)


def succeed_test(state: MachineState) -> MachineState:
    """A test is ready for its users, its clean-up is done, or what it left has been deleted."""
    ends = TEST_EVENTS.get(state.test)
    if ends is None or ends.succeed is None:
        raise _no_such_event("succeed_test", state.test)
    return replace(state, test=ends.succeed)


def fail_test(state: MachineState) -> MachineState:
    """A test or its clean-up has failed. A failed clean-up waits again, with the list of left-overs in its result."""
    ends = TEST_EVENTS.get(state.test)
    if ends is None or ends.fail is None:
        raise _no_such_event("fail_test", state.test)
    return replace(state, test=ends.fail)


def require_resync(state: MachineState) -> MachineState:
    """The replica may lack something: it must be compared with the source. Blocks planned failover."""
    if state.resync is ResyncState.INITIATED:
        return state  # the comparison that runs will find it
    return replace(state, resync=ResyncState.REQUIRED)


def succeed_resync(state: MachineState) -> MachineState:
    """The resynchronisation has ended well."""
    return _end_resync(state, ResyncState.COMPLETED, "succeed_resync")


def fail_resync(state: MachineState) -> MachineState:
    """The resynchronisation has failed; it stays required."""
    return _end_resync(state, ResyncState.FAILED, "fail_resync")


def with_health(state: MachineState, health: Health) -> MachineState:
    """The same state with another health."""
    return replace(state, health=health)


def is_transitional(state: MachineState) -> bool:
    """Whether work of the main region is under way (§2.2), initial replication included, which accepts Disable."""
    return state.main in EVENTS


def is_test_transitional(state: MachineState) -> bool:
    """Whether a test is being made or cleaned up. MarkedForDeletion is not: it counts as no test."""
    return state.test in TEST_EVENTS and state.test not in NO_TEST


def replicates(state: MachineState) -> bool:
    """Whether replication cycles run.

    They run from initial replication on; in a planned failover until the promotion, since its last data come from a
    cycle, and after one that failed before it, since the source is still the owner. An unplanned failover stops them
    at once and for good: only cancel or reprotect lead back. A failback without reverse protection copies by itself.
    """
    return state.main in REPLICATING and not state.failback


# ---------------------------------------------------------------------------------------------------------------------


def _refusal(
    state: MachineState, operation: Operation, capabilities: Capabilities, asr_strict: bool
) -> tuple[str, str | None] | None:
    """Why the operation is refused and what to do about it (None: the catalogue's advice); None if it is allowed."""
    row = capabilities.row(state.direction)
    if operation is Operation.TEST_CLEANUP:
        return _refusal_of_cleanup(state)
    if state.test not in NO_TEST and (asr_strict or operation not in DESPITE_TEST):
        return _open_test(state, operation)
    if state.test in TEST_BEING_MADE:
        return (
            "A test failover is being made.",
            "Wait until the test is ready or abort its run, then start again.",
        )
    if operation is Operation.TEST_FAILOVER:
        if state.main not in _PROTECTED:
            return "A test starts from a protected machine only.", None
        return None if row.test else _not_offered(operation, capabilities, state)
    cell = OPERATIONS.get(state.main, {}).get(operation)
    if cell is None:
        if state.main in EVENTS:
            return (
                "The machine is in the middle of another operation.",
                "Wait until that operation has ended.",
            )
        return "The state does not accept it.", None
    if operation is Operation.FAILBACK and state.active_location is Location.PRIMARY:
        return "The machine is at home already.", None
    if cell.needs is not None and not getattr(row, cell.needs):
        return _not_offered(operation, capabilities, state)
    if operation is Operation.PLANNED_FAILOVER and state.resync in REPLICA_INCOMPLETE:
        return (
            f"The replica must be resynchronised first (it is {state.resync}).",
            "Start Repair and wait until it has ended. An unplanned failover is possible meanwhile.",
        )
    if operation is Operation.REPAIR and state.resync is ResyncState.INITIATED:
        return "A resynchronisation is running already.", "Wait until it has ended."
    return None


def _refusal_of_cleanup(state: MachineState) -> tuple[str, str | None] | None:
    if state.test in TEST_CLEANABLE:
        return None
    if state.test in NO_TEST:
        return "There is no test to clean up.", None
    if state.test in TEST_BEING_MADE:
        return "The test is still being made.", "Wait until the test is ready or has failed."
    return "The clean-up is running already.", "Wait until it has ended."


def _open_test(state: MachineState, operation: Operation) -> tuple[str, str]:
    if state.test in TEST_CLEANABLE:
        return (
            f"A test failover is open ({state.test}).",
            f"Clean up the test first (TestCleanup), then start {operation} again.",
        )
    return (
        f"A test failover is at work ({state.test}).",
        f"Wait until it has ended, clean up the test if it is open, then start {operation} again.",
    )


def _not_offered(operation: Operation, capabilities: Capabilities, state: MachineState) -> tuple[str, str]:
    return (
        f"{capabilities.provider} does not offer {operation} in the direction {state.direction}.",
        "Choose one of the allowed operations.",
    )


def _enter(state: MachineState, target: MainState) -> MachineState:
    """The state with another main region, and what follows from that alone."""
    if target is MainState.PROTECTED and state.direction is Direction.RECOVERY_TO_PRIMARY:
        target = MainState.PROTECTED_REVERSED
    resync = ResyncState.NONE if target in (MainState.COMMITTED, MainState.UNPROTECTED) else state.resync
    failback = state.failback and target not in _HOME_AGAIN
    return replace(state, main=target, resync=resync, failback=failback)


def _given_up(state: MachineState) -> MachineState:
    """A failover or failback that did not happen: the machine runs where it ran before.

    A failback without reverse protection also turns the direction back, since nothing ever flowed that way.
    """
    if not state.failback:
        return replace(state, active_location=state.direction.source)
    return replace(state, active_location=Location.RECOVERY, direction=Direction.PRIMARY_TO_RECOVERY)


def _end_resync(state: MachineState, end: ResyncState, event: str) -> MachineState:
    if state.resync is not ResyncState.INITIATED:
        raise _no_such_event(event, state.resync)
    return replace(state, resync=end)


def _fence_not_proven(state: MachineState) -> FarshoreError:
    return FarshoreError(
        Code.FENCE_NOT_PROVEN,
        f"The replica is not made the writer: nothing proves that the machine at the "
        f"{state.direction.source} side cannot write any more. State: {state.main}.",
        details={"state": state.main.value},
    )


def _no_such_event(event: str, state: MainState | TestState | ResyncState) -> FarshoreError:
    return FarshoreError(
        Code.INTERNAL,
        f"The event {event} does not exist in the state {state}.",
        retryable=False,
        details={"state": str(state), "event": event},
    )
