"""Foreign programs that copy disks, timed in the same run as ours, and the disk that all of them copy.

Rates are MB (10^6 bytes) of data a second; holes do not count, for nobody.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Took:
    """Best wall time and best CPU time (this process and its children) of several rounds, seconds."""

    wall: float
    cpu: float

    def rate(self, data: int) -> float:
        """MB a second of wall time."""
        return data / self.wall / 1e6

    def cost(self, data: int) -> float:
        """CPU milliseconds a MB."""
        return 1e9 * self.cpu / data


def cpu_seconds() -> float:
    """CPU time so far of this process and of the children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def rounds(work: dict[str, Callable[[], None]], times: int) -> dict[str, Took]:
    """Run everything `times` times, interleaved, so that a slow moment of the machine meets all alike."""
    best: dict[str, Took] = {}
    for _ in range(times):
        for name, run in work.items():
            cpu, began = cpu_seconds(), time.perf_counter()
            run()
            wall = time.perf_counter() - began
            took = Took(wall, cpu_seconds() - cpu)
            known = best.get(name)
            best[name] = took if known is None else Took(min(known.wall, took.wall), min(known.cpu, took.cpu))
    return best


def make_disk(path: Path, size: int, *, seed: int = 1) -> int:
    """A raw disk, half holes, half data that zstd -1 halves or better, like file systems do. Returns the bytes of data."""
    dice = random.Random(seed)
    words = [dice.randbytes(dice.randint(3, 12)) for _ in range(4000)]
    with path.open("wb") as disk:
        disk.truncate(size)
        at = data = 0
        while at < size:
            run = min(dice.randint(1, 8) * MIB, size - at)
            if dice.random() < 0.5:
                disk.seek(at)
                for _ in range(run // (256 << 10)):
                    noise = dice.randbytes(16 << 10)
                    text = b"".join(dice.choices(words, k=33000))[: 240 << 10].ljust(240 << 10, b".")
                    disk.write(noise + text)
                    data += 256 << 10
            at += run
    return data


def extents(path: Path) -> Iterator[tuple[int, int]]:
    """(start, length) of what is not a hole."""
    fd = os.open(path, os.O_RDONLY)
    try:
        at, end = 0, os.fstat(fd).st_size
        while at < end:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, at - start
    finally:
        os.close(fd)


def missing(*programs: str) -> list[str]:
    """Which of these programs are not here."""
    return [program for program in programs if shutil.which(program) is None]


def shell(command: str) -> Callable[[], None]:
    """A command line of a foreign program as something to time. Its output does not matter, its failure does."""

    def run() -> None:
        subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    return run
