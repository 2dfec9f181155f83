"""The harness of the workflow tests."""

from __future__ import annotations

from ..workflows.conftest import lab, server  # noqa: TID252  tests are no installed package

__all__ = ["lab", "server"]
