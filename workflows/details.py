"""Texts for Temporal's web UI: the "current details" of a workflow, written for a person at three in the morning.

What that page does with Markdown (UI 2.54, looked at): a list needs an empty line before it; nested lists run together
into one line, so lists are flat and machines are indented by an em space; a quotation is large and coloured, which is
right for what waits for a person; HTML is passed through, so everything that people typed is escaped; a link opens a new
tab and is relative, so that it works under whatever address the UI is served.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from urllib.parse import quote

from farshore.contract.runs import ErrorView, MachineProgress, PendingAction, RunProgress
from farshore.workflows.messages import StageOutcome
from farshore.workflows.stages import Course

_SPECIAL = re.compile(r"([\\`*_\[\]])")
_INDENT = "\u2003"
_LINES = 60  # machines shown in all
_MOST, _LEAST = 10, 2  # machines shown per group
_EVENTS = 8
_PROBLEMS = 5
_NAMES = 5  # machines named in a group's label


def plain(text: str, limit: int = 400) -> str:
    """Somebody's words as they are: one line, nothing in them is Markdown or HTML."""
    words = " ".join(text.split())
    cut = words if len(words) <= limit else f"{words[: limit - 1]}…"
    escaped = cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", escaped)


def many(number: int, noun: str) -> str:
    """`1 machine`, `2 machines`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(number: int) -> str:
    """Bytes as people read them."""
    gib = number / 2**30
    return f"{gib:.4g} GiB" if gib >= 1 else f"{number / 2**20:.4g} MiB"


def clock(at: datetime) -> str:
    """A time of day that can't be misread."""
    return f"{at:%H:%M:%S} UTC"


def instant(at: datetime) -> str:
    """A date and time that can't be misread."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def link(text: str, workflow: str, namespace: str) -> str:
    """A link to a workflow's page."""
    return f"[{plain(text)}](namespaces/{quote(namespace, safe='')}/workflows/{quote(workflow, safe='')})"


def bullets(lines: Iterable[str]) -> str:
    """A flat list."""
    return "\n".join(f"- {line}" for line in lines)


def page(*blocks: str) -> str:
    """Blocks with the empty lines that Markdown needs between them."""
    return "\n\n".join(block for block in blocks if block)


def group_label(part: str, machines: Sequence[str]) -> str:
    """Label of a group on its plan's timeline."""
    named = ", ".join(machines[:_NAMES])
    return f"Group {part}: {named}{f' and {len(machines) - _NAMES} more' if len(machines) > _NAMES else ''}"


def waiting(pending: PendingAction) -> str:
    """What waits for a person, what to look at and exactly how to answer."""
    quotation = [f"**WAITING FOR A PERSON: {plain(pending.title)}**"]
    quotation += [plain(line, 2000) for line in pending.instructions.splitlines() if line.strip()]
    if pending.needs > 1:
        so_far = f", given by {', '.join(map(plain, pending.given))}" if pending.given else ""
        quotation.append(f"{len(pending.given)} of {pending.needs} different people so far{so_far}.")
    answer = f'{{"action": {json.dumps(pending.action)},\n "decision": "approve", "by": "YOUR NAME"}}'
    limit = f" Time limit: {instant(pending.until)}." if pending.until else ""
    return page(
        "\n".join(f"> {line}" for line in quotation),
        f"Waiting since {instant(pending.since)}.{limit}\n"
        "To answer: **More Actions**, **Send an Update**, `decide`, with this input (or `reject`):",
        f"```\n{answer}\n```",
    )


def run_page(
    progress: RunProgress,
    *,
    course: Course,
    run: str,
    namespace: str,
    now: datetime,
    reason: str,
    errors: Sequence[ErrorView],
) -> str:
    """The page of a Failover: what waits, where the run is, what went wrong, each machine, what happened last."""
    stages = {stage.name: stage.title for stage in course.stages}
    last = course.stages[-1].name
    done = sum(1 for m in progress.machines if m.outcome == StageOutcome.DONE.value and m.stage == last)
    bad = sum(1 for m in progress.machines if _is_bad(m))
    counts = f"{done} of {many(len(progress.machines), 'machine')} done" if progress.machines else ""
    facts = [
        f"**Now**: {plain(progress.phase)}"
        + (f" ({counts}{f', **{bad} FAILED**' if bad else ''})" * bool(counts)),
        f"Started {instant(progress.started_at)}; this text is of {clock(now)}, "
        f"{(now - progress.started_at).total_seconds():.0f} s later (press R to read it again)",
    ]
    if reason:
        facts.append(f"Reason: {plain(reason)}")
    problems = [f"**Problem**: {plain(view.text(), 600)}" for view in errors[:_PROBLEMS]]
    if len(errors) > _PROBLEMS:
        problems.append(f"… and {many(len(errors) - _PROBLEMS, 'more problem')}")
    return page(
        *(waiting(pending) for pending in progress.pending),
        f"**{course.title} of {plain(progress.plan)}**",
        bullets([*facts, *problems, *_groups(progress.machines, stages, run, namespace)]),
        "**What happened last** (newest first, times in UTC)" if progress.log else "",
        bullets(plain(line) for line in reversed(progress.log[-_EVENTS:])),
    )


def _groups(
    machines: Sequence[MachineProgress], stages: dict[str, str], run: str, namespace: str
) -> Iterable[str]:
    groups: dict[str, list[MachineProgress]] = {}
    for machine in machines:
        groups.setdefault(machine.group, []).append(machine)
    most = max(_LEAST, min(_MOST, _LINES // max(1, len(groups))))
    for group, members in groups.items():
        bad = sum(1 for m in members if _is_bad(m))
        yield f"**Group {plain(group)}**: {many(len(members), 'machine')}{f', **{bad} FAILED**' if bad else ''}"
        shown = sorted(members, key=lambda m: not _is_bad(m))[
            :most
        ]  # stable: failures first, then the plan's order
        for m in shown:
            name = link(m.machine, f"{run}/{m.machine}", namespace)
            yield f"{_INDENT}{name}: {outcome(stages.get(m.stage, m.stage), m.outcome, m.note)}"
        if len(members) > len(shown):
            yield f"{_INDENT}… and {len(members) - len(shown)} more"


def outcome(stage: str, result: str, note: str) -> str:
    """How a machine came out of a stage, in words."""
    said = f" — {plain(note)}" if note else ""
    what = plain(f"{stage[:1].lower()}{stage[1:]}")
    match result:
        case StageOutcome.DONE.value:
            return f"{what} ✓{said}"
        case StageOutcome.FAILED.value:
            return f"**FAILED** in “{what}”{said}" if what else f"**FAILED**{said}"
        case StageOutcome.STOPPED.value:
            return f"**stopped** before the end of “{what}”{said}"
        case StageOutcome.SKIPPED.value:
            return f"left out{said}"
        case _:
            return "not begun"


def _is_bad(machine: MachineProgress) -> bool:
    return machine.outcome in (StageOutcome.FAILED.value, StageOutcome.STOPPED.value)
