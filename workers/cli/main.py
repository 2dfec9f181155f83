"""Entry points and the frame of every command: errors for people, exit codes for scripts, a clean end.

Exit codes: 0 done · 1 the run failed · 2 bad input or settings · 3 partially succeeded · 5 Temporal does not answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from temporalio.service import RPCError

from farshore.contract.client import FarshoreClient, RunFailed
from farshore.contract.converter import explain
from farshore.domain.errors import CATALOGUE, Code, FarshoreError
from farshore.workers.cli.exits import Exit
from farshore.workers.settings import Settings, load_settings
from farshore.workers.temporal import connect

app = typer.Typer(
    name="farshore",
    help="Site recovery on Temporal: protect machines, rehearse, fail over, commit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_WIDE = None if sys.stdout.isatty() else 200  # a pipe has no edge to wrap at
out = Console(highlight=False, soft_wrap=True, width=_WIDE)
err = Console(stderr=True, highlight=False, soft_wrap=True)

SettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", "-s", help="settings file (default: FARSHORE_SETTINGS or ./farshore.toml)"),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="Temporal's address, instead of the settings'", envvar="TEMPORAL_ADDRESS"),
]

_USAGE_ERRORS = {
    Code.INVALID_INPUT,
    Code.PLAN_NOT_FOUND,
    Code.PLAN_INVALID,
    Code.MACHINE_UNKNOWN,
    Code.SITE_UNKNOWN,
    Code.CONFIGURATION_INVALID,
    Code.SECRET_UNAVAILABLE,
}


def settings_for(path: Path | None, address: str | None) -> Settings:
    """Settings, with Temporal's address from the command line if given."""
    settings = load_settings(path)
    if address:
        temporal = settings.temporal.model_copy(update={"address": address})
        settings = settings.model_copy(update={"temporal": temporal})
    return settings


async def client_for(settings: Settings) -> FarshoreClient:
    """A connected client."""
    return FarshoreClient(await connect(settings.temporal))


def perform(work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a command's coroutine and end the process with its exit code.

    The process ends by `os._exit`: a client-only process of the SDK sometimes dies while the interpreter shuts down
    (sdk-python issue 300; measured in reference/temporal.md §12).
    """
    leave(_guarded(work))


def leave(code: int) -> NoReturn:
    """Flush everything and end."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _guarded(work: Coroutine[Any, Any, int]) -> int:
    try:
        return asyncio.run(work)
    except FarshoreError as error:
        return show_error(error)
    except RunFailed as failure:
        err.print(f"[bold red]Failed:[/] {failure.error.message}")
        err.print(f"What to do: {failure.error.recommended_action}")
        return Exit.BAD_INPUT if failure.error.code in {c.value for c in _USAGE_ERRORS} else Exit.FAILED
    except ValidationError as error:
        err.print(f"[bold red]{explain(error)}[/]")
        err.print(CATALOGUE[Code.INVALID_INPUT].action)
        return Exit.BAD_INPUT
    except RPCError as error:
        return show_error(
            FarshoreError(
                Code.TEMPORAL_UNREACHABLE, f"Temporal answered {error.status.name}: {error.message}"[:300]
            )
        )
    except KeyboardInterrupt:
        err.print("Interrupted. A run that was started goes on; `farshore status` shows it.")
        return Exit.FAILED


def show_error(error: FarshoreError) -> int:
    """Print an error for a person; returns the exit code it means."""
    err.print(f"[bold red]{error.code.value}:[/] {error.info.message}", markup=True)
    for cause in error.info.possible_causes:
        err.print(f"  possible cause: {cause}")
    err.print(f"What to do: {error.info.recommended_action}")
    if error.code in _USAGE_ERRORS:
        return Exit.BAD_INPUT
    return Exit.UNREACHABLE if error.code is Code.TEMPORAL_UNREACHABLE else Exit.FAILED


def main() -> NoReturn:
    """`farshore`."""
    from farshore.workers.cli import plans, runs, serve, status

    plans.register(app)
    runs.register(app)
    status.register(app)
    serve.register(app)
    try:
        app()
    except FarshoreError as error:
        leave(show_error(error))
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else Exit.BAD_INPUT)
    leave(0)


def temporal_extension() -> NoReturn:
    """`temporal farshore …`: the temporal CLI finds this executable on PATH and hands over the arguments."""
    main()
