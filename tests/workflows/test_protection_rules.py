"""The rules of a machine's protection, without a workflow; and mutants of them, each of which a check must catch."""

from __future__ import annotations

import types
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from farshore.contract.machine import (
    Advance,
    Begin,
    FenceKind,
    FenceToken,
    MachineSpec,
    ProtectionState,
    Settle,
    SettleOutcome,
)
from farshore.contract.runs import PointView, ResourceView
from farshore.domain.errors import Code, FarshoreError
from farshore.domain.machine import MachineState, MainState, Operation, TestState
from farshore.workflows import protection_rules

SOURCE = Path(__file__).resolve().parents[2] / "workflows" / "protection_rules.py"
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
RUN, OTHER = "crm/planned/1#r1", "crm/planned/2#r2"
SPEC = MachineSpec(
    machine="db",
    plan="crm",
    source="db#vm-1",
    source_site="east",
    source_queue="q1",
    target_site="west",
    target_queue="q2",
)
MADE = (ResourceView(id="m", kind="machine", name="db"),)
Rules = Any  # the module, or a mutant of it


def state(main: MainState = MainState.PROTECTED, **other: Any) -> ProtectionState:
    return ProtectionState(spec=SPEC, state=MachineState(main), **other)


def after(st: ProtectionState, changes: dict[str, Any]) -> ProtectionState:
    return st.model_copy(update=changes)


def begun(rules: Rules, st: ProtectionState, operation: Operation, run: str = RUN) -> ProtectionState:
    ask = Begin(operation=operation, run=run)
    rules.may_begin(st, ask)
    return after(st, rules.begin(st, ask))


def ended(rules: Rules, st: ProtectionState, outcome: SettleOutcome, **other: Any) -> ProtectionState:
    ask = Settle(run=st.holder, outcome=outcome, **other)
    rules.may_settle(st, ask)
    return after(st, rules.settle(st, ask, NOW))


def refused(code: Code, rule: Callable[[], object]) -> None:
    with pytest.raises(FarshoreError) as refusal:
        rule()
    assert refusal.value.code is code


def token(run: str = RUN, **other: Any) -> FenceToken:
    given: dict[str, Any] = {"kind": FenceKind.POWERED_OFF, "evidence": "off", "at": NOW, "machine": "db"}
    return FenceToken(run=run, **(given | other))


# -- checks: each takes the rules, so that mutants can be put in their place ------------------------------------------


def a_source_once_shut_down_stays_off_until_a_cancel_has_started_it(rules: Rules) -> None:
    st = begun(rules, state(), Operation.PLANNED_FAILOVER)
    st = ended(rules, st, SettleOutcome.FAILURE, source_stopped=True)
    assert (st.state.main, st.source_off, st.holder) == (MainState.PLANNED_FAILOVER_FAILED, True, "")
    st = begun(rules, st, Operation.PLANNED_FAILOVER, OTHER)
    st = ended(rules, st, SettleOutcome.CANCELLED)  # this run has not touched it
    assert (st.state.main, st.source_off) == (MainState.PLANNED_FAILOVER_FAILED, True)
    st = begun(rules, st, Operation.CANCEL, "third")
    st = ended(rules, st, SettleOutcome.SUCCESS)
    assert (st.state.main, st.source_off) == (MainState.PROTECTED, False)


def a_run_that_touched_nothing_leaves_a_protected_machine(rules: Rules) -> None:
    st = begun(rules, state(), Operation.PLANNED_FAILOVER)
    st = ended(rules, st, SettleOutcome.CANCELLED)
    assert (st.state.main, st.source_off) == (MainState.PROTECTED, False)


def a_halted_run_is_not_called_off(rules: Rules) -> None:
    st = begun(rules, state(), Operation.PLANNED_FAILOVER).model_copy(update={"halted": True})
    st = ended(rules, st, SettleOutcome.CANCELLED)
    assert st.state.main is MainState.PLANNED_FAILOVER_FAILED
    assert not st.halted


def a_test_says_nothing_of_the_source(rules: Rules) -> None:
    st = begun(rules, state(), Operation.TEST_FAILOVER)
    st = ended(rules, st, SettleOutcome.SUCCESS, made=MADE, source_stopped=True)
    assert (st.state.test, st.tested, st.source_off) == (TestState.WAITING_FOR_COMPLETION, MADE, False)
    st = begun(rules, st, Operation.TEST_CLEANUP)
    st = ended(rules, st, SettleOutcome.SUCCESS)
    assert st.tested == ()


def a_powered_off_fence_tells_that_the_source_is_off(rules: Rules) -> None:
    st = begun(rules, state(), Operation.UNPLANNED_FAILOVER)
    st = after(st, rules.advance(st, Advance(run=RUN, fence=token())))
    st = ended(rules, st, SettleOutcome.FAILURE)
    assert (st.state.main, st.source_off) == (MainState.UNPLANNED_FAILOVER_COMPLETION_FAILED, True)


def nothing_is_promoted_without_a_fence_that_fits(rules: Rules) -> None:
    st = begun(rules, state(), Operation.PLANNED_FAILOVER)
    glass = {"kind": FenceKind.BREAK_GLASS}
    for fence in (
        token(machine="another"),
        token(OTHER),
        token(**glass),
        token(**glass, approvers=("ann", "ANN")),
    ):
        refused(Code.FENCE_NOT_PROVEN, lambda f=fence: rules.may_advance(st, Advance(run=RUN, fence=f)))
    refused(Code.FENCE_NOT_PROVEN, lambda: rules.advance(st, Advance(run=RUN)))
    refused(Code.FENCE_NOT_PROVEN, lambda: ended(rules, st, SettleOutcome.SUCCESS))
    rules.may_advance(st, Advance(run=RUN, fence=token(**glass, approvers=("ann", "bob"))))


def an_old_fence_serves_no_new_failover(rules: Rules) -> None:
    st = begun(rules, state(fence=token(OTHER)), Operation.PLANNED_FAILOVER)
    assert st.fence is None


def the_lock_is_one_runs(rules: Rules) -> None:
    st = begun(rules, state(), Operation.TEST_FAILOVER)
    other = Begin(operation=Operation.PLANNED_FAILOVER, run=OTHER)
    refused(Code.SCENARIO_IN_PROGRESS, lambda: rules.may_begin(st, other))
    refused(Code.SCENARIO_IN_PROGRESS, lambda: rules.may_advance(st, Advance(run=OTHER)))
    ending = Settle(run=OTHER, outcome=SettleOutcome.SUCCESS)
    refused(Code.SCENARIO_IN_PROGRESS, lambda: rules.may_settle(st, ending))
    rules.may_begin(st, Begin(operation=Operation.TEST_FAILOVER, run=RUN))  # a repeat


def a_repeat_of_settle_is_known_and_a_new_settle_of_the_same_run_is_not_one(rules: Rules) -> None:
    st = begun(rules, state(), Operation.TEST_FAILOVER)
    ask = Settle(run=RUN, outcome=SettleOutcome.SUCCESS)
    assert not rules.has_settled(st, ask)
    st = after(st, rules.settle(st, ask, NOW))
    assert rules.has_settled(st, ask)
    st = begun(rules, st, Operation.TEST_CLEANUP)
    assert not rules.has_settled(st, ask)


def sites_and_source_are_those_of_the_protection(rules: Rules) -> None:
    st = state()
    for sites in ({"source_site": "north"}, {"target_site": "south"}):
        ask = Begin(operation=Operation.TEST_FAILOVER, run=RUN, **sites)
        refused(Code.NOT_READY, lambda ask=ask: rules.may_begin(st, ask))
        spec = SPEC.model_copy(update=sites)
        refused(Code.NOT_READY, lambda spec=spec: rules.may_configure(st, spec))
    refused(Code.NOT_READY, lambda: rules.may_configure(st, SPEC.model_copy(update={"source": "other#vm-1"})))
    refused(Code.INVALID_INPUT, lambda: rules.may_configure(st, SPEC.model_copy(update={"machine": "web"})))
    by_name = SPEC.model_copy(update={"source": "db"})
    rules.may_configure(st, by_name)
    assert rules.configured(st, by_name).source == "db#vm-1"
    rules.may_configure(state(MainState.ENABLING_FAILED), SPEC.model_copy(update={"source": "other"}))


def giving_up_zero_loss_needs_a_word(rules: Rules) -> None:
    final = PointView(
        id="p-2", machine="db", cycle=2, taken_at=NOW, consistency="crash-consistent", final=True
    )
    st = state(MainState.PLANNED_COMMIT_PENDING, point_in_use=final)
    ask = Begin(operation=Operation.CHANGE_POINT, run=RUN)
    refused(Code.DATA_LOSS_NOT_APPROVED, lambda: rules.may_begin(st, ask))
    rules.may_begin(st, ask.model_copy(update={"accept_data_loss": True}))


def the_newest_point_never_goes_back(rules: Rules) -> None:
    def point(cycle: int) -> PointView:
        return PointView(
            id=f"p-{cycle}", machine="db", cycle=cycle, taken_at=NOW, consistency="crash-consistent"
        )

    st = begun(rules, state(newest_point=point(9)), Operation.UNPLANNED_FAILOVER)
    st = after(st, rules.advance(st, Advance(run=RUN, fence=token())))
    st = ended(rules, st, SettleOutcome.SUCCESS, point=point(4), made=MADE)
    assert (st.newest_point, st.point_in_use, st.recovered) == (point(9), point(4), MADE)


CHECKS = (
    a_source_once_shut_down_stays_off_until_a_cancel_has_started_it,
    a_run_that_touched_nothing_leaves_a_protected_machine,
    a_halted_run_is_not_called_off,
    a_test_says_nothing_of_the_source,
    a_powered_off_fence_tells_that_the_source_is_off,
    nothing_is_promoted_without_a_fence_that_fits,
    an_old_fence_serves_no_new_failover,
    the_lock_is_one_runs,
    a_repeat_of_settle_is_known_and_a_new_settle_of_the_same_run_is_not_one,
    sites_and_source_are_those_of_the_protection,
    giving_up_zero_loss_needs_a_word,
    the_newest_point_never_goes_back,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_rules(check: Callable[[Rules], None]) -> None:
    check(protection_rules)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("source_stopped=off or st.halted", "source_stopped=ask.source_stopped or st.halted"),
        ("source_stopped=off or st.halted", "source_stopped=off"),
        ('changes["source_off"] = off', "pass"),
        ("off = st.source_off or (", "off = ("),
        (', "source_off": False}', "}"),
        ("(operation in _SHUTTING_DOWN and _has_stopped(st, ask))", "False"),
        ("st.fence.kind is FenceKind.POWERED_OFF", "False"),
        ('"tested": ask.made if testing else ()', '"tested": ()'),
        ('"fence": None if ask.operation in _SHUTTING_DOWN else st.fence', '"fence": st.fence'),
        ("elif fence.run != ask.run:", "elif False:"),
        ("if fence.machine != st.spec.machine:", "if False:"),
        ("len({p.casefold() for p in fence.approvers})", "len(fence.approvers)"),
        ("_BREAK_GLASS_PEOPLE = 2", "_BREAK_GLASS_PEOPLE = 1"),
        ("fenced=ask.fence is not None", "fenced=True"),
        ("if ask.outcome is SettleOutcome.SUCCESS and st.state.main in (", "if st.state.main in () and ("),
        (" and st.holder != ask.run\n", "\n"),
        ("if st.holder and st.holder != ask.run:", "if False:"),
        ("    if st.holder != run:", "    if False:"),
        ("    _must_have_sites(st.spec, ask.source_site, ask.target_site)", "    pass"),
        ("    _must_have_sites(st.spec, spec.source_site, spec.target_site)", "    pass"),
        ("target_site or spec.target_site", "spec.target_site"),
        ('if spec.source.partition("#")[0] != known:', "if False:"),
        ('if "#" not in spec.source and', "if False and"),
        ("if st.state.main in _NOT_YET_ENABLED:", "if False:"),
        ("and point.final:", "and False:"),
        ("ask.point.cycle > newest.cycle", "True"),
    ],
)
def test_a_mutant_of_the_rules_is_caught(right: str, wrong: str) -> None:
    source = SOURCE.read_text()
    assert right in source
    mutant = types.ModuleType("mutant_of_protection_rules")
    exec(compile(source.replace(right, wrong), str(SOURCE), "exec"), mutant.__dict__)
    caught = 0
    for check in CHECKS:
        try:
            check(mutant)
        except (AssertionError, FarshoreError, pytest.fail.Exception):
            caught += 1
    assert caught
