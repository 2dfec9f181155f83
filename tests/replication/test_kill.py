"""A leg that is killed at any moment loses no acknowledged point and leaves no wrong one."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from farshore.replication.filestore import FileReplicaStore
from farshore.replication.ports import LEAF
from farshore.replication.verify import verify_point

SCRIPT = Path(__file__).with_name("leg_process.py")


def lines(path: Path) -> list[dict]:
    """Complete lines; the last one may have been cut off by the kill."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def kill_again_and_again(folder: Path, kills: int, seed: int) -> int:
    dice = random.Random(seed)
    (folder / "a.img").write_bytes(dice.randbytes(24 * LEAF + 512))
    (folder / "b.img").write_bytes(bytes(16 * LEAF))
    points_seen: set[str] = set()
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder)])
        try:
            known = len(lines(folder / "cuts"))
            deadline = time.monotonic() + 30
            # Wait for life, not for a time; then for a random moment of it.
            while len(lines(folder / "cuts")) == known:
                assert process.poll() is None and time.monotonic() < deadline, "the leg does not get going"
                time.sleep(0.005)
            time.sleep(dice.random() * 0.35)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(20)
        truth = {(line["cut"], line["taken_at"]): line["sums"] for line in lines(folder / "cuts")}
        acknowledged = [line["point"] for line in lines(folder / "acknowledged")]
        store = FileReplicaStore(folder / "store")
        points = store.points("vm")
        listed = [point.id for point in points]
        if acknowledged:
            # Retention removes older ones; the newest it never removes, so it or a newer one is there.
            assert listed and listed[-1] >= acknowledged[-1], "an acknowledged point is lost"
        for point in points[-3:] + points[:1]:
            manifest = store.manifest("vm", point.id)
            sums = truth[manifest.cut, manifest.taken_at.isoformat()]
            for disk in manifest.disks:
                reader = store.read_point("vm", point.id, disk.state.key)
                assert hashlib.sha256(reader.read(0, reader.size)).hexdigest() == sums[disk.state.key]
            verify_point(store, "vm", point.id)
        points_seen |= set(listed)
    return len(points_seen)


def test_eight_kills_cost_nothing(tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path, 8, seed=1) > 3


@pytest.mark.slow
def test_two_hundred_kills_cost_nothing(tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path, 200, seed=2) > 200
