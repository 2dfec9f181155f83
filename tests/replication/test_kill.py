"""Kills at any moment of cycle, redo, prune and materialisation lose no acknowledged point and leave no wrong one."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from farshore.replication.ports import LEAF

from .kill_process import opened

SCRIPT = Path(__file__).with_name("kill_process.py")


def lines(path: Path) -> list[dict]:
    """Complete lines; the last one may have been cut off by the kill."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def kill_again_and_again(folder: Path, kills: int, seed: int) -> tuple[int, collections.Counter[str]]:
    """Points acknowledged in all, and how often a kill met which phase."""
    dice = random.Random(seed)
    (folder / "a.img").write_bytes(dice.randbytes(24 * LEAF + 512))
    (folder / "b.img").write_bytes(bytes(16 * LEAF))
    phases: collections.Counter[str] = collections.Counter()
    server = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        for number in range(kills):
            known = (folder / "cuts").stat().st_size if (folder / "cuts").exists() else 0
            server.stdin.write("go\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            try:
                wait_for_a_cut(folder, known)
                time.sleep(dice.random() ** 2 * 0.4)
                assert not lines(folder / "errors")
                phases[(folder / "phase").read_text().strip()] += 1
            finally:
                os.kill(child, signal.SIGKILL)
                server.stdout.readline()
            check(folder, every=number % 10 == 9 or number + 1 == kills, dice=dice)
    finally:
        server.stdin.close()
        server.wait(20)
        server.stdout.close()
    return len(lines(folder / "acknowledged")), phases


def wait_for_a_cut(folder: Path, known: int) -> None:
    """Wait for life, not for a time."""
    deadline = time.monotonic() + 60
    while not (folder / "cuts").exists() or (folder / "cuts").stat().st_size == known:
        assert not lines(folder / "errors") and time.monotonic() < deadline, "the process does not get going"
        time.sleep(0.003)


def check(folder: Path, *, every: bool, dice: random.Random) -> None:
    assert not lines(folder / "errors"), lines(folder / "errors")
    truth = {(line["cut"], line["taken_at"]): line["sums"] for line in lines(folder / "cuts")}
    acknowledged = {line["point"] for line in lines(folder / "acknowledged")}
    removing = {point for line in lines(folder / "removing") for point in line["points"]}
    store = opened(folder)
    points = store.points("vm")
    lost = acknowledged - removing - {point.id for point in points}
    assert not lost, f"acknowledged points are lost: {lost}"
    for point in points if every else [*points[-2:], *dice.sample(points, min(2, len(points)))]:
        manifest = store.manifest("vm", point.id)
        sums = truth[manifest.cut, manifest.taken_at.isoformat()]
        for disk in manifest.disks:
            reader = store.read_point("vm", point.id, disk.state.key)
            found = bytearray(reader.size)

            def sink(at: int, data: bytes | memoryview, into: bytearray = found) -> None:
                into[at : at + len(data)] = data

            reader.write_out(sink)
            assert hashlib.sha256(found).hexdigest() == sums[disk.state.key], f"{point.id} {disk.state.key}"


def test_twelve_kills_cost_nothing(tmp_path: Path) -> None:
    acknowledged, _ = kill_again_and_again(tmp_path, 12, seed=1)
    assert acknowledged > 3


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_thousand_kills_cost_nothing(tmp_path: Path) -> None:
    acknowledged, phases = kill_again_and_again(tmp_path, 1000, seed=2)
    assert acknowledged > 250
    assert min(phases[p] for p in ("cycle", "apply", "base", "prune", "materialise")) > 10, phases


if __name__ == "__main__":
    print(kill_again_and_again(Path(sys.argv[1]), int(sys.argv[2]), seed=3))
