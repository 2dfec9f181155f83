"""The engine on the command line: `python -m farshore.replication --help`.

    copy        make a recovery point of files or block devices in a folder
    points      list points
    materialise write a disk of a point into a file or block device
    verify      read points and prove every byte
    scrub       look for damage in everything that is stored

The store is a folder (`--store`). With `--kek FILE`, 32 bytes, data keys are wrapped by that key. Sources have to be quiet
while they are copied: nothing here freezes or pauses anybody.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, PointChoice, choose
from farshore.replication.filesource import FileSource
from farshore.replication.filestore import FileBackend
from farshore.replication.journal.cycle import Pace, run_cycle
from farshore.replication.journal.keys import LocalKek
from farshore.replication.journal.store import JournalStore, Options
from farshore.replication.ports import Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 after an error or when damage was found."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(_store(options), options))
    except FarshoreError as error:
        sys.stderr.write(f"{error.code.value}: {error.info.message}\n{error.info.recommended_action}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="farshore.replication", description="The replication engine.")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--name", default="machine", help="whose points these are")
    parser.add_argument("--kek", type=Path, help="file with 32 bytes that wrap data keys")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="threads")
    commands = parser.add_subparsers(required=True)

    copy = commands.add_parser("copy", help="make a recovery point of files or block devices")
    copy.add_argument("disk", type=Path, nargs="+", help="the first one is the boot disk")
    copy.add_argument("--work", type=Path, help="folder for copies and hashes (default: beside the store)")
    copy.add_argument("--level", type=int, default=1, help="of zstd; 0: no compression")
    copy.add_argument("--resync", action="store_true", help="compare everything")
    copy.add_argument("--base", action="store_true", help="bring the replica to the point and freeze it")
    copy.set_defaults(run=_copy)

    commands.add_parser("points", help="list points, oldest first").set_defaults(run=_points)

    out = commands.add_parser("materialise", help="write a disk of a point")
    out.add_argument("target", type=Path, help="file to be created, or a block device that holds zeros")
    out.add_argument("--point", default=PointChoice.LATEST.value, help="id or choice")
    out.add_argument("--disk", help="key of the disk (default: the first)")
    out.set_defaults(run=_materialise)

    verify = commands.add_parser("verify", help="read points and prove every byte")
    verify.add_argument("--point", help="id or choice (default: all)")
    verify.set_defaults(run=_verify)

    scrub = commands.add_parser("scrub", help="look for damage in everything that is stored")
    scrub.set_defaults(run=_scrub)
    return parser


def _store(options: argparse.Namespace) -> JournalStore:
    kek = LocalKek(options.kek.read_bytes()) if options.kek is not None else None
    cache = options.store / ".cache"
    return JournalStore(
        FileBackend(options.store), kek=kek, options=Options(workers=options.workers, cache=cache)
    )


def _copy(store: JournalStore, options: argparse.Namespace) -> int:
    work = options.work or options.store.with_name(f"{options.store.name}.work")
    disks = {f"disk{number}": path.absolute() for number, path in enumerate(options.disk)}
    source = FileSource(disks, work / options.name)
    writer = store.acquire(options.name, f"command line, process {os.getpid()}")
    try:
        source.reap()
        done = run_cycle(
            source,
            writer,
            machine=options.name,
            want=Consistency.CRASH,
            resync=options.resync,
            pace=Pace(workers=options.workers, level=options.level),
            progress=_show,
        )
        print(
            f"{done.point.id}  {done.bytes_read} bytes read, {done.bytes_shipped} shipped, {done.bytes_stored} stored"
        )
        if options.base:
            writer.freeze()
        writer.sweep(thorough=True)
    finally:
        writer.close()
        source.close()
    return 0


def _points(store: JournalStore, options: argparse.Namespace) -> int:
    hurt = store.known_damage(options.name)
    for point in store.points(options.name):
        print(
            point.id,
            point.taken_at.isoformat(),
            point.consistency.value,
            point.size_bytes,
            hurt.get(point.id, ""),
            sep="  ",
        )
    return 0


def _chosen(store: JournalStore, options: argparse.Namespace, text: str) -> str:
    choice = PointChoice(text) if text in set(PointChoice) else text
    return choose(store.points(options.name), choice, machine=options.name).id


def _materialise(store: JournalStore, options: argparse.Namespace) -> int:
    point = _chosen(store, options, options.point)
    holder = f"command line, process {os.getpid()}"
    store.hold(options.name, point, holder)
    try:
        manifest = store.manifest(options.name, point)
        key = options.disk or manifest.disks[0].state.key
        reader = store.read_point(options.name, point, key)
        device = options.target.exists() and stat.S_ISBLK(options.target.stat().st_mode)
        flags = os.O_WRONLY if device else os.O_WRONLY | os.O_CREAT | os.O_EXCL
        file = os.open(options.target, flags | os.O_CLOEXEC, 0o600)
        try:
            if not device:
                os.ftruncate(file, reader.size)

            def sink(offset: int, data: bytes | memoryview) -> None:
                view = memoryview(data)
                while view:
                    done = os.pwrite(file, view, offset)
                    view, offset = view[done:], offset + done

            reader.write_out(sink)
            os.fsync(file)
        finally:
            os.close(file)
        print(f"{point} {key}: {reader.size} bytes, all verified")
    except FileExistsError as error:
        raise FarshoreError(Code.NAME_TAKEN, f"{options.target} exists already.") from error
    finally:
        store.release(options.name, holder)
    return 0


def _verify(store: JournalStore, options: argparse.Namespace) -> int:
    points = [p.id for p in store.points(options.name)]
    if options.point:
        points = [_chosen(store, options, options.point)]
    bad = 0
    for point in points:
        for disk in store.manifest(options.name, point).disks:
            read = _Count()
            try:
                store.read_point(options.name, point, disk.state.key).write_out(read)
                print(f"{point} {disk.state.key}: {read.total} bytes read, all verified")
            except FarshoreError as error:
                bad += 1
                print(f"{point} {disk.state.key}: {error.info.message}")
    return 1 if bad else 0


class _Count:
    """A target that counts."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def __call__(self, _: int, data: bytes | memoryview) -> None:
        with self._lock:
            self.total += len(data)


def _scrub(store: JournalStore, options: argparse.Namespace) -> int:
    writer = store.acquire(options.name, f"command line, process {os.getpid()}")
    try:
        done = writer.scrub()
    finally:
        writer.close()
    for finding in done.findings:
        print(finding.text)
    print(f"{done.checked} bytes read, {len(done.findings)} findings")
    return 1 if done.findings else 0


def _show(progress: Progress) -> None:
    if sys.stderr.isatty() and progress.total:
        sys.stderr.write(f"\r{progress.stage} {100 * progress.done // progress.total} %   ")


if __name__ == "__main__":
    sys.exit(main())
