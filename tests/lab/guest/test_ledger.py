"""The ledger says exactly which prefix survived, and notices every kind of damage."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.lab.guest import ledger

SIZE = 2 << 20
AREA = ledger.RING_OFFSET + 64 * ledger.RECORD_SIZE
"""64 slots a disk: wrapping around is cheap."""


class Memory:
    def __init__(self, data: bytes | None = None) -> None:
        self.data = bytearray(data or bytes(SIZE))

    def read(self, offset: int, length: int, /) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes, /) -> None:
        self.data[offset : offset + len(data)] = data

    def copy(self) -> Memory:
        return Memory(bytes(self.data))


def machine(disks: int, records: int, area: int = AREA) -> tuple[list[Memory], ledger.LedgerWriter]:
    made = [Memory() for _ in range(disks)]
    ledger.format_ledger(made, "db", area_size=area)
    writer = ledger.LedgerWriter(made)
    for _ in range(records):
        writer.append()
    return made, writer


def place(number: int, disks: int, slots: int = 64) -> tuple[int, int]:
    offset = ledger.DEFAULT_AREA_OFFSET + ledger.RING_OFFSET + (number // disks) % slots * ledger.RECORD_SIZE
    return number % disks, offset


@given(st.integers(1, 4), st.integers(0, 700))
@settings(max_examples=20, deadline=None)
def test_an_undamaged_ledger_is_intact_whatever_its_length(disks: int, records: int) -> None:
    made, writer = machine(disks, records)
    report = ledger.verify(made)
    assert report.intact, report.problems
    assert report.last_number == report.prefix_end == records == writer.last_number
    assert report.first_number == (max(1, records - disks * 64 + 1) if records else 0)
    assert report.last_time_ns == writer.last_time_ns


@given(st.integers(1, 3), st.integers(1, 300), st.data())
@settings(max_examples=20, deadline=None)
def test_a_lost_record_is_a_hole_with_its_number(disks: int, records: int, data: st.DataObject) -> None:
    made, _ = machine(disks, records + 1)
    first = max(1, records + 1 - disks * 64 + 1)
    lost = data.draw(st.integers(first, records))
    disk, offset = place(lost, disks)
    made[disk].write(offset, bytes(ledger.RECORD_SIZE))
    report = ledger.verify(made)
    assert not report.intact
    assert report.holes == (lost,)
    assert report.prefix_end == lost - 1
    assert report.last_number == records + 1


@given(st.integers(0, ledger.RECORD_SIZE - 1), st.integers(1, 255), st.integers(1, 150))
@settings(max_examples=25, deadline=None)
def test_a_changed_byte_anywhere_is_noticed(position: int, flip: int, number: int) -> None:
    made, _ = machine(2, 150)
    disk, offset = place(number, 2)
    first = 150 - 128 + 1
    made[disk].data[offset + position] ^= flip
    report = ledger.verify(made)
    assert not report.intact
    if number >= first:
        assert report.torn
        assert report.prefix_end < 150


def test_disks_cut_at_different_instants_are_inconsistent() -> None:
    made, writer = machine(2, 30)
    early = made[0].copy()
    for _ in range(10):
        writer.append()
    report = ledger.verify([early, made[1]])
    assert not report.intact
    assert report.holes[0] == 32
    assert report.prefix_end == 31


def test_disks_cut_at_different_instants_are_inconsistent_after_wrapping_too() -> None:
    made, writer = machine(2, 1000)
    early = made[1].copy()
    for _ in range(10):
        writer.append()
    report = ledger.verify([made[0], early])
    assert not report.intact
    assert report.holes[0] == 1001


@given(st.integers(1, 3), st.integers(0, 400), st.integers(0, 60))
@settings(max_examples=15, deadline=None)
def test_any_cut_at_one_instant_holds_an_unbroken_prefix(disks: int, before: int, after: int) -> None:
    made, writer = machine(disks, before)
    cut = [d.copy() for d in made]
    for _ in range(after):
        writer.append()
    report = ledger.verify(cut)
    assert report.intact
    assert report.last_number == before


def test_a_record_copied_to_another_place_is_out_of_place() -> None:
    made, _ = machine(1, 40)
    _, source = place(10, 1)
    _, target = place(20, 1)
    made[0].write(target, made[0].read(source, ledger.RECORD_SIZE))
    report = ledger.verify(made)
    assert not report.intact
    assert report.holes == (20,)


def test_swapped_disks_are_reported() -> None:
    made, _ = machine(2, 20)
    report = ledger.verify(made[::-1])
    assert not report.intact
    assert any("disk 0 of the machine" in p for p in report.problems)


def test_a_missing_disk_is_reported() -> None:
    made, _ = machine(3, 20)
    assert not ledger.verify(made[:2]).intact


def test_a_forged_history_with_valid_hashes_breaks_the_chain() -> None:
    made, _ = machine(1, 20)
    other, _ = machine(1, 20)
    identity = made[0].read(ledger.DEFAULT_AREA_OFFSET + 24, 16)
    other = [Memory()]
    ledger.format_ledger(other, "db", area_size=AREA, ledger_id=identity)
    forger = ledger.LedgerWriter(other)
    for _ in range(20):
        forger.append()
    _, offset = place(12, 1)
    made[0].write(offset, other[0].read(offset, ledger.RECORD_SIZE))
    report = ledger.verify(made)
    assert not report.intact
    assert report.prefix_end == 11


def test_a_writer_continues_the_chain_it_finds() -> None:
    made, _ = machine(2, 333)
    writer = ledger.LedgerWriter(made)
    assert writer.last_number == 333
    writer.append(ledger.Kind.BOOT)
    last = writer.append(ledger.Kind.SHUTDOWN)
    report = ledger.verify(made)
    assert report.intact
    assert report.last_number == last.number == 335
    assert report.last_kind is ledger.Kind.SHUTDOWN
    assert report.last_time == pytest.approx(last.time_ns / 1e9)


def test_time_never_goes_backwards_in_the_chain() -> None:
    made = [Memory()]
    ledger.format_ledger(made, "db", area_size=AREA)
    clock = iter([100, 50, 50])
    writer = ledger.LedgerWriter(made, clock_ns=lambda: next(clock))
    assert [writer.append().time_ns for _ in range(3)] == [100, 101, 102]


def test_disks_without_a_ledger_are_refused() -> None:
    with pytest.raises(ledger.LedgerError, match="no ledger"):
        ledger.verify([Memory()])


def test_disks_of_two_ledgers_are_refused() -> None:
    one, _ = machine(2, 5)
    two, _ = machine(2, 5)
    with pytest.raises(ledger.LedgerError, match="different"):
        ledger.verify([one[0], two[1]])


def test_an_area_of_half_a_gibibyte_on_two_disks_holds_two_million_records() -> None:
    slots = ((512 << 20) - ledger.RING_OFFSET) // ledger.RECORD_SIZE
    assert 2 * slots > 2_000_000


def test_formatting_again_wipes_the_old_ledger() -> None:
    made, _ = machine(1, 50)
    ledger.format_ledger(made, "db", area_size=AREA)
    assert ledger.verify(made).last_number == 0


def test_random_damage_never_passes_for_intact_and_never_raises() -> None:
    chance = random.Random(7)
    for _ in range(25):
        made, _ = machine(2, 200)
        disk = chance.randrange(2)
        start = ledger.DEFAULT_AREA_OFFSET + ledger.RING_OFFSET + chance.randrange(64 * 512 - 64)
        made[disk].write(start, chance.randbytes(64))
        assert not ledger.verify(made).intact
