"""Nothing stays frozen: not after an error, a late owner, a killed owner, or a killed agent in the middle of a cut."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.physical.agent import freeze, hooks
from farshore.providers.physical.agent.cuts import Cutter
from farshore.providers.physical.agent.freeze import FreezeFailed, Freezer, thaw_noted
from farshore.providers.physical.agent.hooks import Hook
from farshore.providers.physical.source import PhysicalSource

from .conftest import config_of, settings_of
from .points import Bench


@pytest.fixture
def mounted(machine):
    machine.add("d", 32)
    machine.mkfs("d")
    return machine.mount("d")


@pytest.fixture
def freezer(tmp_path, machine):
    made = Freezer(tmp_path / "note")
    yield made
    machine.thaw()
    made.close()


def written(folder: Path, timeout: float = 30.0) -> bool:
    """Whether a write into the folder comes through; one that hangs is left to itself (it ends with the thaw)."""
    done = threading.Event()

    def attempt() -> None:
        (folder / f"probe-{time.monotonic_ns()}").write_bytes(b"x")
        done.set()

    threading.Thread(target=attempt, daemon=True).start()
    return done.wait(timeout)


def test_writes_wait_while_frozen_and_go_on_after(machine, mounted, freezer):
    with freezer.frozen(machine.mounts(), 30) as frozen:
        assert not written(mounted, 0.3)
    assert written(mounted)
    assert frozen.frozen == [str(mounted)]
    assert not frozen.late
    assert 0.3 <= frozen.seconds < 30


def test_a_process_with_many_open_files_has_a_watchdog(machine, mounted, tmp_path):
    """A worker of a large site holds thousands of connections: nothing here may depend on small descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this machine allows fewer than 2,048 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(1030)]
    try:
        freezer = Freezer(tmp_path / "note")
        try:
            with freezer.frozen(machine.mounts(), 0.2) as frozen:
                assert written(mounted), "the watchdog did not thaw"
            assert frozen.late
        finally:
            machine.thaw()
            freezer.close()
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_error_inside_thaws(machine, mounted, freezer):
    with pytest.raises(ZeroDivisionError), freezer.frozen(machine.mounts(), 30):
        raise ZeroDivisionError
    assert written(mounted)


def test_an_owner_that_hangs_is_thawed_by_the_watchdog_and_told(machine, mounted, freezer):
    with freezer.frozen(machine.mounts(), 0.5) as frozen:
        assert written(mounted), "the watchdog did not thaw"
    assert frozen.late
    with freezer.frozen(machine.mounts(), 30) as again:
        pass
    assert not again.late


def test_somebody_elses_freeze_is_told_and_left_alone(machine, mounted, freezer):
    with freezer.frozen(machine.mounts(), 30):
        other = Freezer(mounted.parent / "note2")
        try:
            with (
                pytest.raises(FreezeFailed, match="somebody else froze it"),
                other.frozen(machine.mounts(), 30),
            ):
                pass
            assert not written(mounted, 0.3), "the first freeze was undone"
        finally:
            other._dog._process.kill()  # its end of channel would thaw as well: it holds nothing
            other.close()


def test_when_one_of_two_cannot_be_frozen_neither_stays_so(machine, mounted, freezer):
    machine.add("e", 32)
    machine.mkfs("e")
    second = machine.mount("e")
    holder = Freezer(mounted.parent / "note3")
    mounts = machine.mounts()
    try:
        with holder.frozen([mount for mount in mounts if mount.path == str(second)], 30):
            with (
                pytest.raises(FreezeFailed),
                freezer.frozen(sorted(mounts, key=lambda m: m.path != str(mounted)), 30),
            ):
                pass
            assert written(mounted)
    finally:
        machine.thaw()
        holder.close()


def test_without_a_watchdog_nothing_is_frozen(machine, mounted, freezer):
    os.kill(freezer.watchdog_pid, signal.SIGKILL)
    with freezer.frozen(machine.mounts(), 30) as frozen:  # a new one is started first
        assert os.path.exists(f"/proc/{freezer.watchdog_pid}")
    assert not frozen.late
    assert written(mounted)


def test_a_watchdog_that_dies_while_frozen_voids_the_promise(machine, mounted, freezer):
    with freezer.frozen(machine.mounts(), 30) as frozen:
        os.kill(freezer.watchdog_pid, signal.SIGKILL)
        freezer._dog._process.wait(timeout=30)
    assert frozen.late
    assert written(mounted)


_OWNER = """
import sys, time
from pathlib import Path
from farshore.providers.physical.agent import disks
from farshore.providers.physical.agent.freeze import Freezer
freezer = Freezer(Path(sys.argv[2]))
mounts = [mount for mount in disks.mounts() if mount.path == sys.argv[1]]
with freezer.frozen(mounts, 600):
    print(freezer.watchdog_pid, flush=True)
    time.sleep(600)
"""


def owner(folder: Path, note: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(folder), str(note)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_killed_owner_is_thawed_for(mounted, tmp_path):
    process, _ = owner(mounted, tmp_path / "note")
    try:
        assert not written(mounted, 0.3)
    finally:
        process.kill()
        process.wait()
    assert written(mounted)


def test_when_owner_and_watchdog_are_killed_the_next_start_thaws(mounted, tmp_path, machine):
    note = tmp_path / "note"
    process, dog = owner(mounted, note)
    try:
        os.kill(dog, signal.SIGKILL)
        process.kill()
        process.wait()
        assert not written(mounted, 0.3), "who thawed?"
        assert thaw_noted(note) == [str(mounted)]
        assert written(mounted)
        assert thaw_noted(note) == []
    finally:
        machine.thaw()


def test_a_note_of_what_is_frozen_is_there_only_while_it_is(machine, mounted, freezer, tmp_path):
    with freezer.frozen(machine.mounts(), 30):
        assert (tmp_path / "note").exists()
    assert not (tmp_path / "note").exists()


# -- a whole agent ------------------------------------------------------------------------------------------------

_AGENT = """
import sys, time, pickle
from pathlib import Path
from farshore.providers.physical.agent import cuts, disks
from farshore.providers.physical.agent.core import Agent
from farshore.providers.physical.agent.service import Server
config, folder = pickle.loads(bytes.fromhex(sys.argv[1])), sys.argv[2]
agent = Agent(config, mounts=lambda: [mount for mount in disks.mounts() if mount.path == folder])
mark = cuts.Cutter._mark
def slow(self, cut, snapshots):
    mark(self, cut, snapshots)
    print("frozen", flush=True)
    time.sleep(600)
cuts.Cutter._mark = slow
server = Server(config, agent)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def test_an_agent_that_is_killed_in_the_middle_of_a_cut_leaves_nothing_frozen(
    machine, mounted, tmp_path, authority, tracefs
):
    import pickle

    config = config_of(tmp_path, authority, machine.loops, tracefs=tracefs, freeze_limit=600.0)
    process = subprocess.Popen(
        [sys.executable, "-c", _AGENT, pickle.dumps((config, str(mounted))[0]).hex(), str(mounted)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        source = PhysicalSource(settings_of(authority, port))
        failed: list[FarshoreError] = []

        def cut() -> None:
            try:
                source.cut("farshore-m-1-1", want=Consistency.FILE_SYSTEM)
            except FarshoreError as error:
                failed.append(error)

        asking = threading.Thread(target=cut)
        asking.start()
        assert process.stdout.readline() == "frozen\n"
        assert not written(mounted, 0.3)
        process.kill()
        process.wait()
        assert written(mounted)
        asking.join(timeout=60)
        assert [error.code for error in failed] == [Code.SOURCE_UNREACHABLE]
    finally:
        process.kill()
        process.wait()
        machine.thaw()
        instance = tracefs / "instances" / f"farshore-{config.name}"
        with contextlib.suppress(FileNotFoundError):
            instance.rmdir()


def test_a_late_thaw_costs_the_label_and_not_the_point(machine, mounted, start, tmp_path, monkeypatch):
    (mounted / "a").write_bytes(os.urandom(1 << 20))
    running = start(machine.loops, freeze_limit=1.5, freeze_copy_seconds=0.2)
    bench = Bench(machine, running, tmp_path)
    try:
        assert bench.point().cut.consistency is Consistency.FILE_SYSTEM
        inner = running.agent._freezer.frozen

        @contextlib.contextmanager
        def hanging(mounts, limit):
            with inner(mounts, limit) as result:
                yield result
                assert written(mounted), "the watchdog did not thaw"

        monkeypatch.setattr(running.agent._freezer, "frozen", hanging)
        made = bench.point()
        assert made.cut.consistency is Consistency.CRASH
        assert "the watchdog thawed" in str(made.cut.evidence["less_because"])
        with bench.mounted(made, "d") as folder:
            assert (folder / "a").stat().st_size == 1 << 20
        monkeypatch.setattr(running.agent._freezer, "frozen", inner)
        # What was written around the voided freeze is visited again: nothing is missing in the next point.
        assert bench.point().missed == {}
    finally:
        machine.thaw()
        bench.close()


def test_a_barrier_that_was_thawed_before_its_mark_is_no_barrier(
    machine, mounted, start, tmp_path, monkeypatch
):
    running = start(machine.loops, freeze_limit=1.0, freeze_copy_seconds=0.1)
    bench = Bench(machine, running, tmp_path)
    mark, times = Cutter._mark, iter(range(1000))

    def late(self, cut, snapshots):
        if next(times) == 0:
            assert written(mounted), "the watchdog did not thaw"
        mark(self, cut, snapshots)

    monkeypatch.setattr(Cutter, "_mark", late)
    try:
        made = bench.point()
        assert made.missed == {}
        assert made.cut.consistency is Consistency.FILE_SYSTEM
        assert int(made.cut.evidence["rounds"]) >= 2
    finally:
        machine.thaw()
        bench.close()


# -- hooks --------------------------------------------------------------------------------------------------------


def shell(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def test_hooks_run_around_the_barrier_and_the_label_says_so(machine, mounted, start, tmp_path):
    told = tmp_path / "told"
    hook = Hook(
        "db", shell(f"echo $FARSHORE_PHASE $FARSHORE_CUT >> {told}"), shell(f"echo $FARSHORE_PHASE >> {told}")
    )
    bench = Bench(machine, start(machine.loops, hooks=(hook,)), tmp_path)
    try:
        made = bench.point(Consistency.APPLICATION)
        assert made.missed == {}
        assert made.cut.consistency is Consistency.APPLICATION
        lines = told.read_text().split("\n")
        assert lines[0] == f"before {made.cut.name}"
        assert lines[1] == "after"
        assert bench.point(Consistency.FILE_SYSTEM).cut.consistency is Consistency.FILE_SYSTEM
        assert bench.point(Consistency.CRASH).cut.consistency is Consistency.CRASH
        assert told.read_text().split("\n") == lines, "hooks belong to application-consistent points only"
    finally:
        machine.thaw()
        bench.close()


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_failed_hook_costs_the_label_and_what_comes_after_still_runs(
    machine, mounted, start, tmp_path, side
):
    told = tmp_path / "told"
    good = Hook("good", shell("true"), shell(f"echo good >> {told}"))
    bad = Hook("bad", shell("exit 3" if side == "before" else "true"), shell(f"echo bad >> {told}; exit 4"))
    bench = Bench(machine, start(machine.loops, hooks=(good, bad)), tmp_path)
    try:
        made = bench.point(Consistency.APPLICATION)
        assert made.cut.consistency is Consistency.FILE_SYSTEM
        assert f"bad {side}: ended with" in str(made.cut.evidence["less_because"])
        lines = told.read_text().split()
        assert lines[:2] == ["bad", "good"]
        assert lines.count("bad") == lines.count("good")
    finally:
        machine.thaw()
        bench.close()


def test_a_hook_that_hangs_is_killed_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    hook = Hook("slow", shell(f"sleep 600 & echo $! > {pid}; wait"), (), timeout=0.5)
    begun, results = hooks.before([hook, Hook("never", shell("true"), ())], "c")
    assert begun == [hook]
    assert "killed" in results[0].error
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid.read_text().strip()}"):
        if Path(f"/proc/{pid.read_text().strip()}/stat").read_text().split()[2] == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hook_that_is_not_there_is_told():
    _, results = hooks.before([Hook("gone", ("/nowhere/at/all",), ())], "c")
    assert "cannot be run" in results[0].error


def test_the_mutant_that_forgets_to_thaw_is_seen(machine, mounted, freezer, monkeypatch):
    """The test of the tests: without any thaw, `written` says so."""
    monkeypatch.setattr(freeze.watchdog, "thaw", lambda descriptors: None)
    with freezer.frozen(machine.mounts(), 600):
        pass
    monkeypatch.undo()
    assert not written(mounted, 0.5)
    machine.thaw()
    assert written(mounted)
