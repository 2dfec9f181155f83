"""The disk engine against a model: whatever is written, snapshotted, removed, reverted, the bytes are right."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.lab.vcenter.bitmap import BLOCK, Bitmap, blocks, runs
from farshore.lab.vcenter.cbt import ChangeTracking
from farshore.lab.vcenter.disks import Disk

CAPACITY = 10 * BLOCK + 512
"""Not a whole number of blocks on purpose."""


def make(root: Path, **fields: Any) -> Disk:
    record = {"key": 2000, "unit": 0, "label": "d", "stem": "x", "uuid": "u", "capacity": CAPACITY, **fields}
    disk = Disk(root / "data", root / "state", record)
    disk.create()
    return disk


length = st.one_of(st.sampled_from([1, 512, BLOCK, 2 * BLOCK + 1, 3 * BLOCK]), st.integers(1, 3 * BLOCK))
place = st.one_of(st.integers(0, 9).map(lambda b: b * BLOCK), st.integers(0, CAPACITY - 1))
write = st.tuples(st.just("write"), place, length, st.integers(1, 255))


def action(*names: str) -> st.SearchStrategy[tuple[str, int, int, int]]:
    return st.tuples(st.sampled_from(names), st.integers(0, 7), st.just(0), st.just(0))


step = st.one_of(
    write, write, action("snapshot"), action("remove", "interrupted"), action("revert", "reopen", "remove")
)


def settle(disk: Disk, snapshots: dict[int, int], *, interrupted: bool = False) -> None:
    """Fold whatever is loose; `interrupted` repeats the copying half, as after a kill."""
    while loose := disk.loose(set(snapshots.values())):
        disk.copy_down(loose[0])
        if interrupted:
            disk.copy_down(loose[0])
        child, dead = disk.adopt(loose[0])
        for name, link in snapshots.items():
            if link == child:
                snapshots[name] = loose[0]
        dead.remove()


@given(st.lists(step, max_size=25))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_point_of_the_chain_keeps_its_bytes(steps: list[tuple[str, int, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        disk = make(root)
        disk.start_tracking()
        live = bytearray(CAPACITY)
        frozen: dict[int, bytes] = {}
        links: dict[int, int] = {}
        for name, (what, a, length, value) in enumerate(steps):
            if what == "write":
                data = bytes([value]) * min(length, CAPACITY - a)
                disk.write(a, data)
                live[a : a + len(data)] = data
            elif what == "snapshot":
                links[name] = disk.freeze()
                frozen[name] = bytes(live)
            elif what == "reopen":
                record = disk.to_json()
                disk.close()
                disk = Disk(root / "data", root / "state", record)
            elif links:
                chosen = sorted(links)[a % len(links)]
                if what in ("remove", "interrupted"):
                    del links[chosen], frozen[chosen]
                else:
                    disk.revert(links[chosen])
                    live = bytearray(frozen[chosen])
                settle(disk, links, interrupted=what == "interrupted")
            assert disk.read(0, CAPACITY) == live
            for point, link in links.items():
                assert disk.read(0, CAPACITY, link) == frozen[point]
        assert disk.sha256() == hashlib.sha256(live).hexdigest()
        assert len(list((root / "data").glob("*.vmdk"))) == len(disk.links)
        disk.close()


@given(st.lists(st.one_of(write, write, st.just("stun")), max_size=25), st.data())
@settings(max_examples=40, deadline=None)
def test_change_tracking_names_exactly_the_blocks_written_between_two_ids(
    steps: list[Any], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        disk = make(Path(directory))
        disk.start_tracking()
        assert disk.cbt is not None
        written: dict[int, set[int]] = {1: set()}
        for step in steps:
            if step == "stun":
                disk.cbt.seal()
                written[disk.cbt.number] = set()
            else:
                _, start, length, value = step
                end = min(CAPACITY, start + length)
                disk.write(start, bytes([value]) * (end - start))
                written[disk.cbt.number] |= set(range(start // BLOCK, (end - 1) // BLOCK + 1))
        until = data.draw(st.integers(1, disk.cbt.number))
        since = data.draw(st.integers(0, until))
        change_id = disk.cbt.change_id.rpartition("/")[0] + f"/{since}"
        expected = set().union(*(written[n] for n in range(since + 1, until + 1)), set())
        value = disk.cbt.changed(change_id, until)
        assert {b for b in range(blocks(CAPACITY)) if value >> b & 1} == expected
        record = disk.to_json()
        disk.close()
        again = Disk(disk.directory, disk.state, record)
        assert again.cbt is not None
        assert again.cbt.changed(change_id, until) == value
        again.close()


def test_tracking_starts_with_what_is_already_allocated(tmp_path: Path) -> None:
    disk = make(tmp_path)
    disk.write(5 * BLOCK, b"x")
    disk.start_tracking()
    assert disk.cbt is not None
    first = disk.cbt.change_id.rpartition("/")[0]
    assert disk.cbt.changed(f"{first}/0", 1) == 1 << 5
    disk.close()


def test_a_partial_write_to_a_delta_keeps_the_rest_of_the_block(tmp_path: Path) -> None:
    disk = make(tmp_path)
    disk.write(0, b"a" * BLOCK)
    disk.freeze()
    disk.write(100, b"b")
    assert disk.read(0, BLOCK) == b"a" * 100 + b"b" + b"a" * (BLOCK - 101)
    assert disk.read(0, BLOCK, 0) == b"a" * BLOCK
    disk.close()


@given(st.sets(st.integers(0, 300)))
def test_runs_cover_exactly_the_set_bits(bits: set[int]) -> None:
    value = sum(1 << b for b in bits)
    found = [b for start, count in runs(value) for b in range(start, start + count)]
    assert found == sorted(bits)


def test_a_bitmap_survives_without_being_closed(tmp_path: Path) -> None:
    first = Bitmap(tmp_path / "m", 100)
    first.set_range(3, 5)
    assert Bitmap(tmp_path / "m", 100).to_int() == 0b111000


def test_ids_look_like_those_of_esxi(tmp_path: Path) -> None:
    tracking = ChangeTracking(tmp_path, 10)
    head, number = tracking.change_id.split("/")
    assert number == "1"
    assert [len(part.split(" ")) for part in head.split("-")] == [8, 8]
    tracking.close()
