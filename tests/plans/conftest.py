"""The example plan, and ways to spoil it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import farshore.plans

EXAMPLES = Path(farshore.plans.__path__[0]) / "examples"


@pytest.fixture
def examples() -> Path:
    return EXAMPLES


@pytest.fixture
def crm() -> str:
    return (EXAMPLES / "crm.yaml").read_text()


@pytest.fixture
def spoil(crm: str) -> Callable[[str, str], str]:
    """The text of the example with one piece of it replaced."""

    def change(old: str, new: str) -> str:
        assert crm.count(old) == 1, f"{old!r} stands {crm.count(old)} times in the example"
        return crm.replace(old, new)

    return change
