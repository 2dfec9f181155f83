"""Lint: everything wrong with a plan's text, at once, each with its place and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from farshore.plans.checks import ERROR, WARNING, Issue, check
from farshore.plans.model import Plan
from farshore.plans.source import Path, Source, read
from farshore.plans.wording import issues_of

__all__ = ["ERROR", "WARNING", "Analysis", "LintFinding", "analyse", "lint", "path_text"]


@dataclass(frozen=True, slots=True)
class LintFinding:
    """Something wrong. `severity` is "error" (the plan is refused) or "warning". Line and column count from 1."""

    line: int
    column: int
    severity: str
    code: str
    message: str
    fix: str
    path: str = ""

    def text(self, name: str) -> str:
        """One line as compilers write it: `crm.yaml:12:7: boot[0].machines[1]: what is wrong. What would be right.`"""
        where = f"{self.path}: " if self.path else ""
        level = "warning: " if self.severity == WARNING else ""
        end = "" if self.message.endswith((".", "?")) else "."
        return f"{name}:{self.line}:{self.column}: {level}{where}{self.message}{end} {self.fix}"


@dataclass(frozen=True, slots=True)
class Analysis:
    """A text, analysed. `plan` is None when a finding is an error."""

    plan: Plan | None
    source: Source
    findings: tuple[LintFinding, ...]

    @property
    def errors(self) -> tuple[LintFinding, ...]:
        """The findings for which the plan is refused."""
        return tuple(f for f in self.findings if f.severity == ERROR)


def lint(text: str) -> list[LintFinding]:
    """All findings, in the order of the text. Empty for a good plan."""
    return list(analyse(text).findings)


def analyse(text: str) -> Analysis:
    """Parse and check a text. Raises nothing for a bad plan."""
    source = read(text)
    findings = [
        LintFinding(p.position.line, p.position.column, ERROR, p.code, p.message, p.fix, path_text(p.path))
        for p in source.problems
    ]
    plan: Plan | None = None
    if source.data is not None and not isinstance(source.data, dict):
        findings.append(
            LintFinding(
                1,
                1,
                ERROR,
                "type",
                "a plan is a map of `key: value`",
                "Begin with `farshore: 1` and `plan: <name>`.",
            )
        )
    elif source.data is not None:
        data = cast("dict[str, Any]", source.data)
        issues: list[Issue] = []
        try:
            plan = Plan.model_validate(data)
        except ValidationError as error:
            issues += issues_of(error)
        findings += _located(source, [*issues, *check(data)])
    elif not findings:  # a text that holds nothing but `null`
        findings.append(
            LintFinding(
                1, 1, ERROR, "empty", "the plan is empty", "Begin with `farshore: 1` and `plan: <name>`."
            )
        )
    findings.sort(key=lambda f: (f.line, f.column, f.severity))
    refused = any(f.severity == ERROR for f in findings)
    return Analysis(None if refused else plan, source, tuple(findings))


def _located(source: Source, issues: Iterable[Issue]) -> list[LintFinding]:
    found: list[LintFinding] = []
    for issue in issues:
        position = source.at(issue.path, key=issue.key)
        found.append(
            LintFinding(
                position.line,
                position.column,
                issue.severity,
                issue.code,
                issue.message,
                issue.fix,
                path_text(issue.path),
            )
        )
    return found


def path_text(path: Path) -> str:
    """A path as people read it: `boot[0].machines[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
