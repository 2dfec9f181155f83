"""The step that chooses a point, on a real store with a real flipped byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from temporalio.testing import ActivityEnvironment

from farshore.activities import messages as m
from farshore.activities.target import TargetActivities
from farshore.domain.points import Consistency
from farshore.replication.engine import run_cycle
from farshore.replication.filesource import FileSource
from farshore.replication.filestore import FileReplicaStore
from farshore.replication.ports import LEAF


class Site:
    """As much of a target site, and of `Sites`, as the step asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def target(self, _site: str) -> Site:
        return self

    def open_store(self) -> FileReplicaStore:
        return FileReplicaStore(self.folder, durable=False)


def segments(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "s" in path.relative_to(folder).parts}


async def test_latest_passes_over_a_point_that_a_scrub_found_damaged(tmp_path):
    disk, folder = tmp_path / "disk", tmp_path / "store"
    disk.write_bytes(b"a" * LEAF * 4)
    source, store = FileSource({"0": disk}, tmp_path / "work"), FileReplicaStore(folder, durable=False)
    writer = store.acquire("vm", "test")
    first = run_cycle(source, writer, machine="vm", want=Consistency.CRASH).point
    older = segments(folder)
    disk.write_bytes(b"b" * LEAF + b"a" * LEAF * 3)
    second = run_cycle(source, writer, machine="vm", want=Consistency.CRASH).point
    (torn,) = segments(folder) - older
    body = bytearray(torn.read_bytes())
    body[-1] ^= 1
    torn.write_bytes(body)

    call = m.ChoosePointCall(site="west", machine="vm", plan="p", run="r", test=False, choice="latest")
    step = TargetActivities(Site(folder)).choose_point  # type: ignore[arg-type]  # a site of this test
    assert (await ActivityEnvironment().run(step, call)).point.id == second.id, "nobody knows yet"
    assert writer.scrub().findings
    writer.close()
    assert (await ActivityEnvironment().run(step, call)).point.id == first.id
    with pytest.raises(Exception, match="damaged"):
        await ActivityEnvironment().run(step, call.model_copy(update={"choice": second.id}))
