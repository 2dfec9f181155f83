"""The plans of a folder: `<name>.yaml` (or `.yml`), found by name. The only module of this room that reads files."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from farshore.domain.errors import Code, FarshoreError
from farshore.plans.lint import ERROR, LintFinding
from farshore.plans.loader import LoadedPlan, invalid, load_text
from farshore.plans.model import NAME_HINT, NAME_PATTERN
from farshore.plans.source import MAX_BYTES

_SUFFIXES = (".yaml", ".yml")


def plan_names(folder: Path) -> list[str]:
    """Names of the plans in a folder, sorted. Empty when there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        {
            p.stem
            for p in folder.iterdir()
            if p.suffix in _SUFFIXES and re.match(NAME_PATTERN, p.stem) and p.is_file()
        }
    )


def read_plan(folder: Path, name: str) -> LoadedPlan:
    """Load a plan by its name.

    Raises PlanNotFound (with near matches and the names there are) and PlanInvalid. A name that could lead out of the
    folder is no name of a plan; nor is a link that does.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise _not_found(folder, name, f"{name!r} cannot be the name of a plan: use {NAME_HINT}.")
    root = folder.resolve()
    paths = [root / f"{name}{suffix}" for suffix in _SUFFIXES]
    found = [p for p in paths if p.is_file() and p.resolve().is_relative_to(root)]
    if not found:
        raise _not_found(folder, name, f"There is no plan {name!r}.")
    path = found[0]
    if len(found) > 1:
        clash = LintFinding(
            1,
            1,
            ERROR,
            "two-files",
            f"{found[1].name} is a plan of the same name",
            "Remove one of the two files.",
        )
        raise invalid(path.name, (clash,))
    loaded = load_text(_text(path), path.name)
    if loaded.plan.plan != name:
        position = loaded.positions[("plan",)]
        mismatch = LintFinding(
            position.line,
            position.column,
            ERROR,
            "other-name",
            f"the plan calls itself {loaded.plan.plan!r}, but the file is {path.name}",
            f"Write `plan: {name}`, or rename the file.",
            "plan",
        )
        raise invalid(path.name, (mismatch,))
    return loaded


def _text(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(raw) > MAX_BYTES:  # cut in the middle of a character: the size is what is wrong
            return raw.decode(errors="replace")
        before = raw[: error.start]
        finding = LintFinding(
            before.count(b"\n") + 1,
            error.start - (before.rfind(b"\n") + 1) + 1,
            ERROR,
            "encoding",
            f"the byte {raw[error.start]:#04x} is not UTF-8",
            "Save the file as UTF-8.",
        )
        raise invalid(path.name, (finding,)) from None


def _not_found(folder: Path, name: str, what: str) -> FarshoreError:
    names = plan_names(folder)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    there = (
        f" Plans: {', '.join(names[:50])}{' …' if len(names) > 50 else ''}."
        if names
        else " There are no plans."
    )
    return FarshoreError(
        Code.PLAN_NOT_FOUND,
        f"{what}{hint}{there}",
        subject=name,
        details={"near": near, "plans": names[:200]},
    )
