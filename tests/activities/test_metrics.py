"""Prometheus learns both instants of the recovery point objective, and what legs did."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from temporalio.testing import ActivityEnvironment

from farshore.activities.metrics import LegMetrics
from farshore.replication.loop import LegResult
from farshore.replication.ports import Progress

CAPTURED = datetime(2026, 11, 22, 12, 0, 30, tzinfo=UTC)
APPLIED = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


@dataclass
class Instrument:
    seen: list[tuple[str, float]]
    name: str

    def set(self, value: float, additional_attributes: Any = None) -> None:
        self.seen.append((self.name, value))

    def add(self, value: float, additional_attributes: Any = None) -> None:
        self.seen.append((self.name, value))


@dataclass
class Meter:
    attributes: dict[str, Any] = field(default_factory=dict)
    seen: list[tuple[str, float]] = field(default_factory=list)

    def with_additional_attributes(self, more: dict[str, Any]) -> Meter:
        self.attributes |= more
        return self

    def create_gauge_float(
        self, name: str, description: str | None = None, unit: str | None = None
    ) -> Instrument:
        return Instrument(self.seen, name)

    create_counter = create_gauge_float


def test_two_instants_and_three_counts():
    environment, meter = ActivityEnvironment(), Meter()
    environment.metric_meter = meter  # type: ignore[assignment]  # what the code calls of a meter

    def leg() -> None:
        metrics = LegMetrics("db1", "crm")
        waiting = Progress("waiting", "", 0, 0, 7)
        metrics.note(waiting)
        at = Progress("waiting", "", 0, 0, 8, newest_taken_at=CAPTURED, newest_applied_at=APPLIED)
        metrics.note(at)
        metrics.note(at)  # told once
        metrics.done(
            LegResult(
                cycles=4, points=3, newest=None, full_copies=0, bytes_changed=0, bytes_read=0, bytes_shipped=99,
                pruned=0, errors=1, last_error="", stopped_because="time", newest_captured_at=CAPTURED,
                newest_recoverable_at=CAPTURED, newest_applied_at=APPLIED, bases=1, damage=(), worst_rpo_s=2.0,
            )
        )  # fmt: skip

    environment.run(leg)
    assert meter.attributes.items() >= {"machine": "db1", "plan": "crm"}.items()
    assert meter.seen == [
        ("farshore_newest_point_captured_timestamp_seconds", CAPTURED.timestamp()),
        ("farshore_newest_point_processed_timestamp_seconds", APPLIED.timestamp()),
        ("farshore_points", 3),
        ("farshore_shipped_bytes", 99),
        ("farshore_cycle_errors", 1),
    ]
