"""What began under an older release goes on under this one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from farshore.contract import names
from farshore.contract.converter import data_converter
from farshore.contract.runs import RunKind
from farshore.workers.worker import RUNS, workflow_runner
from farshore.workflows.machine_protection import MachineProtection

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = sorted(HERE.glob("*.json"))


def history(path: Path) -> WorkflowHistory:
    """With the real id: ids of children are made of it."""
    kept = json.loads(path.read_text())
    return WorkflowHistory.from_json(kept["workflow_id"], kept["history"])


def workflow_type(path: Path) -> str:
    first = json.loads(path.read_text())["history"]["events"][0]
    return first["workflowExecutionStartedEventAttributes"]["workflowType"]["name"]


def replayer(*workflows: type) -> Replayer:
    return Replayer(workflows=workflows, data_converter=data_converter, workflow_runner=workflow_runner())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
async def test_a_kept_history_replays(path: Path) -> None:
    await replayer(*RUNS, MachineProtection).replay_workflow(history(path))


def test_there_is_a_history_of_every_workflow_and_every_kind() -> None:
    types = {workflow_type(path) for path in FILES}
    assert types == {
        names.FAILOVER,
        names.FAILOVER_GROUP,
        names.MACHINE_FAILOVER,
        names.PROTECTION,
        names.MACHINE_PROTECTION,
        names.RECOVERY_POINTS,
    }
    kinds = {path.stem.partition("-failover-")[2] for path in FILES if "-machine-failover-" in path.name}
    assert {kind.value for kind in RunKind} <= kinds


@pytest.mark.parametrize(
    ("module", "of", "kept", "before"),
    [
        ("points", "RecoveryPoints", "recovery-points", "        try:\n            pinned"),
        ("failover", "Failover", "failover-planned", '        self._journal.enter("loading the plan")\n'),
        (
            "machine_failover",
            "MachineFailover",
            "machine-failover-planned",
            "        self._show()\n        outcome",
        ),
        (
            "machine_protection",
            "MachineProtection",
            "machine-protection",
            "        self._show()\n        while",
        ),
    ],
)
async def test_an_inserted_timer_would_be_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, of: str, kept: str, before: str
) -> None:
    source = (ROOT / "workflows" / f"{module}.py").read_text()
    assert source.count(before) == 1
    mutant = f"mutant_of_{module}"
    (tmp_path / f"{mutant}.py").write_text(
        source.replace(before, f"        await workflow.sleep(1)\n{before}")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        workflow = getattr(__import__(mutant), of)
        path = next(p for p in FILES if p.stem.endswith(f"-{kept}"))
        with pytest.raises(NondeterminismError):
            await replayer(workflow).replay_workflow(history(path))
    finally:
        sys.modules.pop(mutant, None)
