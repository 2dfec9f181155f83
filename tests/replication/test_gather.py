"""Neighbours become one write, every byte is handed on once, and little waits."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from farshore.replication.journal.gather import Gather

LEAF = 65536
MIB = 1 << 20


class Target:
    def __init__(self, size: int) -> None:
        self.body = bytearray(size)
        self.writes: list[tuple[int, int]] = []
        self.lock = threading.Lock()

    def __call__(self, offset: int, data: bytes | memoryview) -> None:
        with self.lock:
            assert not any(self.body[offset : offset + len(data)]), "a byte was handed on twice"
            self.body[offset : offset + len(data)] = data
            self.writes.append((offset, len(data)))


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_is_handed_on_once_whatever_the_order(seed: int) -> None:
    dice = random.Random(seed)
    size = 16 * MIB
    truth, runs, at = bytearray(size), [], 0
    while at < size:
        length = min(dice.choice((LEAF, 3 * LEAF, MIB)), size - at)
        if dice.random() < 0.8:
            truth[at : at + length] = bytes([dice.randrange(1, 256)]) * length
            runs.append((at, bytes(truth[at : at + length])))
        at += length
    dice.shuffle(runs)
    target = Target(size)
    gather = Gather(target, hold=2 * MIB)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(gather, offset, memoryview(data)) for offset, data in runs]:
            done.result()
    gather.finish(workers=2)
    assert target.body == truth


def test_leaves_that_come_in_any_order_are_written_in_runs() -> None:
    leaves = list(range(128))
    random.Random(1).shuffle(leaves)
    target = Target(128 * LEAF)
    gather = Gather(target)
    for leaf in leaves:
        gather(leaf * LEAF, b"x" * LEAF)
    gather.finish()
    assert all(target.body)
    assert len(target.writes) <= 4
    assert all(length <= 4 * MIB for _, length in target.writes)


def test_no_more_waits_than_it_may() -> None:
    target = Target(64 * MIB)
    gather = Gather(target, hold=MIB)
    for leaf in range(0, 1024, 2):  # no neighbours at all
        gather(leaf * LEAF, b"x" * LEAF)
        assert (leaf // 2 + 1) * LEAF - sum(length for _, length in target.writes) <= MIB + LEAF
    gather.finish()
    assert sum(length for _, length in target.writes) == 512 * LEAF


def test_an_error_of_the_target_reaches_the_caller() -> None:
    def full(offset: int, data: bytes | memoryview) -> None:
        raise OSError("full")

    gather = Gather(full)
    gather(0, b"x" * LEAF)
    with pytest.raises(OSError, match="full"):
        gather.finish()
    with pytest.raises(OSError, match="full"):
        gather(0, b"x" * MIB)
