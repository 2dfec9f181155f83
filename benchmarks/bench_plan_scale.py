"""A plan of 1,000 machines in 20 groups of 50 on a dev server, with steps that do nothing.

Measures the wall time, the events of the plan's own history (below 4,096, so that it never has to continue as new) and
the largest payload (the limit is 2 MiB). Machine state is played too: what is measured is the run and its children.

    python benchmarks/bench_plan_scale.py [--machines 1000] [--group 50] [--kind planned]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from google.protobuf.message import Message
from temporalio.api.common.v1 import Payload

from farshore.contract.runs import RunKind, RunResult, RunStatus
from tests.workflows.harness import Harness, running

EVENTS = 4096
PAYLOAD = 2 * 2**20


@dataclass(frozen=True)
class Figures:
    machines: int
    seconds: float
    parent_events: int
    parent_bytes: int
    group_events: int
    machine_events: int
    largest_payload: int
    largest_where: str
    result: RunResult

    def text(self) -> str:
        """One block for people."""
        return (
            f"{self.machines} machines: {self.seconds:.1f} s wall, "
            f"{1000 * self.seconds / self.machines:.0f} ms a machine\n"
            f"  plan: {self.parent_events} events, {self.parent_bytes / 1024:.0f} KiB (continue-as-new from {EVENTS})\n"
            f"  first group: {self.group_events} events; first machine: {self.machine_events} events\n"
            f"  largest payload: {self.largest_payload / 1024:.0f} KiB in {self.largest_where} (limit {PAYLOAD // 1024} KiB)"
        )


async def measure(lab: Harness, *, machines: int, group: int, kind: RunKind) -> Figures:
    """Run one plan and look at what it left."""
    shorts = [f"m{i:04d}" for i in range(machines)]
    boot = [(f"g{i // group:02d}", shorts[i : i + group]) for i in range(0, machines, group)]
    world = lab.world(machines=shorts, boot=boot, stateless=True)
    began = time.monotonic()
    run = await lab.start(world, kind)
    result = await run.result()
    seconds = time.monotonic() - began
    assert result.status is RunStatus.SUCCEEDED, result.errors[:3]
    assert len(result.machines) == machines
    ids = [run.id, f"{run.id}/group/{boot[0][0]}", f"{run.id}/{world.machine(shorts[0])}"]
    histories = [await lab.temporal.get_workflow_handle(id).fetch_history() for id in ids]
    size, where = max(
        ((payload.ByteSize(), f"{history.workflow_id} event {event.event_id}"))
        for history in histories
        for event in history.events
        for payload in payloads(event)
    )
    return Figures(
        machines=machines,
        seconds=seconds,
        parent_events=len(histories[0].events),
        parent_bytes=sum(event.ByteSize() for event in histories[0].events),
        group_events=len(histories[1].events),
        machine_events=len(histories[2].events),
        largest_payload=size,
        largest_where=where,
        result=result,
    )


def payloads(message: Message) -> list[Payload]:
    """Every payload inside a message, however deep."""
    if isinstance(message, Payload):
        return [message]
    found: list[Payload] = []
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        many: Any = [value]
        if field.message_type.GetOptions().map_entry:
            many = list(value.values())
        elif isinstance(value, Message) is False:
            many = list(value)
        for one in many:
            if isinstance(one, Message):
                found += payloads(one)
    return found


async def main(machines: int, group: int, kind: RunKind) -> None:
    async with running() as lab:
        figures = await measure(lab, machines=machines, group=group, kind=kind)
    print(figures.text())
    assert figures.parent_events < EVENTS
    assert figures.largest_payload < PAYLOAD


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--group", type=int, default=50)
    parser.add_argument("--kind", type=RunKind, default=RunKind.PLANNED, choices=list(RunKind))
    given = parser.parse_args()
    code = 0
    try:
        asyncio.run(main(given.machines, given.group, given.kind))
    except AssertionError as error:
        print(f"NOT MET: {error}")
        code = 1
    sys.stdout.flush()
    os._exit(code)  # the SDK may crash the interpreter at its end (temporal.md §12)
