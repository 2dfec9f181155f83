"""However operations and events follow one another, a machine never stands in a state that nobody has described."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.domain import capabilities as caps
from farshore.domain import machine as m
from farshore.domain.capabilities import Capabilities, Row
from farshore.domain.errors import Code, FarshoreError
from farshore.domain.machine import MachineState, MainState, Operation, ResyncState, TestState

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
PROVIDERS = (*caps.ALL, Capabilities("everything", EVERYTHING, EVERYTHING))

Step = Callable[[MachineState, Capabilities, bool], MachineState]


def _operation(operation: Operation, fenced: bool, keep: bool) -> Step:
    return lambda s, c, strict: m.begin(
        s, operation, c, asr_strict=strict, fenced=fenced, keep_source_running=keep
    )


def _succeed(lost: bool) -> Step:
    return lambda s, c, _: m.succeed(s, auto_commit=c.row(s.direction).auto_commit, resync_required=lost)


steps: st.SearchStrategy[Step] = st.one_of(
    st.builds(_operation, st.sampled_from(Operation), st.booleans(), st.booleans()),
    st.builds(_succeed, st.booleans()),
    st.booleans().map(lambda fenced: lambda s, c, _: m.advance(s, fenced=fenced)),
    st.booleans().map(lambda stopped: lambda s, c, _: m.cancel(s, source_stopped=stopped)),
    st.sampled_from(
        [
            m.fail,
            m.advance_test,
            m.succeed_test,
            m.fail_test,
            m.require_resync,
            m.succeed_resync,
            m.fail_resync,
        ]
    ).map(lambda event: lambda s, c, _: event(s)),
)

EXPECTED = {Code.OPERATION_NOT_ALLOWED, Code.FENCE_NOT_PROVEN, Code.INTERNAL}
RUNS_AT_TARGET = {
    "PlannedCommitPending",
    "UnplannedCommitPending",
    "ChangeRecoveryPointInitiated",
    "ChangeRecoveryPointFailed",
}
FAILBACK_STATES = {"FailbackSync", "FailbackSyncWaiting"}


def described(state: MachineState) -> None:
    """The sentences of the reference that hold in every state."""
    main, here, way = state.main.value, state.active_location.value, state.direction.value
    assert state.main in MainState
    assert state.test in TestState
    assert state.resync in ResyncState
    if main == "Protected":
        assert (here, way, state.failback) == ("Primary", "PrimaryToRecovery", False)
    if main == "ProtectedReversed":
        assert (here, way, state.failback) == ("Recovery", "RecoveryToPrimary", False)
    if main in RUNS_AT_TARGET:
        assert (here, way) in {("Recovery", "PrimaryToRecovery"), ("Primary", "RecoveryToPrimary")}
    if main in {"Committed", "ReprotectInitiated", "ReprotectFailed"}:
        assert (here, way) in {("Recovery", "PrimaryToRecovery"), ("Primary", "RecoveryToPrimary")}
        assert not state.failback
    if main in FAILBACK_STATES:
        assert (here, way, state.failback) == ("Recovery", "RecoveryToPrimary", True)
    if main in {"PlannedFailoverInitiated", "UnplannedFailoverInitiated", "InitialReplicationInProgress"}:
        assert (here, way) in {("Primary", "PrimaryToRecovery"), ("Recovery", "RecoveryToPrimary")}
    if main in {"Unprotected", "EnablingProtection", "EnablingFailed"}:
        assert state.test.value in {"None", "MarkedForDeletion"}, "a test without a protected machine"
    if state.test.value in {"Initiated", "Completing"}:
        assert main in {"Protected", "ProtectedReversed"}
    if state.resync is ResyncState.INITIATED:
        assert main in {"Protected", "ProtectedReversed", "DisablingProtection", "DisablingFailed"}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PROVIDERS), st.booleans(), st.lists(steps, max_size=60))
def test_no_sequence_leads_out_of_the_described_states(
    provider: Capabilities, strict: bool, sequence: list[Step]
):
    state = MachineState.initial()
    for step in sequence:
        before = state
        try:
            state = step(state, provider, strict)
        except FarshoreError as error:
            rejected = error
        else:
            rejected = None
        if rejected is not None:
            assert rejected.code in EXPECTED
            assert state == before
        described(state)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(PROVIDERS), st.booleans(), st.data())
def test_a_walk_of_allowed_steps_never_gets_stuck_and_begin_agrees_with_the_list(
    provider: Capabilities, strict: bool, data: st.DataObject
):
    state = MachineState.initial()
    for _ in range(data.draw(st.integers(0, 40))):
        allowed = m.allowed_operations(state, provider, asr_strict=strict)
        for operation in Operation:
            if operation in allowed:
                m.begin(state, operation, provider, asr_strict=strict, fenced=True)
            else:
                with pytest.raises(FarshoreError) as caught:
                    m.begin(state, operation, provider, asr_strict=strict, fenced=True)
                assert caught.value.info.details["allowed_operations"] == [op.value for op in allowed]
        choices: list[Callable[[], MachineState]] = []
        for operation in allowed:
            choices.append(
                lambda o=operation, s=state: m.begin(s, o, provider, asr_strict=strict, fenced=True)
            )
        for event in (
            lambda s: m.advance(s, fenced=True),
            lambda s: m.succeed(s, auto_commit=provider.row(s.direction).auto_commit),
            m.fail,
            m.advance_test,
            m.succeed_test,
            m.fail_test,
            m.succeed_resync,
            m.fail_resync,
        ):
            try:
                event(state)
            except FarshoreError:
                continue
            choices.append(lambda e=event, s=state: e(s))
        assert choices, f"nothing can ever happen again in {state}"
        state = data.draw(st.sampled_from(choices))()
        described(state)


def test_every_state_is_reached_by_somebody():
    seen: set[MainState] = set()
    frontier = {MachineState.initial()}
    known: set[MachineState] = set(frontier)
    provider = PROVIDERS[-1]
    while frontier:
        following: set[MachineState] = set()
        for state in frontier:
            seen.add(state.main)
            for operation in m.allowed_operations(state, provider):
                for keep in (True, False):
                    following.add(m.begin(state, operation, provider, fenced=True, keep_source_running=keep))
            for event in (
                lambda s: m.advance(s, fenced=True),
                m.succeed,
                m.fail,
                m.cancel,
                m.advance_test,
                m.succeed_test,
                m.fail_test,
            ):
                try:
                    following.add(event(state))
                except FarshoreError:
                    continue
        for state in following:
            described(state)
        frontier = following - known
        known |= frontier
    assert seen == set(MainState)
