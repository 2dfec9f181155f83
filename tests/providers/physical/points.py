"""Recovery points of a loop machine, each compared with what stood on the disks while they were frozen."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from farshore.domain.points import Consistency
from farshore.providers.physical.agent.freeze import Freezer
from farshore.providers.physical.source import PhysicalCut, PhysicalSource
from farshore.replication.engine import CycleResult, run_cycle
from farshore.replication.filestore import FileReplicaStore

from .conftest import LoopMachine, Running, detach, run

LEAF = 65536


class Truth:
    """Copies every image at the end of every freeze: the last one is what a point must equal."""

    def __init__(self, machine: LoopMachine, freezer: Freezer) -> None:
        self.images: dict[str, bytes] = {}
        self.barriers = 0
        inner = freezer.frozen

        @contextlib.contextmanager
        def frozen(mounts: Sequence[object], limit: float) -> Generator[object]:
            with inner(mounts, limit) as result:  # type: ignore[arg-type]
                yield result
                self.images = {key: path.read_bytes() for key, path in machine.images.items()}
                self.barriers += 1

        freezer.frozen = frozen  # type: ignore[method-assign]


@dataclass
class Made:
    result: CycleResult
    missed: dict[str, list[int]]  # blocks by disk that differ from the truth
    cut: PhysicalCut


class Bench:
    """An agent, its source and a replica."""

    def __init__(self, machine: LoopMachine, running: Running, folder: Path, **settings) -> None:
        self.machine, self.running = machine, running
        self.truth = Truth(machine, running.agent._freezer)
        self.source = PhysicalSource(running.settings, machine="m")
        self.store = FileReplicaStore(folder / "store", durable=False)
        self.writer = self.store.acquire("m", "test")
        self.folder = folder

    def point(self, want: Consistency = Consistency.FILE_SYSTEM, **more) -> Made:
        """One cycle, compared with the truth."""
        cuts: list[PhysicalCut] = []
        make = self.source.cut

        def cut(name: str, *, want: Consistency) -> PhysicalCut:
            cuts.append(make(name, want=want))
            return cuts[-1]

        self.source.cut = cut  # type: ignore[method-assign]
        try:
            result = run_cycle(self.source, self.writer, machine="m", want=want, **more)
        finally:
            self.source.cut = make  # type: ignore[method-assign]
        return Made(result, self.missed(result), cuts[-1])

    def missed(self, result: CycleResult) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for key, truth in self.truth.images.items():
            reader = self.store.read_point("m", result.point.id, key)
            data = b"".join(
                reader.read(at, min(4 << 20, len(truth) - at)) for at in range(0, len(truth), 4 << 20)
            )
            if data != truth:
                found[key] = [
                    at // LEAF
                    for at in range(0, len(truth), LEAF)
                    if data[at : at + LEAF] != truth[at : at + LEAF]
                ]
        return found

    @contextlib.contextmanager
    def mounted(self, made: Made, key: str, *, check: bool = True) -> Generator[Path]:
        """A copy of a disk of a point, mounted: its journal is replayed, then the file system is checked."""
        image, folder = self.folder / "point.img", self.folder / "point"
        folder.mkdir(exist_ok=True)
        reader = self.store.read_point("m", made.result.point.id, key)
        with image.open("wb") as file:
            file.truncate(reader.size)
            for extent in reader.data():
                for at in range(extent.start, extent.start + extent.length, 4 << 20):
                    file.seek(at)
                    file.write(reader.read(at, min(4 << 20, extent.start + extent.length - at)))
        loop = run("losetup", "-f", "--show", image)
        try:
            run("mount", loop, folder)
            run("umount", folder)
            if check:
                run("e2fsck", "-fn", loop)
            run("mount", loop, folder)
            yield folder
        finally:
            detach(folder)
            subprocess.run(["losetup", "-d", loop], check=False, capture_output=True)
            image.unlink()

    def close(self) -> None:
        self.source.close()
        self.writer.close()
        self.store.close()
