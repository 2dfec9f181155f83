"""Two owners of one replica, interleaved at every operation: one wins each number, points stay true, the elder stops."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
from datetime import timedelta

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.journal import log, writer
from farshore.replication.journal.cycle import Pace, run_cycle
from farshore.replication.journal.entries import Base, Manifest, digest_of
from farshore.replication.journal.store import JournalStore, Options
from farshore.replication.ports import LEAF

from .fakes import START, MemoryBackend, ModelSource, Through, pattern

PACE = Pace(workers=0, piece=2 * LEAF)


class Turns:
    """Lets one thread at a time do one operation, in an order chosen by dice."""

    def __init__(self, dice: random.Random) -> None:
        self.condition = threading.Condition()
        self.waiting: set[str] = set()
        self.granted: str | None = None
        self.alive: set[str] = set()
        self.dice = dice

    def pass_through(self, who: str) -> bool:
        with self.condition:
            self.waiting.add(who)
            self.condition.notify_all()
            assert self.condition.wait_for(lambda: self.granted == who, 20), "the schedule stands still"
            self.granted = None
            self.waiting.discard(who)
            self.condition.notify_all()
        return False

    def end(self, who: str) -> None:
        with self.condition:
            self.alive.discard(who)
            self.condition.notify_all()

    def run(self, between) -> None:
        bias = self.dice.choice([0.1, 0.5, 0.9, 0.98])  # long stretches of one of them are interesting, too
        while True:
            with self.condition:
                ready = self.condition.wait_for(
                    lambda: self.granted is None and self.waiting >= self.alive, 20
                )
                assert ready, "a writer neither works nor waits"
                if not self.alive:
                    return
                between()
                choice = sorted(self.waiting)
                pick = choice[0] if self.dice.random() < bias else choice[-1]
                self.granted = pick
                self.condition.notify_all()


def opened(backend) -> JournalStore:
    """The grace period is short, so that sweeps do something; each look at the clock is a second later."""
    now = itertools.count(1000)
    return JournalStore(backend, clock=lambda: float(next(now)), options=Options(grace=GRACE, workers=0))


GRACE = 60.0


@pytest.fixture(autouse=True)
def one_request_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that fetches with several threads would take several turns at once."""
    monkeypatch.setattr(log, "_FETCH_AHEAD", 10**6)


def play(seed: int) -> None:
    dice = random.Random(seed)
    backend = MemoryBackend()
    backend.obey_fences = OBEY
    source = ModelSource()
    source.add("2000", 4)
    source.write("2000", 1, pattern(1))
    turns = Turns(dice)
    habits = {"a": dice.randint(0, 1), "b": dice.randint(0, 1)}
    commits: list[tuple[str, int, int]] = []  # who, epoch, cycle, in order of acknowledgement
    failures: list[BaseException] = []

    def owner(who: str, delay: int) -> None:
        store = opened(Through(backend, lambda *_: turns.pass_through(who)))
        try:
            for _ in range(delay):
                turns.pass_through(who)
            mine = store.acquire("vm", who)
            for number in range(4):
                result = run_cycle(source, mine, machine="vm", want=Consistency.CRASH, pace=PACE)
                commits.append((who, result.manifest.epoch, result.manifest.cycle))
                points = mine.points()
                if len(points) > 2:
                    mine.remove_points([points[0].cycle])
                mine.advance()
                if number % 2 == habits[who]:
                    mine.freeze()
                mine.sweep(thorough=True)
        except FarshoreError as error:
            if error.code is not Code.REPLICA_FENCED:
                failures.append(error)
        except BaseException as error:  # told to the main thread
            failures.append(error)
        finally:
            turns.end(who)

    def guest() -> None:
        if dice.random() < 0.3:
            source.write("2000", dice.randrange(4), pattern(dice.randrange(3)))

    turns.alive = {"a", "b"}
    threads = [
        threading.Thread(target=owner, args=("a", 0), daemon=True),
        threading.Thread(target=owner, args=("b", dice.randint(0, 60)), daemon=True),
    ]
    for thread in threads:
        thread.start()
    turns.run(guest)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not failures, failures
    numbers = [cycle for _, _, cycle in commits]
    assert len(numbers) == len(set(numbers)), "two winners of one number"
    ordered = sorted(commits, key=lambda commit: commit[2])
    epochs = [epoch for _, epoch, _ in ordered]
    assert epochs == sorted(epochs), "a stale owner committed after its successor had entered"
    assert ordered, "nobody got anywhere"
    store = opened(backend)
    for point in store.points("vm"):
        truth = source.history[store.manifest("vm", point.id).cut]["2000"]
        reader, found = store.read_point("vm", point.id, "2000"), bytearray(len(truth))

        def sink(at: int, data: bytes | memoryview, into: bytearray = found) -> None:
            into[at : at + len(data)] = data

        reader.write_out(sink)
        assert found == truth
    assert store.points("vm")[-1].taken_at > START - timedelta(seconds=1)


OBEY = True


def test_two_interleaved_writers_leave_only_true_points() -> None:
    for seed in range(25):
        play(seed)


def test_the_play_catches_a_store_without_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fences the elder's late writes end up in the younger one's points."""
    monkeypatch.setitem(globals(), "OBEY", False)
    _expect_catch()


def test_the_play_catches_an_owner_that_chooses_a_new_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer whose number is taken must stop; this one looks for the next free number and goes on."""
    real = writer.Writer._append

    def append(self, entry):
        while self.log.get(self._next) is not None:
            self._next += 1
        if isinstance(entry, Manifest):
            entry = dataclasses.replace(entry, cycle=self._next)
        else:
            entry = dataclasses.replace(entry, number=self._next)
        return real(self, entry)

    monkeypatch.setattr(writer.Writer, "_append", append)
    _expect_catch()


def test_the_play_catches_bases_that_need_no_number_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale owner's base is taken although its successor's redo is under way."""
    real = writer.Writer._append

    def append(self, entry):
        if isinstance(entry, Base):
            here = next(n for n in itertools.count(self._next) if self.log.get(n) is None)
            view = self.log.read(1000.0)
            newest = view.openings[-1]
            before = view.entries.get(here - 1)
            entry = dataclasses.replace(
                entry, number=here, epoch=newest.epoch, parent=before[1] if before else entry.parent
            )
            self.log.create(entry)
            if newest.epoch == self.epoch:
                self._parent, self._next = digest_of(entry), here + 1
            return self._parent
        return real(self, entry)

    monkeypatch.setattr(writer.Writer, "_append", append)
    _expect_catch()


def _expect_catch() -> None:
    for seed in range(400):
        try:
            play(seed)
        except (AssertionError, FarshoreError):
            return
    pytest.fail("no play noticed")


@pytest.mark.slow
def test_many_plays() -> None:
    for seed in range(1000, 2500):
        play(seed)
