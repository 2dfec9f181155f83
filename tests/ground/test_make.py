"""The Makefile and the scripts of CI, as far as they can be checked without running them inside themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROMISED = {
    "demo",
    "test",
    "lint",
    "types",
    "imports",
    "test-slow",
    "test-tools",
    "bench",
    "lock",
    "clean",
    "install",
}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, "MAKEFLAGS": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_make
def test_make_help_lists_every_target_that_the_documents_promise(root: Path) -> None:
    listed = set(re.findall(r"^  make ([a-z-]+) ", run("make", "help", cwd=root), re.MULTILINE))
    assert listed >= PROMISED


@needs_make
def test_on_a_fresh_machine_the_demo_begins_by_installing_the_lock_with_hashes(
    root: Path, tmp_path: Path
) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(root / name, tmp_path)
    steps = run("make", "-n", "demo", "ARGS=--exit", cwd=tmp_path)
    order = [
        "-m venv .venv",
        "--require-hashes -r requirements.lock",
        "-e .",
        "-m farshore.lab.demo --exit",
    ]
    places = [steps.find(step) for step in order]
    assert -1 not in places, steps
    assert places == sorted(places)


@needs_make
def test_an_unchanged_lock_is_not_installed_again(root: Path, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".locked", ".installed"):
        (tmp_path / ".venv" / name).touch()
    assert "pip" not in run("make", "-n", "test", cwd=tmp_path)
    later = (tmp_path / ".venv" / ".locked").stat().st_mtime + 10
    os.utime(tmp_path / "requirements.lock", (later, later))
    assert "--require-hashes" in run("make", "-n", "test", cwd=tmp_path)


@pytest.mark.parametrize(
    "script", [".ci/run", ".ci/test-tools", "docker/setup-temporal-schema.sh", "docker/setup-temporal.sh"]
)
def test_scripts_are_valid_and_executable(root: Path, script: str) -> None:
    text = (root / script).read_text()
    shell = "bash" if "bash" in text.splitlines()[0] else "sh"
    subprocess.run([shell, "-n", str(root / script)], check=True)
    assert os.access(root / script, os.X_OK)


def test_ci_runs_every_check_then_the_tests_then_the_demo_within_its_time(root: Path) -> None:
    stages = re.findall(r"^stage (\S+) (\d+) make (.+)$", (root / ".ci" / "run").read_text(), re.MULTILINE)
    assert [what for _, _, what in stages] == [
        "test-tools",
        "install",
        "lint",
        "types",
        "imports",
        "test",
        "demo ARGS=--exit",
    ]
    assert sum(int(minutes) for _, minutes, _ in stages) < 90
