"""The texts for the web UI: what waits comes first, people's words stay words, and a large plan stays readable."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

from farshore.contract.runs import MachineProgress, PendingAction, RunKind, RunProgress
from farshore.workflows import details
from farshore.workflows.stages import COURSES

START = datetime(2026, 11, 22, 23, 59, 30, tzinfo=UTC)


def page(progress: RunProgress, reason: str = "") -> str:
    return details.run_page(
        progress,
        course=COURSES[RunKind.PLANNED],
        run="crm/planned/1",
        namespace="default",
        now=START + timedelta(seconds=60),
        reason=reason,
        errors=(),
    )


def progress(*machines: MachineProgress, **fields) -> RunProgress:
    return RunProgress(
        plan="crm", kind="planned", phase="Making disks", started_at=START, machines=machines, **fields
    )


def test_what_waits_for_a_person_comes_first_with_an_answer_that_can_be_copied():
    pending = PendingAction(
        action="look", title="Look", instructions="First this.\nThen that.", since=START, until=None
    )
    text = page(progress(pending=(pending,)))
    assert text.startswith("> **WAITING FOR A PERSON: Look**\n> First this.\n> Then that.\n\n")
    copied = json.loads(text.split("```")[1])
    assert copied == {"action": "look", "decision": "approve", "by": "YOUR NAME"}


def test_lists_stand_apart_or_the_page_would_show_dashes():
    text = page(progress(MachineProgress(machine="db", group="data", stage="boot", outcome="done")))
    for first in re.finditer(r"(?m)^(?!- )(?P<line>.*)\n- ", text):
        assert first["line"] == ""


def test_peoples_words_can_not_become_markup():
    text = page(progress(log=("eve: <img src=x> [x](http://y) **loud**",)), reason="a\n- b <script>")
    assert "<" not in text
    assert "Reason: a - b &lt;script&gt;" in text
    assert r"\[x\](http://y) \*\*loud\*\*" in text


def test_failures_stand_before_the_rest_and_a_thousand_machines_fit_the_page():
    rows = [
        MachineProgress(machine=f"m{i}", group=f"g{i // 50}", stage="failover", outcome="done")
        for i in range(1000)
    ]
    rows[49] = MachineProgress(machine="m49", group="g0", stage="failover", outcome="failed", note="no quota")
    text = page(progress(*rows))
    assert "0 of 1000 machines done, **1 FAILED**" in text
    lines = text.splitlines()
    group = next(i for i, line in enumerate(lines) if "**Group g0**: 50 machines, **1 FAILED**" in line)
    assert "m49" in lines[group + 1]
    assert "**FAILED** in “making disks” — no quota" in lines[group + 1]
    assert len(text) < 20_000


def test_links_lead_to_the_machines_own_run_whatever_its_id():
    text = page(progress(MachineProgress(machine="db", group="data", stage="boot", outcome="done")))
    assert "[db](namespaces/default/workflows/crm%2Fplanned%2F1%2Fdb): starting machines ✓" in text


def test_a_groups_label_names_its_machines_but_not_all_of_fifty():
    assert details.group_label("data", ["db"]) == "Group data: db"
    assert (
        details.group_label("web", [f"w{i}" for i in range(50)])
        == "Group web: w0, w1, w2, w3, w4 and 45 more"
    )
