"""From the text of a plan to a plan, or to all that is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farshore.domain.errors import Code, FarshoreError
from farshore.plans.lint import LintFinding, analyse
from farshore.plans.model import Plan
from farshore.plans.source import Path, Position

_SHOWN = 40  # findings in one message; the rest are counted, and all are in the details


@dataclass(frozen=True, slots=True)
class LoadedPlan:
    """A plan that may be run, and where it came from."""

    plan: Plan
    sha256: str  # of the text in UTF-8, hexadecimal
    name: str  # what the text is called in messages: the file
    positions: Mapping[Path, Position]  # of every value; see `path_text` for what a path looks like
    warnings: tuple[LintFinding, ...]


def load_text(text: str, name: str) -> LoadedPlan:
    """Load a plan; `name` is what messages call the text, such as `crm.yaml`.

    Raises PlanInvalid with every finding as `crm.yaml:12:7: …` in its message, and as data in its details.
    """
    analysis = analyse(text)
    if analysis.plan is None:
        raise invalid(name, analysis.errors)
    return LoadedPlan(
        plan=analysis.plan,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        name=name,
        positions=analysis.source.values,
        warnings=analysis.findings,
    )


def invalid(name: str, errors: Sequence[LintFinding]) -> FarshoreError:
    """The error for a plan with findings."""
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    lines = [finding.text(name) for finding in errors[:_SHOWN]]
    if len(errors) > _SHOWN:
        lines.append(f"… and {len(errors) - _SHOWN} more")
    return FarshoreError(
        Code.PLAN_INVALID,
        f"{name} has {count}:\n" + "\n".join(lines),
        subject=name,
        causes=("The plan file has an error at each line that is named.",),
        details={
            "findings": [
                {
                    "line": f.line,
                    "column": f.column,
                    "path": f.path,
                    "code": f.code,
                    "message": f.message,
                    "fix": f.fix,
                }
                for f in errors
            ]
        },
    )
