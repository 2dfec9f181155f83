"""QEMU without a guest (writes through its devices by hand), and live guests."""

from __future__ import annotations

import shutil

import pytest

from . import guest as guests
from .quiet import QuietMachine


@pytest.fixture
def quiet(tmp_path):
    """A function that starts QEMU machines without a guest: `quiet(sizes…)`."""
    absent = [tool for tool in ("qemu-system-x86_64", "qemu-img") if shutil.which(tool) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (qemu-system-x86, qemu-utils)")
    started: list[QuietMachine] = []

    def start(*sizes: int, **options) -> QuietMachine:
        machine = QuietMachine(tmp_path / f"machine{len(started)}", sizes, **options)
        started.append(machine)
        return machine

    yield start
    for machine in started:
        machine.stop()


@pytest.fixture(scope="module")
def initrd(tmp_path_factory):
    guests.need()
    return guests.initramfs(tmp_path_factory.mktemp("initramfs") / "plain.gz")


@pytest.fixture
def boot(tmp_path):
    """A function that starts live guests; they are stopped at the end."""
    started: list[guests.Guest] = []

    def start(*args, **kwargs) -> guests.Guest:
        started.append(guests.Guest(tmp_path, *args, **kwargs))
        return started[-1]

    yield start
    for running in started:
        running.stop()
