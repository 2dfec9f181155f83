"""The loop over windows of changed areas never leaves a hole, whatever the server answers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.providers.vsphere.areas import NotCovered, Window, collect, epoch, merge
from farshore.replication.ports import Extent

BLOCK = 65536


def server(capacity: int, changed: list[tuple[int, int]], windows: list[int]):
    """An honest server that answers in windows of the given sizes (the last one again and again)."""
    sizes = iter(windows)
    last = windows[-1]

    def query(offset: int) -> Window:
        length = min(next(sizes, last), capacity - offset)
        inside = [
            (max(a, offset), min(a + n, offset + length) - max(a, offset))
            for a, n in changed
            if a < offset + length and a + n > offset
        ]
        return Window(offset, length, inside)

    return query


blocks = st.integers(0, 63)


@settings(deadline=None)
@given(
    st.integers(1, 64 * BLOCK),
    st.lists(st.tuples(blocks, st.integers(1, 8)), max_size=12),
    st.lists(st.integers(1, 20).map(lambda n: n * BLOCK), min_size=1, max_size=5),
)
def test_every_changed_byte_is_found_once_in_order_and_inside_the_disk(capacity, raw, windows):
    changed = [(b * BLOCK, min(n * BLOCK, capacity - b * BLOCK)) for b, n in raw if b * BLOCK < capacity]
    found = collect(capacity, server(capacity, changed, windows))
    truth = {i for a, n in changed for i in range(a // 4096, (a + n + 4095) // 4096)}
    got = {i for e in found for i in range(e.start // 4096, (e.start + e.length + 4095) // 4096)}
    assert got == truth
    assert all(e.start + e.length <= capacity for e in found)
    assert all(x.start + x.length < y.start for x, y in pairwise(found))  # merged, ordered


@settings(deadline=None)
@given(
    st.integers(2, 40).map(lambda n: n * BLOCK),
    st.integers(0, 39),
    st.sampled_from(["early", "late", "empty", "short", "below", "above", "beyond the disk"]),
)
def test_a_dishonest_answer_is_never_believed(capacity, where, lie):
    wrong_at = (where * BLOCK) % capacity

    def query(offset: int) -> Window:
        end = min(offset + BLOCK, capacity)
        if offset != wrong_at:
            return Window(offset, end - offset, [])
        match lie:
            case "early":
                return Window(offset - 1, end - offset + 1, [])
            case "late":
                return Window(offset + 1, end - offset, [])
            case "empty":
                return Window(offset, 0, [])
            case "short":
                return Window(offset, -BLOCK, [])
            case "below":
                return Window(offset, end - offset, [(offset - 1, 10)])
            case "above":
                return Window(offset, end - offset, [(end - 1, 2)])
            case _:
                return Window(offset, capacity - offset + BLOCK, [])

    with pytest.raises(NotCovered):
        collect(capacity, query)


def test_neighbours_become_one_and_the_end_is_clamped():
    assert merge([(BLOCK, BLOCK), (0, BLOCK), (3 * BLOCK, 9 * BLOCK)], 4 * BLOCK + 5) == [
        Extent(0, 2 * BLOCK),
        Extent(3 * BLOCK, BLOCK + 5),
    ]


def test_an_empty_disk_asks_nothing():
    assert collect(0, lambda _: pytest.fail("asked")) == []


def test_the_epoch_is_what_stands_before_the_last_slash():
    one = "52 f3 b6 37 30 8d ea 3e-58 70 c0 fd 61 44 26 62/2"
    assert epoch(one) == epoch(one[:-1] + "3000")
    assert epoch(one) != epoch("53" + one[2:])
