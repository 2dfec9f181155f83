"""Commands that only read: status of machines and runs, recovery points."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from farshore.contract.client import FarshoreClient
from farshore.contract.machine import MachineStatus
from farshore.contract.runs import PointsInput
from farshore.workers.cli.exits import Exit
from farshore.workers.cli.main import AddressOption, SettingsOption, client_for, out, perform, settings_for
from farshore.workers.cli.runs import link
from farshore.workers.settings import Settings

JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("status", help="State of protected machines and running runs.")(status)
    app.command("points", help="Recovery points of a plan's machines.")(points)


def status(
    plan: Annotated[str, typer.Argument(help="only this plan")] = "",
    as_json: JsonOption = False,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """State of machines and runs."""
    perform(_status(settings_for(settings, address), plan, as_json))


async def _status(settings: Settings, plan: str, as_json: bool) -> int:
    client = await client_for(settings)
    rows = [(machine, await client.replication(machine.machine)) for machine in await client.machines(plan)]
    if as_json:
        data = [m.model_dump(mode="json") | {"replication": r} for m, r in rows]
        out.print_json(json.dumps(data))
        return Exit.DONE
    if not rows:
        out.print(
            f"No machine{f' of {escape(plan)}' if plan else ''} is protected. `farshore protect PLAN` begins."
        )
    else:
        out.print(_table(rows))
    await _runs(client, settings, plan)
    return Exit.DONE


def _table(rows: list[tuple[MachineStatus, dict[str, Any]]]) -> Table:
    table = Table(box=box.SIMPLE)
    for title in ("machine", "plan", "state", "runs at", "newest point", "RPO", "held by", "problem"):
        table.add_column(title, overflow="fold")
    for machine, now in rows:
        state = machine.state
        text = state.main.value
        if state.test.value != "None":
            text += f", test {state.test.value}"
        newest = now.get("newest_point") or (machine.newest_point.id if machine.newest_point else "")
        table.add_row(
            escape(machine.machine),
            escape(machine.plan),
            f"{text}{'' if state.health.value == 'Normal' else f' [red]{state.health.value}[/]'}",
            state.active_location.value,
            str(newest),
            _age(machine, now),
            escape(machine.holder),
            escape(machine.error.message) if machine.error else "",
        )
    return table


def _age(machine: MachineStatus, now: dict[str, Any]) -> str:
    if not machine.replicating:
        return "not replicating"
    taken = now.get("newest_taken_at")
    at = (
        datetime.fromisoformat(taken)
        if taken
        else machine.newest_point.taken_at
        if machine.newest_point
        else None
    )
    return f"{(datetime.now(UTC) - at).total_seconds():.0f} s" if at else ""


async def _runs(client: FarshoreClient, settings: Settings, plan: str) -> None:
    async for run in client.runs(plan):
        progress = await run.progress()
        out.print(f"[bold]{escape(run.id)}[/]: {escape(progress.phase)}")
        out.print(f"  {escape(link(settings, run.id))}")
        for pending in progress.pending:
            out.print(
                f"  [bold yellow]WAITING FOR A PERSON:[/] {escape(pending.title)} "
                f"(farshore approve {escape(run.id)} {escape(pending.action)})"
            )


def points(
    plan: Annotated[str, typer.Argument(help="name of the plan")],
    machine: Annotated[list[str] | None, typer.Option("--machine", "-m")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="newest points per machine")] = 20,
    as_json: JsonOption = False,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Recovery points, newest first."""

    async def work() -> int:
        client = await client_for(settings_for(settings, address))
        found = await client.points(PointsInput(plan=plan, machines=tuple(machine or ()), limit=limit))
        if as_json:
            out.print_json(json.dumps([p.model_dump(mode="json") for p in found]))
            return Exit.DONE
        table = Table(box=box.SIMPLE)
        for title in ("machine", "point", "taken at (UTC)", "age", "consistency"):
            table.add_column(title)
        for p in found:
            age = (datetime.now(UTC) - p.taken_at).total_seconds()
            label = f"{p.consistency}{', final' if p.final else ''}"
            table.add_row(escape(p.machine), p.id, f"{p.taken_at:%Y-%m-%d %H:%M:%S}", f"{age:.0f} s", label)
        out.print(table)
        return Exit.DONE

    perform(work())
