"""One dev server with workers for all tests of a process; every test has worlds of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from .harness import Harness, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests share the loop that the workers live in. A stuck workflow never ends, so each has a limit."""
    for item in items:
        if (
            "/workflows/" in str(item.path)
            or "/contract/" in str(item.path)
            or "/histories/" in str(item.path)
        ):
            item.add_marker(pytest.mark.timeout(120))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


@pytest_asyncio.fixture(loop_scope="session")
async def lab(server: Harness) -> AsyncIterator[Harness]:
    try:
        yield server
    finally:
        await server.sweep()
