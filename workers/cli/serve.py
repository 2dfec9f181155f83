"""Commands that stay: workers, and a development server of Temporal with the settings that we measured."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from farshore.domain.errors import Code, FarshoreError
from farshore.workers.cli.exits import Exit
from farshore.workers.cli.main import AddressOption, SettingsOption, out, perform, settings_for
from farshore.workers.settings import Settings
from farshore.workers.temporal import connect_with, ensure_search_attributes


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("worker", help="Run a worker: --role control, --role site --site NAME, or --role all.")(
        worker
    )
    app.command("setup", help="Register the search attributes with Temporal (idempotent).")(setup)
    app.command("healthy", help="Exit code 0 if Temporal answers; for health checks.")(healthy)


def worker(
    role: Annotated[str, typer.Option("--role", help="control, site or all")] = "all",
    site: Annotated[
        list[str] | None, typer.Option("--site", help="a site of this worker (repeatable)")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", help="written when the worker polls")
    ] = None,
    settings: SettingsOption = None,
    address: AddressOption = None,
) -> None:
    """Run workers until SIGTERM or SIGINT."""
    loaded = settings_for(settings, address)
    roles = {"control": (True, False), "site": (False, True), "all": (True, True)}
    if role not in roles:
        raise FarshoreError(Code.INVALID_INPUT, f"--role is {role!r}; it must be control, site or all.")
    control, with_sites = roles[role]
    sites = list(site or (loaded.sites if role == "all" else ()))
    if with_sites and not sites:
        raise FarshoreError(
            Code.INVALID_INPUT,
            "A site worker needs --site NAME.",
            action=f"Choose from {', '.join(loaded.sites)}.",
        )
    perform(_work(loaded, control, sites if with_sites else [], ready_file))


async def _work(settings: Settings, control: bool, sites: list[str], ready_file: Path | None) -> int:
    # Here, because every other command is spared the time of importing it.
    from farshore.workers.worker import run_workers

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("azure").setLevel(
        logging.WARNING
    )  # at INFO its SDK tells every request, headers and all
    client = await connect_with(settings)
    if control:
        await ensure_search_attributes(client)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def ready() -> None:
        if ready_file is not None:
            ready_file.write_text("ready\n", encoding="utf-8")

    try:
        await run_workers(client, settings, control=control, sites=sites, stop=stop, on_ready=ready)
    finally:
        if ready_file is not None:
            with contextlib.suppress(FileNotFoundError):
                ready_file.unlink()
    return Exit.DONE


def setup(settings: SettingsOption = None, address: AddressOption = None) -> None:
    """Register the search attributes."""

    async def work() -> int:
        client = await connect_with(settings_for(settings, address))
        added = await ensure_search_attributes(client)
        out.print(f"search attributes: {escape(', '.join(added)) or 'all there'}")
        return Exit.DONE

    perform(work())


def healthy(settings: SettingsOption = None, address: AddressOption = None) -> None:
    """Whether Temporal answers."""

    async def work() -> int:
        client = await connect_with(settings_for(settings, address))
        await client.service_client.check_health()
        return Exit.DONE

    perform(work())
