"""The harness of the workflow tests."""

from __future__ import annotations

from ..workflows.conftest import lab, server

__all__ = ["lab", "server"]
