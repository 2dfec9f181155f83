"""A machine's protection as people see it: the answer of `status`, and the page in the web UI."""

from __future__ import annotations

from datetime import datetime

from farshore.contract import names
from farshore.contract.machine import MachineStatus, ProtectionState
from farshore.domain import machine as dm
from farshore.domain.machine import Health, Location, MachineState, TestState
from farshore.workflows.details import bullets, instant, link, page, plain
from farshore.workflows.protection_rules import CAPABILITIES


def short(state: MachineState) -> str:
    """A state in few words, also for the search attribute."""
    parts = [state.main.value]
    if state.test is not TestState.NONE:
        parts.append(f"test {state.test.value}")
    if state.health is not Health.NORMAL:
        parts.append(state.health.value)
    return ", ".join(parts)


def status(st: ProtectionState, *, replicating: bool) -> MachineStatus:
    """The machine's state, what it allows now, who holds it, its newest known point."""
    return MachineStatus(
        machine=st.spec.machine,
        plan=st.spec.plan,
        state=st.state,
        allowed_operations=_allowed(st),
        holder=names.holder_id(st.holder),
        source=st.spec.source,
        replicating=replicating,
        newest_point=st.newest_point,
        point_in_use=st.point_in_use,
        recovered=st.recovered,
        last_test_at=st.last_test_at,
        last_failover_at=st.last_failover_at,
        fence=st.fence,
        error=st.error,
        source_site=st.spec.source_site,
        target_site=st.spec.target_site,
        source_off=st.source_off,
        tested=st.tested,
    )


def protection_page(st: ProtectionState, *, replicating: bool, namespace: str, now: datetime) -> str:
    """What is wrong, who holds the machine, how it replicates, what may be done next."""
    lines = [f"**Problem**: {plain(st.error.text(), 1000)}"] if st.error is not None else []
    if st.holder:
        run = names.holder_id(st.holder)
        lines.append(f"**Held by** {link(run, run, namespace)} ({st.operation})")
    if st.source_off and st.state.active_location is Location.PRIMARY:
        lines.append(
            "**The source is off**: a failover shut it down, so nothing new is replicated. Run the failover again, "
            "or `cancel` it to start the source"
        )
    if st.tested:
        made = ", ".join(f"{plain(view.kind)} {plain(view.name)}" for view in st.tested)
        lines.append(f"**Test is open**, made: {made}. Run `cleanup` when you have looked at it")
    lines.append(_replication(st) if replicating else "**Not replicating**")
    if st.point_in_use is not None:
        taken = instant(st.point_in_use.taken_at)
        lines.append(f"**Failed over** to point {plain(st.point_in_use.id)}, taken {taken}")
    elif st.newest_point is not None and not replicating:  # while it replicates, this one is old
        taken = instant(st.newest_point.taken_at)
        lines.append(f"**Newest point**: {plain(st.newest_point.id)}, taken {taken}")
    if not st.holder:
        lines.append(f"**Allowed now**: {', '.join(_allowed(st)) or 'nothing'}")
    lines.append(f"Plan {plain(st.spec.plan)}; this text is of {instant(now)} (press R to read it again)")
    site = st.state.active_location.lower()
    title = f"**{plain(st.spec.machine)}** is **{short(st.state)}**; it runs at the {site} site"
    return page(title, bullets(lines))


def _replication(st: ProtectionState) -> str:
    spec = st.spec
    return (
        f"**Replicating** {plain(spec.source_site)} → {plain(spec.target_site)} every {spec.policy.interval:g} s. "
        f"**RPO now**: `rpo_seconds` in the tab *Pending Activities* (limit {spec.policy.rpo_threshold:g} s)"
    )


def _allowed(st: ProtectionState) -> tuple[str, ...]:
    return tuple(o.value for o in dm.allowed_operations(st.state, CAPABILITIES))
