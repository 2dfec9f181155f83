"""Points of a running machine on real block devices: an SQLite ledger is written, files come and go, space is trimmed."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Generator
from pathlib import Path

import pytest

from farshore.domain.points import Consistency

from . import ledger
from .points import Bench

MIB = 1 << 20


def disturb(folder: Path, random_: random.Random, *, trim: bool) -> None:
    """What a file system does besides: zeroed ranges, sparse files, deleted ballast, trimming."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / "ballast")
    (folder / "ballast").write_bytes(random_.randbytes(random_.randrange(1, 6) * MIB))
    with (folder / "sparse").open("wb") as file:
        file.truncate(16 * MIB)
        file.seek(random_.randrange(16 * MIB))
        file.write(b"here")
        os.posix_fallocate(file.fileno(), 0, 2 * MIB)
    os.sync()
    if trim:
        os.unlink(folder / "ballast")
        import subprocess

        subprocess.run(["fstrim", str(folder)], check=True)


@contextlib.contextmanager
def writing(folder: Path) -> Generator[ledger.Writer]:
    writer = ledger.Writer(folder)
    try:
        yield writer
    finally:
        writer.stop()


def story(machine, start, tmp_path, *, points: int, seed: int, options: tuple[str, ...] = ()) -> list[str]:
    """`points` points of one disk under a writer; every one equals what was frozen, and is sound. Returns a protocol."""
    machine.add("data", 128)
    machine.mkfs("data")
    folder = machine.mount("data", *options)
    running = start(machine.loops)
    bench = Bench(machine, running, tmp_path)
    told: list[str] = []
    choose = random.Random(seed)
    try:
        with writing(folder) as writer:
            writer.wait(20)
            for number in range(points):
                if number:
                    disturb(folder, choose, trim=number % 2 == 0)
                    writer.wait(choose.randrange(1, 60))
                before = writer.committed
                made = bench.point()
                assert made.missed == {}, f"point {number}"
                assert not made.result.full, made.result.reason
                assert made.cut.consistency is Consistency.FILE_SYSTEM
                with bench.mounted(made, "data") as mounted:
                    rows = ledger.check(mounted, at_least=before)
                told.append(
                    f"{number}: {rows} rows, {made.result.bytes_changed >> 16} blocks, {made.result.bytes_shipped >> 16} shipped,"
                    f" {made.cut.evidence}"
                )
    finally:
        machine.thaw()
        bench.close()
    return told


@pytest.mark.parametrize("options", [(), ("-o", "discard")], ids=["fstrim", "discard"])
def test_points_equal_what_was_frozen_and_are_sound(machine, start, tmp_path, options):
    for line in story(machine, start, tmp_path, points=6, seed=1, options=options):
        print(line)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("options", [(), ("-o", "discard")], ids=["fstrim", "discard"])
def test_many_points_equal_what_was_frozen_and_are_sound(machine, start, tmp_path, options):
    for line in story(machine, start, tmp_path, points=55, seed=2, options=options):
        print(line)
