"""Formats of the journal: what goes in comes out; whatever was altered, torn or moved is found."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from io import FileIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.extents import bridge, normalise, split, total
from farshore.replication.journal import entries, keys, segment, table
from farshore.replication.journal.entries import (
    Base,
    BaseDisk,
    DiskEntry,
    Manifest,
    Opening,
    PageRef,
    SegmentRef,
)
from farshore.replication.journal.keys import Keys, LocalKek
from farshore.replication.journal.segment import Builder, ChunkKind, Index, Place
from farshore.replication.ports import LEAF, DiskState, Extent

from .fakes import MemoryBackend

KEYS = Keys.of(bytes(32))
PLACE = Place("vm", "2000", 7, 3, 40 * LEAF)


def build(chunks: list[tuple[int, bytes]], place: Place = PLACE, level: int = 1) -> tuple[bytes, SegmentRef]:
    """A segment of (leaf, data) chunks; zeros become zeros."""
    builder = Builder(place, KEYS, random.Random(1).randbytes(32))
    for leaf, data in chunks:
        if not any(data):
            builder.add_zeros(leaf * LEAF, len(data))
            continue
        kind, packed = segment.squeeze(data, level)
        nonce = builder.reserve(leaf * LEAF, len(data), kind, len(packed), table.hashes(KEYS.leaf, data))
        builder.put(nonce, builder.seal_chunk(nonce, leaf * LEAF, len(data), kind, packed))
    body, digest, index, start, end = builder.finish()
    return body, SegmentRef(entries.segment_name(7, 3, "2000", 0, digest), start, end, len(body), index)


def unpack(body: bytes, ref: SegmentRef, machine: str = "vm", disk: str = "2000") -> list[tuple[int, bytes]]:
    """All chunks, verified as readers verify them."""
    head = body[: ref.index]
    if segment.index_digest(KEYS, machine, disk, head) != ref.digest:
        raise segment.damaged(ref.name, disk, ref.start, ref.end - ref.start)
    index = Index(machine, disk, head)
    found: list[tuple[int, bytes]] = []
    for chunk in index.chunks():
        if chunk.kind is ChunkKind.ZERO:
            found.append((chunk.offset // LEAF, bytes(chunk.length)))
            continue
        at = index.payload + chunk.position
        data = segment.open_chunk(KEYS, index, chunk, body[at : at + chunk.stored], name=ref.name)
        found.append((chunk.offset // LEAF, data))
    return found


def content(kind: int, leaves: int, seed: int) -> bytes:
    dice = random.Random(seed)
    if kind == 0:
        return bytes(leaves * LEAF)
    if kind == 1:
        return dice.randbytes(leaves * LEAF)
    return (b"%d " % seed * LEAF)[: leaves * LEAF]


CHUNKS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(CHUNKS, st.sampled_from([0, 1]), st.randoms(use_true_random=False))
def test_a_segment_gives_back_what_went_in(shape, level, dice) -> None:
    leaf, chunks = 0, []
    for number, (kind, length) in enumerate(shape):
        leaf += dice.randint(0, 2)
        chunks.append((leaf, content(kind, length, number)))
        leaf += length
    dice.shuffle(chunks)
    body, ref = build(chunks, level=level)
    disk, found = bytearray(40 * LEAF), bytearray(40 * LEAF)
    for at, data in chunks:
        disk[at * LEAF : at * LEAF + len(data)] = data
    for at, data in unpack(body, ref):
        found[at * LEAF : at * LEAF + len(data)] = data
    assert found == disk
    assert ref.start == min(at for at, _ in chunks) * LEAF


def test_incompressible_chunks_stay_raw_and_text_is_compressed() -> None:
    assert segment.squeeze(random.Random(1).randbytes(LEAF), 1)[0] is ChunkKind.RAW
    kind, packed = segment.squeeze(b"farshore " * 10000, 1)
    assert kind is ChunkKind.ZSTD and len(packed) < 2000


def test_any_flipped_bit_of_a_segment_is_found() -> None:
    chunks = [(0, content(2, 2, 1)), (2, bytes(LEAF)), (5, content(1, 1, 2)[:4096])]
    body, ref = build(chunks)
    dice = random.Random(5)
    sound = unpack(body, ref)
    places = [*range(ref.index), *(dice.randrange(ref.index, len(body)) for _ in range(300)), len(body) - 1]
    for at in places:
        torn = bytearray(body)
        torn[at] ^= 1 << dice.randrange(8)
        with pytest.raises(FarshoreError) as caught:
            assert unpack(bytes(torn), ref) != sound, f"byte {at} does not matter"
        assert caught.value.code is Code.REPLICA_DAMAGED, at


def test_a_truncated_segment_is_found() -> None:
    body, ref = build([(0, content(1, 2, 1))])
    for length in (0, 10, ref.index - 1, ref.index, len(body) - 1):
        with pytest.raises(FarshoreError):
            unpack(body[:length], ref)


@pytest.mark.parametrize(("machine", "disk"), [("other", "2000"), ("vm", "2001")])
def test_a_segment_of_another_machine_or_disk_is_refused(machine: str, disk: str) -> None:
    body, ref = build([(0, content(2, 1, 1)), (1, bytes(LEAF))])
    with pytest.raises(FarshoreError):
        unpack(body, ref, machine, disk)


@pytest.mark.parametrize(
    "other",
    [
        Place("vm", "2000", 7, 4, 40 * LEAF),
        Place("vm", "2000", 8, 3, 40 * LEAF),
        Place("vm", "2001", 7, 3, 40 * LEAF),
        Place("mv", "2000", 7, 3, 40 * LEAF),
    ],
)
def test_a_chunk_cannot_stand_in_for_one_of_another_cycle_epoch_disk_or_machine(other: Place) -> None:
    """Even with the same salt, i.e. the same key and nonce, the associated data refuses it."""
    data = content(1, 1, 3)
    body, ref = build([(0, data)])
    strange, _ = build([(0, data)], place=other)
    index = Index("vm", "2000", body[: ref.index])
    chunk = next(index.chunks())
    with pytest.raises(FarshoreError):
        segment.open_chunk(KEYS, index, chunk, strange[index.payload :], name="x")


def test_a_chunk_cannot_move_inside_its_segment() -> None:
    one, two = content(1, 1, 1), content(1, 1, 2)
    body, ref = build([(0, one), (1, two)])
    index = Index("vm", "2000", body[: ref.index])
    first, second = index.chunks()
    stored = body[index.payload + second.position :][: second.stored]
    with pytest.raises(FarshoreError):
        segment.open_chunk(KEYS, index, first, stored, name="x")


def test_nonces_and_keys_never_repeat() -> None:
    """Two segments of the same content share neither salt nor stored bytes; inside one every nonce is new."""
    seen: set[tuple[bytes, int]] = set()
    data = content(1, 1, 1)
    for _ in range(20):
        builder = Builder(PLACE, KEYS, keys.os.urandom(32))
        for leaf in range(5):
            nonce = builder.reserve(leaf * LEAF, LEAF, ChunkKind.RAW, LEAF, table.hashes(KEYS.leaf, data))
            builder.put(nonce, builder.seal_chunk(nonce, leaf * LEAF, LEAF, ChunkKind.RAW, data))
        body, _, index, _, _ = builder.finish()
        found = Index("vm", "2000", body[:index])
        for chunk in found.chunks():
            pair = (found.salt, chunk.nonce)
            assert pair not in seen, "a nonce was used twice"
            seen.add(pair)
    assert len(seen) == 100


def nonce_used_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Builder, "_next", lambda self: 0)


def salt_used_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(keys.os, "urandom", bytes)


@pytest.mark.parametrize("mutant", [nonce_used_again, salt_used_again])
def test_a_nonce_that_is_used_again_is_noticed(mutant, monkeypatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="twice"):
        test_nonces_and_keys_never_repeat()


# keys -----------------------------------------------------------------------------------------------------------------


def test_the_data_key_comes_back_only_with_its_kek() -> None:
    backend = MemoryBackend()
    mine, other = LocalKek(bytes(32)), LocalKek(bytes(31) + b"\1")
    made = keys.load(backend, "vm/", mine)
    assert keys.load(backend, "vm/", mine) == keys.find(backend, "vm/", mine) == made
    for wrong in (other, None):
        with pytest.raises(FarshoreError) as caught:
            keys.find(backend, "vm/", wrong)
        assert caught.value.code is Code.SECRET_UNAVAILABLE
    keys.rewrap(backend, "vm/", mine, other)
    keys.rewrap(backend, "vm/", mine, other)
    assert keys.find(backend, "vm/", other) == made
    assert bytes(32) not in b"".join(data for data, _ in backend.objects.values())


def test_a_key_of_another_machine_is_refused() -> None:
    backend = MemoryBackend()
    kek = LocalKek(bytes(32))
    keys.load(backend, "vm/", kek)
    backend.put("other/k/key.json", backend.get("vm/k/key.json") or b"")
    with pytest.raises(FarshoreError):
        keys.find(backend, "other/", kek)


@pytest.mark.parametrize("kek", [None, LocalKek(bytes(32))])
def test_a_damaged_key_is_found(kek) -> None:
    backend = MemoryBackend()
    keys.load(backend, "vm/", kek)
    data = backend.get("vm/k/key.json") or b""
    made = keys.find(backend, "vm/", kek)
    for at in range(len(data)):
        torn = bytearray(data)
        torn[at] ^= 1
        backend.put("vm/k/key.json", bytes(torn))
        try:
            assert keys.find(backend, "vm/", kek) == made
        except FarshoreError as error:
            assert error.code in (Code.REPLICA_DAMAGED, Code.SECRET_UNAVAILABLE)  # noqa: PT017
    backend.delete("vm/k/key.json")
    with pytest.raises(FarshoreError, match="missing"):
        keys.find(backend, "vm/", kek)


# entries --------------------------------------------------------------------------------------------------------------

NOW = datetime(2026, 1, 1, tzinfo=UTC)
REF = SegmentRef("s/000000000007/0000000003-2000-000000-" + "a" * 32, 0, LEAF, 1000, 100)
POINT = Manifest(
    machine="vm",
    cycle=3,
    epoch=7,
    parent="b3:" + "0" * 64,
    previous=2,
    taken_at=NOW,
    committed_at=NOW,
    consistency=Consistency.APPLICATION,
    final=True,
    full=False,
    reason="",
    cut="farshore-vm-7-3",
    bytes_changed=1,
    bytes_shipped=2,
    bytes_stored=3,
    disks=(
        DiskEntry(
            DiskState("2000", "Festplatte 1 ü", 40 * LEAF, "uuid|path", "52 ab/1", boot=True),
            "2-7",
            2,
            "k3:" + "1" * 64,
            (REF,),
            (PageRef("i/x", 0, LEAF, 1),),
            ((5, 2),),
        ),
    ),
    tags={"why": "test"},
)
ENTRIES = [
    POINT,
    Opening("vm", 1, 7, "", "me", NOW),
    Base("vm", 4, 7, "b3:x", 3, NOW, (BaseDisk("2000", "2-7", 40 * LEAF, "k3:y", "a@1", "b@1"),)),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_entries_come_back_and_no_torn_or_altered_one_does(entry) -> None:
    data = entries.encode(entry)
    assert entries.decode(data, name="x") == (entry, entries.digest_of(entry))
    for at in range(len(data)):
        torn = bytearray(data)
        torn[at] ^= 1
        for bad in (bytes(torn), data[:at]):
            with pytest.raises(FarshoreError) as caught:
                entries.decode(bad, name="x")
            assert caught.value.code is Code.REPLICA_DAMAGED


def test_pages_come_back_and_damaged_ones_are_named() -> None:
    backend = MemoryBackend()
    rows = [SegmentRef(REF.name[:-1] + f"{n:x}", n * LEAF, n * LEAF + LEAF, 10, 5) for n in range(9)]
    ref, data = entries.page(7, 3, "2000", rows)
    backend.put("vm/" + ref.name, data)
    disk = DiskEntry(POINT.disks[0].state, "2-7", 2, "", (REF,), (ref,))
    assert list(entries.refs(backend, "vm/", disk)) == [*rows, REF]
    assert list(entries.refs(backend, "vm/", disk, 3 * LEAF, 5 * LEAF)) == rows[3:5]
    backend.put("vm/" + ref.name, data.replace(b"65536", b"65537"))
    with pytest.raises(FarshoreError, match="damaged"):
        list(entries.refs(backend, "vm/", disk))
    backend.delete("vm/" + ref.name)
    with pytest.raises(FarshoreError, match="missing"):
        list(entries.refs(backend, "vm/", disk))


@pytest.mark.parametrize("disk", ["2000", "a-b-c", "uuid|path/ü", ".x"])
def test_names_tell_where_a_segment_comes_from(disk: str) -> None:
    name = entries.segment_name(7, 3, disk, 12, "ab")
    assert entries.origin(name) == (7, 3, entries.safe_name(disk)) and name.count("/") == 2
    assert entries.origin("m/0000000001.json") is None


# tables ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3 * table.PAGE),
    st.lists(st.tuples(st.integers(0, 3 * table.PAGE), st.binary(min_size=16, max_size=16)), max_size=8),
    st.integers(1, 5000),
)
def test_the_root_is_the_same_however_it_is_computed(tmp_path_factory, leaves, writes, step) -> None:
    size = leaves * LEAF - 512
    body = bytearray(leaves * 16)
    mine = table.Table(KEYS.leaf, FileIO(tmp_path_factory.mktemp("t") / "t", "x+"), size)
    for leaf, entry in writes:
        if leaf < leaves:
            mine.root()  # so that only what changed is computed anew
            mine.put(leaf, entry)
            body[leaf * 16 : leaf * 16 + 16] = entry
    other = table.Root(KEYS.leaf, size)
    for at in range(0, len(body), step * 16):
        other.update(bytes(body[at : at + step * 16]))
    assert mine.root() == other.text()
    mine.trim()
    assert b"".join(data for _, data in mine.pages()) == body
    mine.close()


def test_a_table_takes_back_what_was_written_and_says_when_it_cannot(tmp_path: Path, monkeypatch) -> None:
    mine = table.Table(KEYS.leaf, FileIO(tmp_path / "t", "x+"), 100 * LEAF)
    mine.accept()
    before = mine.root()
    mine.begin()
    mine.put(3, b"a" * 32)
    mine.put(3, b"b" * 16)
    assert mine.root() != before and mine.take_back() and mine.root() == before
    monkeypatch.setattr(table, "_UNDO", 1)
    mine.begin()
    mine.put(3, b"a" * 32)
    assert not mine.take_back() and mine.lost
    mine.close()


def test_hashes_of_zeros_short_leaves_and_others() -> None:
    data = bytes(LEAF) + b"\1" * LEAF + bytes(512)
    found = table.hashes(KEYS.leaf, data)
    assert found[:16] == found[32:] == table.ZERO != found[16:32]
    assert table.hashes(KEYS.leaf, memoryview(data)) == found
    assert table.hashes(Keys.of(b"\1" * 32).leaf, data) != found, (
        "keyed: digests tell nothing without the key"
    )


def test_point_ids_name_cycle_and_digest() -> None:
    point = entries.to_point(POINT, "b3:0123456789abcdef")
    assert point.id == entries.point_id(3, "b3:0123456789abcdef") == "p-0000000003-01234567"
    assert (point.size_bytes, point.final) == (40 * LEAF, True)
    assert (entries.cycle_of(point.id), entries.cycle_of("latest")) == (3, None)


def test_names_become_one_component_and_stay_different() -> None:
    names = ["a", "A", "a/b", "a%2Fb", "..", ".", "ä", "a b", "%2E."]
    safe = [entries.safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert all("/" not in name and not name.startswith(".") for name in safe)
    with pytest.raises(FarshoreError):
        entries.safe_name("")


# extents, and the unkeyed hashes with which file sources find changes ------------------------------------------------

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
def test_split_and_bridge_keep_the_bytes(runs: list[Extent], leaves_each: int) -> None:
    whole = normalise(runs, SIZE)
    pieces = list(split(whole, leaves_each * LEAF))
    assert total(pieces) == total(whole) and covered(pieces) == covered(whole)
    assert all(0 < piece.length <= leaves_each * LEAF for piece in pieces)
    assert covered(bridge(whole, LEAF)) >= covered(whole)
