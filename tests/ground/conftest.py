"""The repository as the tests of the ground see it."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = {".git", ".venv", "build", "dist", "node_modules", "var", "__pycache__"}


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def rooms(pyproject: dict[str, Any]) -> dict[str, str]:
    """Import name → folder, for the rooms at the top of the tree."""
    return pyproject["tool"]["setuptools"]["package-dir"]


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file that is tracked, or would be if it were added; without git, every file that nothing generated."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [root / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            p
            for p in root.rglob("*")
            if not LEFT_BEHIND & set(p.relative_to(root).parts) and ".egg-info" not in str(p)
        ]
    return sorted(p for p in paths if p.is_file() and not p.is_symlink())
