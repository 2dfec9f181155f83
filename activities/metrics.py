"""What replication tells Prometheus, through the SDK's own meter (setting `worker.metrics`).

Ages are not exported, instants are: `time() - farshore_newest_point_captured_timestamp_seconds` is the recovery point
objective as it is now, also while nothing is replicated any more, which is when it matters.
"""

from __future__ import annotations

from datetime import datetime

from temporalio import activity

from farshore.replication.loop import LegResult
from farshore.replication.ports import Progress


class LegMetrics:
    """Of one machine's leg. Made inside the activity; `note` may be called from any thread."""

    def __init__(self, machine: str, plan: str) -> None:
        meter = activity.metric_meter().with_additional_attributes({"machine": machine, "plan": plan})
        self._captured = meter.create_gauge_float(
            "farshore_newest_point_captured_timestamp_seconds",
            "instant of the newest point in the journal",
            "s",
        )
        self._processed = meter.create_gauge_float(
            "farshore_newest_point_processed_timestamp_seconds",
            "instant of the newest point that the replica disks have reached: the fastest to recover",
            "s",
        )
        self._points = meter.create_counter("farshore_points", "points committed by legs that have ended")
        self._shipped = meter.create_counter(
            "farshore_shipped_bytes", "bytes shipped before compression", "By"
        )
        self._errors = meter.create_counter(
            "farshore_cycle_errors", "cycles that failed and were tried again"
        )
        self._told: tuple[datetime | None, datetime | None] = (None, None)

    def note(self, progress: Progress) -> None:
        """Tell the two instants where they changed."""
        now = (progress.newest_taken_at, progress.newest_applied_at)
        if now == self._told:
            return
        self._told = now
        for gauge, instant in zip((self._captured, self._processed), now, strict=True):
            if instant is not None:
                gauge.set(instant.timestamp())

    def done(self, result: LegResult) -> None:
        """Count what the leg did."""
        self._points.add(result.points)
        self._shipped.add(result.bytes_shipped)
        self._errors.add(result.errors)
