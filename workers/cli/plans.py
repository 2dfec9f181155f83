"""Commands on plan files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from farshore.plans.catalog import plan_names
from farshore.plans.lint import lint
from farshore.workers.cli.exits import Exit
from farshore.workers.cli.main import SettingsOption, err, leave, out, settings_for


def register(app: typer.Typer) -> None:
    """Add the group `plan`."""
    plan = typer.Typer(help="Recovery plans as files.", no_args_is_help=True)
    plan.command("lint", help="Check plan files: every finding with line, column and a fix.")(lint_files)
    plan.command("list", help="Names of the plans in the plans folder.")(list_plans)
    app.add_typer(plan, name="plan")


def lint_files(
    files: Annotated[list[str], typer.Argument(help="plan files, or names of plans in the plans folder")],
    settings: SettingsOption = None,
) -> None:
    """Check plans; exit code 2 if one has an error."""
    bad = False
    for name in files:
        path = Path(name)
        if not path.is_file() and path.suffix not in (".yaml", ".yml"):
            path = settings_for(settings, None).plans.folder / f"{name}.yaml"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            err.print(f"[bold red]{escape(str(path))}[/]: can't be read ({escape(str(error))})")
            bad = True
            continue
        findings = lint(text)
        for f in findings:
            colour = "red" if f.severity == "error" else "yellow"
            out.print(f"[{colour}]{escape(f.text(path.name))}[/]")
            bad = bad or f.severity == "error"
        if not findings:
            out.print(f"{escape(path.name)}: no findings")
    leave(Exit.BAD_INPUT if bad else Exit.DONE)


def list_plans(settings: SettingsOption = None) -> None:
    """Plans in the plans folder."""
    for name in plan_names(settings_for(settings, None).plans.folder):
        out.print(escape(name))
    leave(Exit.DONE)
