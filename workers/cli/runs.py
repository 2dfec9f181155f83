"""Commands that start runs, follow them and answer them."""

from __future__ import annotations

import asyncio
import getpass
from typing import Annotated

import typer
from rich.markup import escape

from farshore.contract.client import FarshoreClient, Run, RunFailed
from farshore.contract.runs import (
    Confirmation,
    Decision,
    DecisionKind,
    FailoverInput,
    ProtectionInput,
    ProtectionKind,
    RunKind,
    RunProgress,
    RunResult,
    RunStatus,
)
from farshore.domain.errors import Code, FarshoreError
from farshore.workers.cli.exits import Exit
from farshore.workers.cli.main import (
    AddressOption,
    SettingsOption,
    client_for,
    err,
    out,
    perform,
    settings_for,
)
from farshore.workers.settings import Settings

PlanArgument = Annotated[str, typer.Argument(help="name of the plan")]
ReasonOption = Annotated[str, typer.Option("--reason", "-r", help="why; kept in the run's history")]
MachineOption = Annotated[
    list[str] | None, typer.Option("--machine", "-m", help="only this machine (repeatable)")
]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="follow the run to its end")]
ByOption = Annotated[str, typer.Option("--by", help="who decides (default: the login name)")]
_LOOK = 1.0  # seconds between looks at a run


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("protect", help="Enable protection of a plan's machines and wait for initial replication.")(
        protect
    )
    app.command("disable", help="Stop protection; the replica and all points are deleted.")(disable)
    app.command("failover", help="Fail a plan over: --kind planned, unplanned or test.")(failover)
    app.command("test", help="Test failover into an isolated network.")(rehearse)
    app.command("cleanup", help="Remove what a test failover made.")(cleanup)
    app.command("commit", help="Make a failover final; other points are deleted.")(commit)
    app.command("cancel", help="Undo a failover that is not committed; the source starts again.")(cancel)
    app.command("change-point", help="Bring machines that have failed over up again from another point.")(
        change_point
    )
    app.command("approve", help="Approve what a run waits for.")(approve)
    app.command("reject", help="Reject what a run waits for.")(reject)
    app.command("abort", help="Stop a run before its next step.")(abort)
    app.command("watch", help="Follow a run.")(watch)


def protect(
    plan: PlanArgument,
    machine: MachineOption = None,
    reason: ReasonOption = "",
    wait: WaitOption = True,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Enable protection."""
    ask = ProtectionInput(plan=plan, machines=tuple(machine or ()), reason=reason, requested_by=_me())
    perform(_protection(settings_for(settings, address), ask, wait))


def disable(
    plan: PlanArgument,
    machine: MachineOption = None,
    reason: ReasonOption = "",
    wait: WaitOption = True,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Disable protection."""
    ask = ProtectionInput(
        plan=plan,
        kind=ProtectionKind.DISABLE,
        machines=tuple(machine or ()),
        reason=reason,
        requested_by=_me(),
    )
    perform(_protection(settings_for(settings, address), ask, wait))


def failover(
    plan: PlanArgument,
    kind: Annotated[str, typer.Option("--kind", "-k", help="planned, unplanned or test")] = "planned",
    point: Annotated[
        str, typer.Option("--point", "-p", help="latest, latest-processed, … or a point id")
    ] = "",
    machine: MachineOption = None,
    shutdown: Annotated[
        bool, typer.Option("--shutdown/--no-shutdown", help="unplanned: try to shut down")
    ] = True,
    confirmed_by: Annotated[
        list[str] | None,
        typer.Option(
            "--confirmed-by", help="unplanned: who confirms that the source can't come back (twice)"
        ),
    ] = None,
    reason: ReasonOption = "",
    wait: WaitOption = True,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Fail over."""
    kinds = {k.value: k for k in (RunKind.PLANNED, RunKind.UNPLANNED, RunKind.TEST)}
    if kind not in kinds:
        raise FarshoreError(Code.INVALID_INPUT, f"--kind is {kind!r}; it must be one of {', '.join(kinds)}.")
    chosen = kinds[kind]
    default = "latest-processed" if chosen is RunKind.TEST else "latest"
    ask = FailoverInput(
        plan=plan,
        kind=chosen,
        reason=reason,
        requested_by=_me(),
        machines=tuple(machine or ()),
        point=point or default,
        shutdown=shutdown,
        break_glass=tuple(Confirmation(by=name) for name in confirmed_by or ()),
    )
    _run(ask, wait, settings_for(settings, address))


def rehearse(
    plan: PlanArgument,
    point: Annotated[str, typer.Option("--point", "-p")] = "latest-processed",
    machine: MachineOption = None,
    reason: ReasonOption = "",
    wait: WaitOption = True,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Test failover."""
    ask = FailoverInput(
        plan=plan,
        kind=RunKind.TEST,
        point=point,
        machines=tuple(machine or ()),
        reason=reason,
        requested_by=_me(),
    )
    _run(ask, wait, settings_for(settings, address))


def cleanup(
    plan: PlanArgument,
    notes: Annotated[str, typer.Option("--notes", help="what the test showed")] = "",
    machine: MachineOption = None,
    wait: WaitOption = True,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Clean up."""
    ask = FailoverInput(
        plan=plan, kind=RunKind.CLEANUP, machines=tuple(machine or ()), notes=notes, requested_by=_me()
    )
    _run(ask, wait, settings_for(settings, address))


def commit(
    plan: PlanArgument,
    machine: MachineOption = None,
    reason: ReasonOption = "",
    wait: WaitOption = True,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Commit."""
    ask = FailoverInput(
        plan=plan, kind=RunKind.COMMIT, machines=tuple(machine or ()), reason=reason, requested_by=_me()
    )
    _run(ask, wait, settings_for(settings, address))


def cancel(
    plan: PlanArgument,
    machine: MachineOption = None,
    reason: ReasonOption = "",
    wait: WaitOption = True,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Cancel."""
    ask = FailoverInput(
        plan=plan, kind=RunKind.CANCEL, machines=tuple(machine or ()), reason=reason, requested_by=_me()
    )
    _run(ask, wait, settings_for(settings, address))


def change_point(
    plan: PlanArgument,
    point: Annotated[str, typer.Option("--point", "-p", help="a choice, or a point id with one --machine")],
    machine: MachineOption = None,
    accept_data_loss: Annotated[
        bool, typer.Option("--accept-data-loss", help="give up the zero loss of a planned failover")
    ] = False,
    reason: ReasonOption = "",
    wait: WaitOption = True,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Change the recovery point."""
    ask = FailoverInput(
        plan=plan,
        kind=RunKind.CHANGE_POINT,
        point=point,
        machines=tuple(machine or ()),
        accept_data_loss=accept_data_loss,
        reason=reason,
        requested_by=_me(),
    )
    _run(ask, wait, settings_for(settings, address))


def approve(
    run: Annotated[str, typer.Argument(help="id of the run, or name of the plan")],
    action: Annotated[str, typer.Argument(help="id of the action; default: the only one pending")] = "",
    by: ByOption = "",
    observation: Annotated[
        str, typer.Option("--observation", "-o", help="what was seen; kept in the history")
    ] = "",
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Approve."""
    perform(_decide(settings_for(settings, address), run, action, DecisionKind.APPROVE, by, observation))


def reject(
    run: Annotated[str, typer.Argument(help="id of the run, or name of the plan")],
    action: Annotated[str, typer.Argument(help="id of the action; default: the only one pending")] = "",
    by: ByOption = "",
    observation: Annotated[str, typer.Option("--observation", "-o", help="why; kept in the history")] = "",
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Reject."""
    perform(_decide(settings_for(settings, address), run, action, DecisionKind.REJECT, by, observation))


def abort(
    run: Annotated[str, typer.Argument(help="id of the run, or name of the plan")],
    by: ByOption = "",
    observation: Annotated[str, typer.Option("--observation", "-o", help="why; kept in the history")] = "",
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Stop a run."""

    async def work() -> int:
        client = await client_for(settings_for(settings, address))
        found = await _find(client, run)
        word = Decision(action="abort", decision=DecisionKind.REJECT, by=by or _me(), observation=observation)
        out.print(escape(await found.abort(word)))
        return Exit.DONE

    perform(work())


def watch(
    run: Annotated[str, typer.Argument(help="id of the run, or name of the plan")],
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Follow a run."""

    async def work() -> int:
        loaded = settings_for(settings, address)
        client = await client_for(loaded)
        return await follow(await _find(client, run), loaded)

    perform(work())


# ---------------------------------------------------------------------------------------------------------------------


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user entry
        return "unknown"


def _run(ask: FailoverInput, wait: bool, settings: Settings) -> None:
    async def work() -> int:
        client = await client_for(settings)
        return await _started(await client.failover(ask), wait, settings)

    perform(work())


async def _protection(settings: Settings, ask: ProtectionInput, wait: bool) -> int:
    client = await client_for(settings)
    return await _started(await client.protection(ask), wait, settings)


async def _started(run: Run, wait: bool, settings: Settings) -> int:
    out.print(f"Started [bold]{escape(run.id)}[/]")
    out.print(f"  {escape(link(settings, run.id))}")
    return await follow(run, settings) if wait else Exit.DONE


def link(settings: Settings, run: str) -> str:
    """Where the run is in the web UI."""
    from urllib.parse import quote

    return f"{settings.temporal.ui}/namespaces/{settings.temporal.namespace}/workflows/{quote(run, safe='')}"


async def follow(run: Run, settings: Settings) -> int:
    """Print what changes until the run ends; returns the exit code it means."""
    seen: set[str] = set()
    told: set[str] = set()
    ending = asyncio.create_task(run.result())
    try:
        while not ending.done():
            await asyncio.wait([ending], timeout=_LOOK)
            if not ending.done():
                _print_progress(await run.progress(), seen, told, run)
        result = await ending
    except RunFailed as failure:
        if failure.result is not None:
            print_result(failure.result)
        raise
    print_result(result)
    return Exit.DONE if result.status is RunStatus.SUCCEEDED else Exit.PARTIAL


def _print_progress(progress: RunProgress, seen: set[str], told: set[str], run: Run) -> None:
    for line in progress.log:
        if line not in seen:
            seen.add(line)
            out.print(f"  {escape(line)}")
    for row in progress.machines:
        text = f"{row.machine}: {row.stage} {row.outcome}{f' — {row.note}' if row.note else ''}"
        if text not in seen and row.outcome != "starting":
            seen.add(text)
            out.print(f"    {escape(text)}")
    for pending in progress.pending:
        if pending.action not in told:
            told.add(pending.action)
            out.print(f"[bold yellow]WAITING FOR A PERSON:[/] {escape(pending.title)}")
            if pending.instructions:
                out.print(f"    {escape(pending.instructions)}")
            out.print(
                f"    answer with: farshore approve {escape(run.id)} {escape(pending.action)} --by NAME"
            )


def print_result(result: RunResult) -> None:
    """The end of a run, in a few lines."""
    colour = {"Succeeded": "green", "PartiallySucceeded": "yellow"}.get(result.status.value, "red")
    out.print(f"[bold {colour}]{result.status.value}[/]: {result.kind} of {escape(result.plan)}")
    for row in result.machines:
        parts = [row.outcome.value, row.state]
        if row.point is not None:
            parts.append(f"point {row.point.id}")
        if row.data_loss_seconds is not None:
            parts.append("no loss" if row.data_loss_seconds == 0 else f"loss {row.data_loss_seconds:.1f} s")
        if row.addresses:
            parts.append(", ".join(row.addresses))
        if row.deleted:
            parts.append(f"{len(row.deleted)} resources deleted")
        out.print(f"  {escape(row.machine)}: {escape(' · '.join(p for p in parts if p))}")
        if row.error is not None:
            out.print(f"    [red]{escape(row.error.text())}[/]")
    if result.rto_seconds is not None:
        out.print(
            f"  RTO {result.rto_seconds:.1f} s"
            + (f", RPO {result.rpo_seconds:.1f} s" if result.rpo_seconds is not None else "")
        )


async def _find(client: FarshoreClient, wanted: str) -> Run:
    """A run by id; or the only running one of a plan."""
    if "/" in wanted:
        return client.run(wanted)
    found = [run async for run in client.runs(wanted)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(run.id for run in found) or "none is running"
    raise FarshoreError(
        Code.INVALID_INPUT,
        f"{wanted!r} does not name one run: {listed}.",
        action="Give the id of the run.",
    )


async def _decide(
    settings: Settings, wanted: str, action: str, decision: DecisionKind, by: str, observation: str
) -> int:
    client = await client_for(settings)
    run = await _find(client, wanted)
    if not action:
        pending = (await run.progress()).pending
        if len(pending) != 1:
            names = ", ".join(p.action for p in pending) or "nothing"
            raise FarshoreError(
                Code.NO_PENDING_ACTION,
                f"{run.id} waits for {names}.",
                action="Name the action, or wait for it.",
            )
        action = pending[0].action
    answer = await run.decide(
        Decision(action=action, decision=decision, by=by or _me(), observation=observation)
    )
    out.print(escape(answer))
    return Exit.DONE


__all__ = ["err", "follow", "link", "print_result", "register"]
