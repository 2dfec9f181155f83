"""Cuts through the replication engine, with the truth about each of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from farshore.domain.points import Consistency
from farshore.providers.nbd.cut import QemuCut
from farshore.replication.engine import CycleResult, run_cycle
from farshore.replication.filestore import FileReplicaStore

STEP = 1 << 20


class Witness:
    """A source that notes what every one of its cuts holds, byte for byte, before the cut is released."""

    def __init__(self, source, *, ready: QemuCut | None = None) -> None:
        self.source = source
        self.ready = ready  # a cut that a group has taken already
        self.truth: dict[str, dict[str, str]] = {}
        self.cuts: list[QemuCut] = []

    def cut(self, name: str, *, want: Consistency) -> QemuCut:
        cut, self.ready = self.ready, None
        if cut is None:
            cut = self.source.cut(name, want=want)
        assert cut.name == name
        held: dict[str, str] = {}
        for disk in cut.disks:
            digest = hashlib.sha256()
            for at in range(0, disk.size, STEP):
                digest.update(cut.read(disk.key, at, min(STEP, disk.size - at)))
            held[disk.key] = digest.hexdigest()
        self.truth[name] = held
        self.cuts.append(cut)
        return cut

    def reap(self, upto: str = "") -> list[str]:
        return self.source.reap(upto)

    def close(self) -> None:
        self.source.close()


class Site:
    """A store, and one machine's writer and witness."""

    def __init__(self, folder: Path, source, machine: str = "vm") -> None:
        self.machine = machine
        self.folder = folder
        self.store = FileReplicaStore(folder / "store", durable=False)
        self.writer = self.store.acquire(machine, "test")
        self.witness = Witness(source)

    def cycle(self, want: Consistency = Consistency.CRASH, **options) -> CycleResult:
        return run_cycle(self.witness, self.writer, machine=self.machine, want=want, **options)

    def next_name(self) -> str:
        return f"farshore-{self.machine}-{self.writer.epoch}-{self.writer.cycle}"

    def files(self, result: CycleResult) -> dict[str, Path]:
        """The disks of a committed point as files, compared with what its cut held."""
        found: dict[str, Path] = {}
        for disk in result.manifest.disks:
            reader = self.store.read_point(self.machine, result.point.id, disk.state.key)
            body = reader.read(0, reader.size)
            truth = self.witness.truth[result.manifest.cut][disk.state.key]
            assert hashlib.sha256(body).hexdigest() == truth, (result.point.id, disk.state.key)
            path = self.folder / f"{self.machine}-{result.point.cycle}-{disk.state.key}.raw"
            path.write_bytes(body)
            found[disk.state.key] = path
        return found
