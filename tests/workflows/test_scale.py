"""The short version of benchmarks/bench_plan_scale.py: 100 machines, and what follows from them for 1,000."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from farshore.contract.runs import RunKind

from .harness import Harness

pytestmark = pytest.mark.asyncio(loop_scope="session")


def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_plan_scale.py"
    spec = importlib.util.spec_from_file_location("bench_plan_scale", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


async def test_the_events_and_payloads_of_a_plan_grow_so_slowly_that_1000_machines_fit(lab: Harness) -> None:
    scale = bench()
    figures = await scale.measure(lab, machines=100, group=50, kind=RunKind.TEST)
    assert len(figures.result.machines) == 100
    assert 20 / 2 * figures.parent_events < scale.EVENTS
    assert figures.group_events < scale.EVENTS
    assert 10 * figures.largest_payload < scale.PAYLOAD
