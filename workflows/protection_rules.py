"""What a machine's protection accepts and what becomes of it: the state in, the changes or an error out.

Pure: no clock, no workflow. Every rule may be asked twice, since a client that lost an answer asks again. Errors are
FarshoreError; the workflow turns them into Temporal's form.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from farshore.contract import names
from farshore.contract.machine import (
    Advance,
    Begin,
    FenceKind,
    MachineSpec,
    ProtectionState,
    Settle,
    SettleOutcome,
)
from farshore.domain import machine as dm
from farshore.domain.errors import Code, FarshoreError
from farshore.domain.machine import MachineState, MainState, Operation, TestState

CAPABILITIES = dm.VSPHERE_TO_AZURE
_TESTING = (Operation.TEST_FAILOVER, Operation.TEST_CLEANUP)
_SHUTTING_DOWN = (Operation.PLANNED_FAILOVER, Operation.UNPLANNED_FAILOVER)
_BREAK_GLASS_PEOPLE = 2
_NOT_YET_ENABLED = (MainState.UNPROTECTED, MainState.ENABLING_PROTECTION, MainState.ENABLING_FAILED)
_SECOND_HALF = (
    MainState.PLANNED_FAILOVER_COMPLETING,
    MainState.UNPLANNED_FAILOVER_COMPLETING,
    MainState.COMMIT_FAILOVER_IN_PROGRESS_ON_PRIMARY,
    MainState.CANCEL_FAILOVER_IN_PROGRESS_ON_PRIMARY,
)
Changes = dict[str, Any]
"""Fields of ProtectionState and their new values."""


# -- begin ------------------------------------------------------------------------------------------------------------


def has_begun(st: ProtectionState, ask: Begin) -> bool:
    """Whether this is a repeat."""
    return st.holder == ask.run and st.operation is ask.operation


def may_begin(st: ProtectionState, ask: Begin) -> None:
    """Raises ScenarioInProgress, NotReady, OperationNotAllowed, DataLossNotApproved."""
    if st.holder and st.holder != ask.run:
        raise FarshoreError(
            Code.SCENARIO_IN_PROGRESS,
            f"{st.spec.machine} is held by the run {names.holder_id(st.holder)} ({st.operation}).",
            subject=st.spec.machine,
            details={"holder": st.holder},
        )
    if has_begun(st, ask):
        return
    _must_have_sites(st.spec, ask.source_site, ask.target_site)
    point = st.point_in_use
    try:
        dm.begin(st.state, ask.operation, CAPABILITIES)
        if ask.operation is Operation.CHANGE_POINT and point is not None and point.final:
            _may_lose(ask)
    except FarshoreError as error:
        raise FarshoreError(
            error.code,
            f"{st.spec.machine}: {error.info.message}",
            subject=st.spec.machine,
            causes=error.info.possible_causes,
            action=error.info.recommended_action,
            details=error.info.details,
        ) from None


def begin(st: ProtectionState, ask: Begin) -> Changes:
    """Take the lock and enter the operation. A repair needs no lock: the loop does it."""
    at_once = ask.operation is Operation.REPAIR
    watched = ask.operation in (Operation.ENABLE, Operation.REPAIR)
    return {
        "state": dm.begin(st.state, ask.operation, CAPABILITIES),
        "holder": "" if at_once else ask.run,
        "operation": None if at_once else ask.operation,
        "halted": False,
        "force_full": st.force_full or at_once,
        "watcher": names.holder_id(ask.run) if watched else st.watcher,
        "fence": None if ask.operation in _SHUTTING_DOWN else st.fence,
    }


def _may_lose(ask: Begin) -> None:
    if not ask.accept_data_loss:
        raise FarshoreError(
            Code.DATA_LOSS_NOT_APPROVED,
            "It failed over without loss; another point gives up what was written after it.",
            action="Start it again with accept_data_loss: true.",
        )


# -- advance ----------------------------------------------------------------------------------------------------------


def may_advance(st: ProtectionState, ask: Advance) -> None:
    """Raises ScenarioInProgress, FenceNotProven."""
    must_hold(st, ask.run)
    fence = ask.fence
    if fence is None:
        return
    problem = ""
    if fence.machine != st.spec.machine:
        problem = f"The fence token is for {fence.machine}."
    elif fence.run != ask.run:
        problem = f"The fence token belongs to the run {fence.run}."
    elif (
        fence.kind is FenceKind.BREAK_GLASS
        and len({p.casefold() for p in fence.approvers}) < _BREAK_GLASS_PEOPLE
    ):
        problem = "Break-glass needs the word of two different people."
    if problem:
        raise FarshoreError(Code.FENCE_NOT_PROVEN, f"{st.spec.machine}: {problem}", subject=st.spec.machine)


def advance(st: ProtectionState, ask: Advance) -> Changes:
    """Enter the second half; nothing for a repeat. Raises FenceNotProven where that would promote without proof."""
    repeated = st.fence is not None and ask.fence is not None and st.fence.run == ask.fence.run
    if repeated or st.state.main in _SECOND_HALF:
        return {}
    state = dm.advance(st.state, fenced=ask.fence is not None)
    return {"state": state, "fence": ask.fence or st.fence}


# -- settle -----------------------------------------------------------------------------------------------------------


def has_settled(st: ProtectionState, ask: Settle) -> bool:
    """Whether this is a repeat."""
    return st.settled == (ask.run, ask.outcome.value) and st.holder != ask.run


def may_settle(st: ProtectionState, ask: Settle) -> None:
    """Raises ScenarioInProgress, FenceNotProven."""
    if has_settled(st, ask):
        return
    must_hold(st, ask.run)
    if ask.outcome is SettleOutcome.SUCCESS and st.state.main in (
        MainState.PLANNED_FAILOVER_INITIATED,
        MainState.UNPLANNED_FAILOVER_INITIATED,
    ):
        raise FarshoreError(
            Code.FENCE_NOT_PROVEN,
            f"{st.spec.machine} has not been promoted: no fence token was given.",
            subject=st.spec.machine,
        )


def settle(st: ProtectionState, ask: Settle, now: datetime) -> Changes:
    """End the operation and give the lock back."""
    operation, state = st.operation, st.state
    changes: Changes = {}
    if operation in _TESTING:
        state = _settle_test(state, ask.outcome)
        if ask.outcome is SettleOutcome.SUCCESS:
            testing = operation is Operation.TEST_FAILOVER
            changes = {"tested": ask.made if testing else (), "last_test_at": now}
    else:
        # A source that an earlier run shut down is still off, though this one may not have touched it.
        off = st.source_off or (operation in _SHUTTING_DOWN and _has_stopped(st, ask))
        changes["source_off"] = off
        match ask.outcome:
            case SettleOutcome.SUCCESS:
                state = _succeed(state, ask)
                changes |= _of_success(st, operation, ask, now)
            case SettleOutcome.FAILURE:
                state = dm.fail(state)
            case SettleOutcome.CANCELLED:
                state = _call_off(state, source_stopped=off or st.halted)
    return changes | {
        "state": state,
        "holder": "",
        "operation": None,
        "halted": False,
        "settled": (ask.run, ask.outcome.value),
        "error": ask.error,
    }


def _has_stopped(st: ProtectionState, ask: Settle) -> bool:
    return ask.source_stopped or (st.fence is not None and st.fence.kind is FenceKind.POWERED_OFF)


def _call_off(state: MachineState, *, source_stopped: bool) -> MachineState:
    try:
        return dm.cancel(state, source_stopped=source_stopped)
    except FarshoreError:
        return dm.fail(state)


def _succeed(state: MachineState, ask: Settle) -> MachineState:
    if state.main in (
        MainState.COMMIT_FAILOVER_IN_PROGRESS_ON_RECOVERY,
        MainState.CANCEL_FAILOVER_IN_PROGRESS_ON_RECOVERY,
    ):
        state = dm.advance(state)
    return dm.succeed(state, resync_required=ask.source_may_lack_changes)


def _of_success(st: ProtectionState, operation: Operation | None, ask: Settle, now: datetime) -> Changes:
    match operation:
        case Operation.PLANNED_FAILOVER | Operation.UNPLANNED_FAILOVER | Operation.CHANGE_POINT:
            newest = st.newest_point
            if ask.point is not None and (newest is None or ask.point.cycle > newest.cycle):
                newest = ask.point
            return {
                "point_in_use": ask.point,
                "newest_point": newest,
                "recovered": ask.made,
                "last_failover_at": now,
            }
        case Operation.CANCEL:
            # the last step of a cancel has started the source
            return {"point_in_use": None, "recovered": (), "fence": None, "failures": 0, "source_off": False}
        case Operation.COMMIT:
            return {"newest_point": st.point_in_use}
        case Operation.DISABLE:
            return {"disabled": True}
        case _:
            return {}


def _settle_test(state: MachineState, outcome: SettleOutcome) -> MachineState:
    if outcome is not SettleOutcome.SUCCESS:
        return dm.fail_test(state)
    if state.test in (TestState.INITIATED, TestState.CLEANUP_INITIATED):
        state = dm.advance_test(state)
    state = dm.succeed_test(state)
    if state.test is TestState.MARKED_FOR_DELETION:
        state = dm.succeed_test(state)
    return state


# -- settings ---------------------------------------------------------------------------------------------------------


def may_configure(st: ProtectionState, spec: MachineSpec) -> None:
    """Raises InvalidInput for another machine's settings, NotReady for other sites or another source."""
    if spec.machine != st.spec.machine:
        raise FarshoreError(
            Code.INVALID_INPUT, f"These settings are for {spec.machine}, not {st.spec.machine}."
        )
    if st.state.main in _NOT_YET_ENABLED:
        return
    _must_have_sites(st.spec, spec.source_site, spec.target_site)
    known = st.spec.source.partition("#")[0]
    if spec.source.partition("#")[0] != known:
        raise FarshoreError(
            Code.NOT_READY,
            f"{spec.machine} is protected from {known} by plan {st.spec.plan}.",
            subject=spec.machine,
            causes=(
                "Two plans give this name to different machines.",
                "The plan's source was edited.",
            ),
            action="Use another name in the plan, or disable protection and protect again.",
        )


def configured(st: ProtectionState, spec: MachineSpec) -> MachineSpec:
    """The new settings; the same machine by name keeps the id that was pinned."""
    known = st.spec.source
    if "#" not in spec.source and known.rpartition("#")[0] == spec.source:
        return spec.model_copy(update={"source": known})
    return spec


def must_hold(st: ProtectionState, run: str) -> None:
    """Raises ScenarioInProgress unless `run` holds the machine's lock."""
    if st.holder != run:
        held = f"held by {names.holder_id(st.holder)}" if st.holder else "held by no run"
        raise FarshoreError(
            Code.SCENARIO_IN_PROGRESS,
            f"{st.spec.machine} is {held}, not by {names.holder_id(run)}.",
            subject=st.spec.machine,
            details={"holder": st.holder},
        )


def _must_have_sites(spec: MachineSpec, source_site: str, target_site: str) -> None:
    """A plan that was edited to other sites would act there, while the machine is here."""
    source, target = source_site or spec.source_site, target_site or spec.target_site
    if (source, target) != (spec.source_site, spec.target_site):
        raise FarshoreError(
            Code.NOT_READY,
            f"{spec.machine} is protected {spec.source_site} → {spec.target_site}; the plan says {source} → {target}.",
            subject=spec.machine,
            causes=("The plan's sites were edited after protection was enabled.",),
            action="Restore the plan's sites, or disable protection and protect again.",
        )
