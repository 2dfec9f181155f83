"""Extents, leaves, manifests, token bucket: the pure parts."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication import leaves
from farshore.replication.bandwidth import TokenBucket
from farshore.replication.extents import batches, bridge, coarsen, normalise, split, total
from farshore.replication.log import safe_name
from farshore.replication.manifest import Opening, cycle_of, decode, encode, point_id, to_point
from farshore.replication.ports import LEAF, DiskPoint, DiskState, Extent, Manifest

SIZE = 40 * LEAF + 1536
extents = st.lists(st.builds(Extent, st.integers(0, SIZE + LEAF), st.integers(0, 6 * LEAF)), max_size=12)


def covered(runs) -> set[int]:
    """Sectors."""
    return {s for run in runs for s in range(run.start // 512, -(-(run.start + run.length) // 512))}


@settings(deadline=None, max_examples=60)
@given(extents)
def test_normalised_extents_cover_every_touched_leaf_of_the_disk_and_no_other(runs: list[Extent]) -> None:
    result = normalise(runs, SIZE)
    touched = {s // 128 for s in covered(r for r in runs if r.length) if s < SIZE // 512}
    assert covered(result) == {s for s in range(SIZE // 512) if s // 128 in touched}
    assert all(a.start + a.length < b.start for a, b in pairwise(result))
    assert all(run.start % LEAF == 0 for run in result)


@settings(deadline=None, max_examples=60)
@given(extents, st.integers(1, 9))
def test_split_and_batches_keep_the_bytes(runs: list[Extent], leaves_each: int) -> None:
    whole = normalise(runs, SIZE)
    limit = leaves_each * LEAF
    pieces = list(split(whole, limit))
    assert total(pieces) == total(whole) and covered(pieces) == covered(whole)
    assert all(0 < piece.length <= limit for piece in pieces)
    groups = list(batches(whole, limit))
    assert [p for group in groups for p in group] == pieces
    assert all(total(group) <= limit for group in groups)


@settings(deadline=None, max_examples=60)
@given(extents, st.integers(1, 4))
def test_coarser_extents_are_a_superset(runs: list[Extent], most: int) -> None:
    whole = normalise(runs, SIZE)
    rough = coarsen(whole, most)
    assert len(rough) <= most and covered(rough) >= covered(whole)
    assert covered(bridge(whole, LEAF)) >= covered(whole)


def test_a_leaf_of_zeros_has_the_constant_and_other_leaves_their_blake3() -> None:
    data = bytes(LEAF) + b"x" * LEAF + bytes(100)
    assert leaves.hashes(data) == leaves.ZERO + blake3(b"x" * LEAF).digest()[:16] + leaves.ZERO
    assert leaves.hashes(bytes(9 << 20)) == bytes(144 * 16)
    assert leaves.leaf_hash(b"\0" * 99 + b"\1") != leaves.ZERO


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=50), st.integers(0, 127))
def test_written_names_the_leaves_that_are_not_zero(kinds: list[bool], cut: int) -> None:
    size = len(kinds) * LEAF - cut * 512
    table = b"".join(b"\x01" * 16 if kind else leaves.ZERO for kind in kinds)
    expected = [Extent(i * LEAF, LEAF) for i, kind in enumerate(kinds) if kind]
    assert normalise(leaves.written(table, size), size) == normalise(expected, size)


def test_the_root_depends_on_every_leaf_and_the_size() -> None:
    table = bytes(range(160))
    roots = {
        leaves.root(table, 10 * LEAF),
        leaves.root(table, 10 * LEAF - 512),
        leaves.root(table[:-1] + b"x", 10 * LEAF),
    }
    assert len(roots) == 3
    with pytest.raises(ValueError):
        leaves.root(table, 11 * LEAF)


NOW = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
MANIFEST = Manifest(
    machine="vm ä",
    cycle=7,
    epoch=1_700_000_000,
    parent="b3:00",
    taken_at=NOW,
    committed_at=NOW,
    consistency=Consistency.APPLICATION,
    final=True,
    full=True,
    reason='because "so"',
    cut="farshore-vm-1-7",
    bytes_changed=5,
    bytes_shipped=4,
    disks=(
        DiskPoint(DiskState("2000", "Hard disk 1", SIZE, "uuid|x", "52/1", boot=True), "b3:11", "d@1", "l@2"),
    ),
    tags={"plan": "crm"},
)
OPENING = Opening("vm", 3, 1_700_000_000, "", "me", NOW)


@pytest.mark.parametrize("entry", [MANIFEST, OPENING])
def test_an_entry_survives_the_journey_and_is_json_with_its_digest_first(entry) -> None:
    data = encode(entry)
    assert list(json.loads(data)) == ["digest", "body"] and data.endswith(b"\n")
    again, digest = decode(data, name="x")
    assert again == entry and json.loads(data)["digest"] == digest and encode(again) == data


@pytest.mark.parametrize("entry", [MANIFEST, OPENING])
def test_every_torn_or_flipped_entry_shows(entry) -> None:
    data = encode(entry)
    for length in range(len(data)):
        with pytest.raises(FarshoreError):
            decode(data[:length], name="x")
    for at in range(len(data)):
        with pytest.raises(FarshoreError) as caught:
            decode(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], name="x")
        assert caught.value.code is Code.REPLICA_DAMAGED


def test_point_ids_name_cycle_and_digest() -> None:
    point = to_point(MANIFEST, "b3:0123456789abcdef")
    assert point.id == point_id(7, "b3:0123456789abcdef") == "p-0000000007-01234567"
    assert (point.size_bytes, point.final, cycle_of(point.id), cycle_of("latest")) == (SIZE, True, 7, None)


def test_names_become_one_component_and_stay_different() -> None:
    names = ["a", "A", "a/b", "a%2Fb", "..", ".", "ä", "a b", "%2E."]
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert all("/" not in name and not name.startswith(".") for name in safe)
    with pytest.raises(FarshoreError):
        safe_name("")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 2)), max_size=40))
def test_a_token_bucket_never_exceeds_rate_times_time_plus_burst(requests: list[tuple[int, float]]) -> None:
    now = [0.0]
    bucket = TokenBucket(
        100.0, 250.0, monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    sent = 0
    for amount, idle in requests:
        now[0] += idle
        bucket.take(amount)
        sent += amount
        assert sent <= 100.0 * now[0] + 250.0 + 1e-6
