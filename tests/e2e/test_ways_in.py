"""Every way in starts the same run: command line, temporal CLI, its extension, HTTP with curl, another Python process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farshore.contract.client import RunFailed
from farshore.contract.runs import Decision, DecisionKind, FailoverInput, RunKind, RunStatus
from farshore.domain.errors import FarshoreError
from tests.e2e.conftest import until
from tests.e2e.helpers import NAMES, fail_over, protect

pytestmark = pytest.mark.timeout(400)
BIN = Path(sys.executable).parent


def run(stack, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = stack.environment()
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"  # where temporal finds its extension
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False, cwd=stack.root
    )


OTHER_SERVICE = """
import asyncio, sys
from farshore.contract.client import FarshoreClient
from farshore.contract.runs import FailoverInput, RunKind

async def main():
    client = await FarshoreClient.connect(sys.argv[1])
    run = await client.failover(FailoverInput(plan="crm", kind=RunKind.CLEANUP, notes="from another service"))
    result = await run.result()
    print(result.status.value, flush=True)

asyncio.run(main())
"""


async def test_a_failover_can_be_started_in_every_documented_way(make_stack, connect):
    stack = make_stack(manual=True)
    client = await connect(stack)

    # the command line, end to end
    done = await asyncio.to_thread(stack.run, "protect", "crm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Succeeded" in done.stdout
    status = await asyncio.to_thread(stack.run, "status", "crm", "--json")
    rows = json.loads(status.stdout)
    assert {row["machine"] for row in rows} == set(NAMES)
    assert {row["state"]["main"] for row in rows} == {"Protected"}
    points = await asyncio.to_thread(stack.run, "points", "crm", "--json")
    assert {p["machine"] for p in json.loads(points.stdout)} == set(NAMES)

    # temporal's own command line, as in the README
    started = await asyncio.to_thread(
        run, stack, str(BIN / "temporal"), "workflow", "start", "--address", stack.temporal, "--type", "Failover",
        "--task-queue", "farshore", "--workflow-id", "crm/test/by-temporal",
        "--input", '{"plan": "crm", "kind": "test", "reason": "by temporal"}',
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    assert (await client.run("crm/test/by-temporal").result()).status is RunStatus.SUCCEEDED

    # another service, in Python, in a process of its own
    other = await asyncio.to_thread(run, stack, sys.executable, "-c", OTHER_SERVICE, stack.temporal)
    assert other.stdout.strip().endswith("Succeeded"), other.stderr

    # HTTP, with curl
    body = {
        "workflowType": {"name": "Failover"},
        "taskQueue": {"name": "farshore"},
        "input": [{"plan": "crm", "kind": "test", "reason": "by curl"}],
    }
    curl = await asyncio.to_thread(
        run, stack, "curl", "-sS", "--noproxy", "*", "-X", "POST", "-H", "Content-Type: application/json",
        "-d", json.dumps(body),
        f"http://127.0.0.1:{stack.http_port}/api/v1/namespaces/default/workflows/crm-test-by-curl",
    )  # fmt: skip
    assert "runId" in curl.stdout, curl.stdout + curl.stderr
    assert (await client.run("crm-test-by-curl").result()).status is RunStatus.SUCCEEDED

    # temporal's extension: `temporal farshore …`
    extended = await asyncio.to_thread(run, stack, str(BIN / "temporal"), "farshore", "cleanup", "crm")
    assert extended.returncode == 0, extended.stdout + extended.stderr
    assert "Succeeded" in extended.stdout

    # and a manual action answered by the command line; the wrong answers are refused in words
    planned = await asyncio.to_thread(stack.run, "failover", "crm", "--kind", "planned", "--no-wait")
    assert planned.returncode == 0, planned.stderr
    found = client.run(planned.stdout.split()[1])
    await until("the manual action", lambda: _pending(found), 180)
    with pytest.raises(FarshoreError, match="check-the-database"):
        await found.decide(Decision(action="no-such-action", decision=DecisionKind.APPROVE, by="eve"))
    shown = await asyncio.to_thread(stack.run, "status", "crm")
    assert "WAITING FOR A PERSON" in shown.stdout
    approved = await asyncio.to_thread(
        stack.run, "approve", "crm", "--by", "carol", "--observation", "answers"
    )
    assert approved.returncode == 0, approved.stdout + approved.stderr
    result = await found.result()
    assert result.status is RunStatus.SUCCEEDED
    assert [(d.by, d.observation) for d in result.decisions] == [("carol", "answers")]
    committed = await asyncio.to_thread(stack.run, "commit", "crm")
    assert committed.returncode == 0, committed.stdout + committed.stderr


async def _pending(found):
    return (await found.progress()).pending


async def says(stack, expected: str, code: int, *command: str) -> None:
    """The command ends with this exit code, says so in these words, and shows no trace."""
    done = await asyncio.to_thread(stack.run, *command)
    text = done.stdout + done.stderr
    assert done.returncode == code, f"{command}: exit {done.returncode}\n{text}"
    assert expected in text, f"{command}: {text}"
    assert "Traceback" not in text, text
    assert 'File "' not in text, text


async def test_bad_input_is_answered_in_words_and_never_with_a_trace(make_stack, connect):
    stack = make_stack(manual=True)
    client = await connect(stack)
    plans = stack.root / "plans"
    (plans / "broken.yaml").write_text("farshore: 1\nplan: broken\nmachines: {a: [}\n", encoding="utf-8")

    await says(stack, "crn", 2, "failover", "crn", "--kind", "test")  # unknown plan
    await says(stack, "crm", 2, "failover", "crn", "--kind", "test")  # and the near match is named
    await says(stack, "crm-web99", 2, "protect", "crm", "-m", "crm-web99")  # unknown machine
    await says(stack, "must be one of planned, unplanned, test", 2, "failover", "crm", "--kind", "sideways")
    await says(stack, "broken.yaml:3", 2, "failover", "broken", "--kind", "test")  # malformed YAML: line
    await says(stack, "broken.yaml:3", 2, "plan", "lint", "broken")
    await says(stack, "not protected", 1, "failover", "crm", "--kind", "planned")
    await says(stack, "does not answer", 5, "status", "--address", "127.0.0.1:1")

    # what the web UI sends: a wrong object ends the workflow at once, with words, without a stack trace
    for bad, word in (
        ({"plan": "crm", "kind": "live"}, "kind: Input should be"),
        ({"plan": "crm", "kind": "test", "maschines": ["crm-db01"]}, "maschines: is not a known field"),
        ({"kind": "test"}, "plan: is required"),
    ):
        handle = await client.temporal.start_workflow(
            "Failover", bad, id=f"bad-{word[:8]}".replace(" ", "-").replace(":", ""), task_queue="farshore"
        )
        with pytest.raises(Exception, match="Workflow execution failed") as caught:
            await asyncio.wait_for(handle.result(), 30)
        cause = caught.value.__cause__
        assert word in str(cause), str(cause)
        history = await handle.fetch_history()
        failure = history.events[-1].workflow_execution_failed_event_attributes.failure
        assert failure.stack_trace == ""
        assert failure.application_failure_info.type == "InvalidInput"


async def test_what_the_state_of_a_machine_forbids_is_refused_in_words(make_stack, connect):
    stack = make_stack(manual=True)
    client = await connect(stack)

    # wrong state, and a second run while the first holds the machines
    await protect(client)
    await says(stack, "no test is open", 1, "cleanup", "crm")
    await says(stack, "no failover to commit", 1, "commit", "crm")
    await fail_over(client, RunKind.TEST)
    await says(stack, "Clean up the test first", 1, "failover", "crm", "--kind", "planned")  # a test is open
    await fail_over(client, RunKind.CLEANUP)
    first = await client.failover(FailoverInput(plan="crm", kind=RunKind.PLANNED))
    await until("the first run waits for a person", lambda: _pending(first), 180)
    await says(stack, first.id, 1, "failover", "crm", "--kind", "test")
    await says(stack, first.id, 1, "change-point", "crm", "-p", "latest", "-m", "crm-web01")
    rejected = await asyncio.to_thread(
        stack.run, "reject", "crm", "--by", "dora", "-o", "the database is corrupt"
    )
    assert rejected.returncode == 0, rejected.stderr
    with pytest.raises(RunFailed, match="dora rejected") as refused:
        await first.result()
    assert refused.value.result is not None
    states = {row.machine: row.state for row in refused.value.result.machines}
    assert states == {
        "crm-db01": "PlannedCommitPending",
        "crm-app01": "PlannedFailoverCompletionFailed",
        "crm-web01": "PlannedFailoverCompletionFailed",
    }
    again = await client.failover(FailoverInput(plan="crm", kind=RunKind.PLANNED, reason="again"))
    await until("the rerun waits for a person", lambda: _pending(again), 180)
    await again.decide(Decision(action="check-the-database", by="dora", observation="a false alarm"))
    result = await again.result()
    outcomes = {row.machine: row.outcome.value for row in result.machines}
    assert outcomes == {"crm-db01": "skipped", "crm-app01": "succeeded", "crm-web01": "succeeded"}
