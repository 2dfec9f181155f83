"""What workflows know of activities: name, message types, timeouts and retry rules, as one table.

Retry follows the class of the step. Errors that retrying can't help are marked non-retryable where they are raised
(`domain.errors`), so the rules here only say how long to go on. Seconds throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

from temporalio.common import RetryPolicy

from farshore.activities import messages as m
from farshore.contract.machine import MachineStatus

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class Rules:
    """Timeouts in seconds; None: no limit of that kind."""

    start_to_close: float
    heartbeat: float | None = None
    schedule_to_start: float | None = None
    schedule_to_close: float | None = None
    first_retry: float = 1.0
    longest_retry: float = 30.0
    attempts: int = 0  # 0: until schedule_to_close

    def retry_policy(self) -> RetryPolicy:
        """As Temporal's type."""
        return RetryPolicy(
            initial_interval=timedelta(seconds=self.first_retry),
            backoff_coefficient=2.0,
            maximum_interval=timedelta(seconds=self.longest_retry),
            maximum_attempts=self.attempts,
        )


HEARTBEAT = 15.0
"""After a worker's death a step goes on this many seconds later, plus the first retry interval."""

CONTROL = Rules(start_to_close=30, schedule_to_close=600, longest_retry=10)
SCRIPT = Rules(start_to_close=6 * 3600, heartbeat=HEARTBEAT, attempts=3)  # at least once: scripts get a key
SOURCE = Rules(
    start_to_close=3600, heartbeat=HEARTBEAT, schedule_to_start=120, schedule_to_close=7200, attempts=6
)
SOURCE_BEST_EFFORT = Rules(
    start_to_close=900, heartbeat=HEARTBEAT, schedule_to_start=15, schedule_to_close=900, attempts=2
)
TARGET = Rules(
    start_to_close=4 * 3600,
    heartbeat=HEARTBEAT,
    schedule_to_start=600,
    schedule_to_close=6 * 3600,
    longest_retry=20,
)
TARGET_IN_A_HURRY = Rules(
    start_to_close=120, heartbeat=HEARTBEAT, schedule_to_start=60, schedule_to_close=120, longest_retry=10
)
STORE = Rules(
    start_to_close=600, heartbeat=HEARTBEAT, schedule_to_start=600, schedule_to_close=1800, longest_retry=20
)
LEG = Rules(start_to_close=2 * 3600, heartbeat=20, schedule_to_start=60, first_retry=2, attempts=3)


@dataclass(frozen=True, slots=True)
class Step(Generic[In, Out]):
    """An activity as a workflow sees it."""

    name: str
    input: type[In]
    output: type[Out]
    rules: Rules


LOAD_PLAN = Step("load_plan", m.LoadPlan, m.PinnedPlan, CONTROL)
UPDATE_MACHINE = Step(
    "update_machine", m.UpdateCall, MachineStatus, Rules(120, schedule_to_close=1800, longest_retry=10)
)
START_PROTECTION = Step("start_protection", m.StartProtection, MachineStatus, CONTROL)
MACHINE_STATUS = Step("machine_status", m.StatusCall, m.StatusList, CONTROL)
READ_SCRIPT = Step("read_script", m.ReadScript, str, CONTROL)
RUN_WORKER_SCRIPT = Step("run_worker_script", m.WorkerScript, m.ScriptOutput, SCRIPT)

INSPECT_SOURCE = Step("inspect_source", m.SourceCall, m.InspectReport, SOURCE)
ENABLE_TRACKING = Step("enable_tracking", m.SourceCall, m.InspectReport, SOURCE)
SHUT_DOWN_SOURCE = Step("shut_down_source", m.ShutDownCall, m.ShutDownReport, SOURCE)
PROVE_SOURCE_OFF = Step("prove_source_off", m.SourceCall, m.FenceReport, SOURCE)
POWER_ON_SOURCE = Step("power_on_source", m.SourceCall, m.InspectReport, SOURCE)
REAP_SOURCE = Step("reap_source", m.SourceCall, m.Removed, SOURCE)
REPLICATE_LEG = Step("replicate_leg", m.LegCall, m.LegReport, LEG)
FINAL_CYCLE = Step("final_cycle", m.FinalCycleCall, m.PointView, SOURCE)

CHECK_TARGET = Step("check_target", m.CheckTargetCall, list[m.FindingView], TARGET)
ENSURE_TEST_NETWORK = Step("ensure_test_network", m.TestNetworkCall, str, TARGET)
CHECK_ISOLATED = Step("check_isolated", m.IsolationCall, str, TARGET)
CHOOSE_POINT = Step("choose_point", m.ChoosePointCall, m.ChosenPoint, STORE)
FENCE_REPLICA = Step("fence_replica", m.StoreCall, m.Removed, STORE)
LIST_POINTS = Step("list_points", m.StoreCall, m.PointList, STORE)
KEEP_ONLY_POINT = Step("keep_only_point", m.StoreCall, m.Removed, STORE)
RELEASE_HOLDS = Step("release_holds", m.StoreCall, m.Removed, STORE)
REMOVE_REPLICA = Step("remove_replica", m.StoreCall, m.Removed, STORE)
CREATE_DISK = Step("create_disk", m.DiskCall, m.ResourceView, TARGET)
CREATE_NIC = Step("create_nic", m.NicCall, list[m.ResourceView], TARGET)
CREATE_MACHINE = Step("create_machine", m.MachineCall, m.ResourceView, TARGET)
WAIT_UNTIL_RUNNING = Step("wait_until_running", m.WaitRunningCall, m.RunningReport, TARGET)
FIND_MACHINE = Step("find_machine", m.OwnedCall, m.ResourceView, TARGET)
REMOVE_RESOURCES = Step("remove_resources", m.RemoveCall, m.RemoveReport, TARGET)
RUN_GUEST_SCRIPT = Step(
    "run_guest_script", m.GuestScriptCall, m.ScriptOutput, Rules(6 * 3600, HEARTBEAT, attempts=3)
)

STEPS = tuple(value for value in list(globals().values()) if isinstance(value, Step))
"""Every step; a test finds an implementation with the same types for each."""
