"""Two owners of one replica, interleaved at every operation: one wins each number, points stay true, the elder stops."""

from __future__ import annotations

import random
import threading
from datetime import timedelta

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication import replica
from farshore.replication.engine import Pace, run_cycle
from farshore.replication.ports import LEAF
from farshore.replication.replica import BackendStore
from farshore.replication.verify import verify_point

from .fakes import START, MemoryBackend, ModelSource, Through, pattern

PACE = Pace(workers=1, piece=2 * LEAF, window=4 * LEAF, poll=1.0)


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


def play(seed: int) -> None:
    dice = random.Random(seed)
    backend = MemoryBackend()
    backend.obey_fences = OBEY
    source = ModelSource()
    source.add("2000", 4)
    source.write("2000", 1, pattern(1))
    turns = Turns(dice)
    commits: list[tuple[str, int, int]] = []  # who, epoch, cycle, in order of acknowledgement
    failures: list[BaseException] = []

    def owner(who: str, delay: int) -> None:
        store = BackendStore(Through(backend, lambda *_: turns.pass_through(who)), clock=lambda: 1000.0)
        try:
            for _ in range(delay):
                turns.pass_through(who)
            writer = store.acquire("vm", who)
            for _ in range(4):
                result = run_cycle(source, writer, machine="vm", want=Consistency.CRASH, pace=PACE)
                commits.append((who, result.manifest.epoch, result.manifest.cycle))
                points = writer.points()
                if len(points) > 2:
                    writer.remove_points([points[0].cycle])
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
    store = BackendStore(backend, clock=lambda: 1000.0)
    for point in store.points("vm"):
        manifest = store.manifest("vm", point.id)
        verify_point(store, "vm", point.id)
        truth = source.history[manifest.cut]["2000"]
        assert store.read_point("vm", point.id, "2000").read(0, len(truth)) == truth
    assert store.points("vm")[-1].taken_at > START - timedelta(seconds=1)


OBEY = True


def test_two_interleaved_writers_leave_only_true_points() -> None:
    for seed in range(40):
        play(seed)


def test_the_play_catches_a_store_without_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fences the elder's late writes end up in the younger one's points."""
    monkeypatch.setitem(globals(), "OBEY", False)
    _expect_catch()


def test_the_play_catches_an_owner_that_chooses_a_new_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer whose number is taken must stop; this one looks for the next free number and goes on."""
    real = replica.BackendWriter.commit

    def commit(self, manifest):
        import dataclasses

        while self.log.get(manifest.cycle) is not None:
            self._next = manifest.cycle + 1
            manifest = dataclasses.replace(manifest, cycle=self._next)
        return real(self, manifest)

    monkeypatch.setattr(replica.BackendWriter, "commit", commit)
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
