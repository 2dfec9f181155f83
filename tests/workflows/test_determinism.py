"""No module of the workflows' room reads a clock, a random number or the outside: many pass through the sandbox."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parents[2] / "workflows"
MODULES = sorted(ROOM.glob("*.py"))
OUTSIDE = {
    *("time", "random", "secrets", "uuid", "os", "io", "pathlib", "socket", "subprocess", "threading"),
    *(
        "multiprocessing",
        "concurrent",
        "requests",
        "aiohttp",
        "httpx",
        "urllib.request",
        "shutil",
        "tempfile",
    ),
}
CLOCKS = {"now", "utcnow", "today"}
UNORDERED = {"as_completed", "wait"}  # of asyncio; `workflow` has its own


def faults(source: str) -> list[str]:
    """What a module does that could differ when its history is replayed."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            base = of.id if isinstance(of, ast.Name) else ast.unparse(of)
            if node.func.attr in CLOCKS and base != "workflow":
                found.append(f"line {node.lineno}: a clock: {base}.{node.func.attr}()")
            if base == "asyncio" and node.func.attr in UNORDERED | {"sleep", "to_thread"}:
                found.append(f"line {node.lineno}: asyncio.{node.func.attr}()")
            continue
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in {"open", "input", "print", "id", "hash"}:
                found.append(f"line {node.lineno}: {node.func.id}()")
            continue
        else:
            continue
        found += [
            f"line {node.lineno}: import {n}" for n in names if n in OUTSIDE or n.split(".")[0] in OUTSIDE
        ]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_of_the_workflows_touches_nothing_that_replay_would_see_otherwise(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "mutant",
    [
        "import time",
        "from random import choice",
        "import os.path",
        "datetime.now(UTC)",
        "datetime.datetime.utcnow()",
        "open('x')",
        "asyncio.as_completed(tasks)",
        "hash(name)",
    ],
)
def test_what_is_forbidden_is_found(mutant: str) -> None:
    assert faults(f"def f():\n    {mutant}")


def test_no_module_grows_too_large_to_have_one_idea() -> None:
    assert {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) > 500} == {}
