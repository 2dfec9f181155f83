"""Whole stacks: the real Temporal server, the laboratory's two sites and Farshore's workers, each its own process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from farshore.contract.client import FarshoreClient
from farshore.lab.stack import Stack, free_port

MIB = 1 << 20
_WORK = {
    "records_per_second": 25,
    "churn_bytes_per_second": 128 << 10,
    "area_size": 1 << 20,
    "hot_size": 1 << 20,
}


def machine(name: str, *sizes: int, **fields: Any) -> dict[str, Any]:
    """A small machine whose guest writes its ledger across all its disks."""
    return {
        "name": name,
        "disks": [{"size": size * MIB, "label": f"disk{i}"} for i, size in enumerate(sizes)],
        "networks": ["VM Network"],
        "power": "poweredOn",
        "workload": dict(_WORK),
        "shutdown": {"seconds": 0.5},
    } | fields


MACHINES = (machine("crm-db01", 12, 16), machine("crm-app01", 12), machine("crm-web01", 12))

PLAN = """
farshore: 1
plan: crm
sites: {{source: east, target: westeurope}}
replication: {{interval: {interval}}}
network: {{failover: dr-vnet, test: isolated}}
machines:
  crm-db01: {{target: {{size: Standard_D2s_v5, subnet: db, address: 10.20.3.10}}}}
  crm-app01: {{target: {{size: Standard_D2s_v5, subnet: app, address: 10.20.2.10}}}}
  crm-web01: {{target: {{size: Standard_D2s_v5, subnet: web, address: 10.20.1.10, public: true}}}}
shutdown: {{order: reverse, guest_timeout: 60s}}
boot:
  - group: data
    machines: [crm-db01]
{manual}
  - group: application
    machines: [crm-app01]
  - group: web
    machines: [crm-web01]
    after:
      - {{script: mark.sh, args: ["{{marks}}"], timeout: 60s}}
"""
MANUAL = """    after:
      - manual: Check the database
        instructions: Look at crm-db01.
        on: [planned]
"""
# A script that honours its idempotency key: one file for one effect, however often it is started.
MARK = """#!/bin/sh
set -eu
mkdir -p "$1"
key=$(printf '%s' "$FARSHORE_IDEMPOTENCY_KEY" | tr '/: ' '___')
[ -e "$1/$key" ] || echo "$FARSHORE_KIND" > "$1/$key"
cat >/dev/null
echo marked
"""


def write_plans(folder: Path, *, interval: str = "6s", manual: bool = False) -> Path:
    """A plans folder with `crm`; returns it."""
    (folder / "scripts").mkdir(parents=True)
    text = PLAN.format(interval=interval, manual=MANUAL if manual else "")
    (folder / "crm.yaml").write_text(text.replace("{marks}", str(folder / "marks")), encoding="utf-8")
    script = folder / "scripts" / "mark.sh"
    script.write_text(MARK, encoding="utf-8")
    script.chmod(0o755)
    return folder


@pytest.fixture
def make_stack(tmp_path: Path) -> Iterator[Callable[..., Stack]]:
    """Start a stack of one's own; it is ended with the test."""
    made: list[Stack] = []

    def make(
        *, interval: str = "6s", manual: bool = False, machines: Any = MACHINES, leg: float = 3600.0
    ) -> Stack:
        root = tmp_path / f"stack{len(made)}"
        root.mkdir()
        stack = Stack(
            root,
            machines=machines,
            plans=write_plans(root / "plans", interval=interval, manual=manual),
            leg=leg,
            # Stacks of tests side by side must not reach for the same well-known port at the same moment.
            temporal_port=free_port(),
            ui_port=free_port(),
            http_port=free_port(),
        )
        made.append(stack)
        stack.start()
        return stack

    try:
        yield make
    finally:
        for stack in made:
            stack.stop()


@pytest.fixture
def connect() -> Callable[[Stack], Any]:
    """A typed client of a stack."""

    async def client(stack: Stack) -> FarshoreClient:
        return await FarshoreClient.connect(stack.temporal)

    return client


async def until(what: str, ready: Callable[[], Any], seconds: float = 90.0) -> Any:
    """Wait for a condition (plain or async) with a deadline; returns its value."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        value = ready()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if asyncio.get_running_loop().time() > end:
            raise AssertionError(f"{what}: not within {seconds:.0f} s")
        await asyncio.sleep(0.2)
