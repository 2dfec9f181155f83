"""Cuts over several disks, resync reasons, first copies that do not fit, reads that break: through the engine's port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.physical.agent.core import Agent
from farshore.providers.physical.agent.cuts import Cutter
from farshore.providers.physical.agent.service import Server
from farshore.providers.physical.source import PhysicalSource
from farshore.replication.ports import Extent, FullCopyNeeded

from .conftest import MIB, settings_of
from .points import Bench
from .test_points import writing

TWO = 28  # MiB of a disk


@pytest.fixture
def two(machine):
    """Two mounted disks."""
    for key in ("a", "b"):
        machine.add(key, TWO)
        machine.mkfs(key)
    return {key: machine.mount(key) for key in ("a", "b")}


@pytest.fixture
def bench_of(machine, start, tmp_path):
    made: list[Bench] = []

    def begin(**more) -> Bench:
        made.append(Bench(machine, start(machine.loops, **more), tmp_path))
        return made[-1]

    yield begin
    machine.thaw()
    for bench in made:
        bench.close()


def test_all_disks_are_of_one_instant(two, bench_of):
    """A writer counts up on the first disk, then on the second, each durable: b ≤ a ≤ b + 1 in every point."""
    bench = bench_of()
    ended, errors = threading.Event(), []

    def count() -> None:
        number = 0
        try:
            while not ended.wait(0.001):
                number += 1
                for key in ("a", "b"):
                    with (two[key] / "count").open("w") as file:
                        file.write(f"{number:010d}")
                        file.flush()
                        os.fsync(file.fileno())
        except OSError as error:
            errors.append(error)

    for folder in two.values():
        (folder / "count").write_text("0000000000")
    counting = threading.Thread(target=count)
    counting.start()
    seen: list[int] = []
    try:
        for _ in range(3):
            made = bench.point()
            assert made.missed == {}
            values = {}
            for key in ("a", "b"):
                with bench.mounted(made, key) as folder:
                    # Opening for writing truncates first: an empty file is the number being written.
                    text = (folder / "count").read_text()
                    values[key] = int(text) if text else None
            a, b = values["a"], values["b"]
            if a is not None and b is not None:
                assert b <= a <= b + 1
                seen.append(a)
    finally:
        ended.set()
        bench.machine.thaw()
        counting.join()
    assert not errors
    assert seen == sorted(seen)


def test_a_quiet_machine_ships_next_to_nothing_and_is_frozen_once(two, bench_of):
    bench = bench_of()
    bench.point()
    bench.point()
    made = bench.point()
    assert made.missed == {}
    assert made.cut.evidence["rounds"] == 1
    assert made.result.bytes_shipped <= 8 * 65536


def test_a_first_copy_larger_than_the_spool_is_seeded(two, bench_of, tmp_path):
    seeds = tmp_path / "seeds"
    bench = bench_of(spool_mib=8, freeze_copy_mib=2.0, settings={"seed_folder": seeds})
    (two["a"] / "big").write_bytes(os.urandom(9 * MIB))
    with writing(two["b"]) as writer:
        writer.wait(5)
        for number in range(3):
            made = bench.point()
            assert made.missed == {}, number
            writer.wait(5)
        (two["a"] / "more").write_bytes(os.urandom(10 * MIB))  # a delta that does not fit is seeded as well
        made = bench.point()
        assert made.missed == {}
        assert made.result.bytes_changed < 2 * TWO * MIB * 3 // 4  # not all over again
    assert list(seeds.iterdir()) == []


def test_without_a_seed_folder_the_first_copy_says_what_is_missing(two, bench_of):
    bench = bench_of(spool_mib=4)
    with pytest.raises(FarshoreError, match="have to be kept, the spool holds") as caught:
        bench.point()
    assert caught.value.code is Code.SOURCE_NOT_ELIGIBLE
    assert "seed folder" in caught.value.info.recommended_action


def test_a_wrong_guess_of_the_base_costs_a_cycle_and_no_byte(two, bench_of):
    bench = bench_of()
    (two["a"] / "old").write_bytes(os.urandom(2 * MIB))
    bench.point()
    cut = bench.source.cut(
        "farshore-m-1-1", want=Consistency.FILE_SYSTEM
    )  # keeps what changed since the point
    overwrite(two["a"] / "old")
    with pytest.raises(FarshoreError, match="written since the cut") as caught:
        cut.read("a", 0, TWO * MIB)
    assert caught.value.code is Code.SOURCE_READ_FAILED
    cut.release()
    cut = bench.source.cut("farshore-m-1-2", want=Consistency.FILE_SYSTEM)  # keeps everything
    truth = bench.truth.images["a"]
    overwrite(two["a"] / "old")
    assert cut.read("a", 0, TWO * MIB) == truth
    cut.release()
    assert bench.point(resync=True).missed == {}


def overwrite(path: Path) -> None:
    """In place, durably."""
    with path.open("r+b") as file:
        file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


def test_a_new_worker_goes_on_with_what_the_agent_remembers(two, bench_of):
    bench = bench_of()
    bench.point()
    bench.point()
    bench.source = PhysicalSource(bench.running.settings, machine="m")
    (two["a"] / "x").write_bytes(os.urandom(MIB))
    made = bench.point()
    assert made.missed == {}
    assert not made.result.full
    assert made.cut.full == {}


def restarted(bench: Bench, *, clean: bool) -> None:
    """The agent ends and begins again, with the same configuration."""
    old = bench.running
    old.stop(clean=clean)
    agent = Agent(old.agent.config, mounts=bench.machine.mounts)
    server = Server(old.agent.config, agent)
    old.agent, old.server = agent, server
    old.thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    old.thread.start()
    old.settings = replace(old.settings, port=server.server_address[1])
    bench.truth.__init__(bench.machine, agent._freezer)
    bench.source = PhysicalSource(old.settings, machine="m")


@pytest.mark.parametrize(("clean", "full"), [(True, False), (False, True)])
def test_restarts_of_the_agent(two, bench_of, clean, full):
    bench = bench_of()
    bench.point()
    bench.point()
    (two["a"] / "x").write_bytes(os.urandom(MIB))
    restarted(bench, clean=clean)
    (two["b"] / "y").write_bytes(os.urandom(MIB))
    made = bench.point()
    assert made.missed == {}
    assert made.result.full is full
    if full:
        assert "the agent was stopped or the machine was started anew" in made.result.reason
        again = bench.point()
        assert again.missed == {}
        assert not again.result.full


def test_lost_events_mean_a_full_comparison_with_the_reason(two, bench_of):
    bench = bench_of(trace_buffer_kib=4)
    bench.point()
    bench.point()
    tracker = bench.running.agent._trackers["trace"]
    with tracker._lock:
        for number in range(400):
            with (two["a"] / f"s{number}").open("wb") as file:
                file.write(b"x" * 5000)
                os.fsync(file.fileno())
    made = bench.point()
    assert made.missed == {}
    assert "trace events were lost" in made.result.reason
    assert not bench.point().result.full


def test_a_resized_disk_is_compared_in_full(two, machine, bench_of):
    bench = bench_of()
    bench.point()
    with machine.images["b"].open("r+b") as file:
        file.truncate(36 * MIB)
    subprocess.run(["losetup", "-c", machine.loops["b"]], check=True)
    made = bench.point()
    assert made.missed == {}
    assert "resized" in made.result.reason
    assert machine.loops["a"] not in made.result.reason


def test_a_disk_without_a_file_system_is_crash_consistent_at_most(machine, bench_of):
    machine.add("raw", 8)
    path = machine.loops["raw"]
    bench = bench_of()
    with open(path, "r+b", buffering=0) as file:
        file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    made = bench.point()
    assert made.missed == {}
    assert made.cut.consistency is Consistency.CRASH
    assert "not mounted" in str(made.cut.evidence["less_because"])


# -- without tracking ---------------------------------------------------------------------------------------------


def test_by_hashes_a_quiet_disk_is_replicated_and_survives_restarts(machine, bench_of):
    machine.add("d", 16)
    machine.mkfs("d")
    bench = bench_of(tracking="hash")
    assert bench.point().missed == {}
    folder = machine.mount("d")
    (folder / "x").write_bytes(os.urandom(MIB))
    machine.unmount(folder)
    made = bench.point()
    assert made.missed == {}
    assert not made.result.full
    assert 0 < made.result.bytes_changed < 8 * MIB
    restarted(bench, clean=False)
    made = bench.point()
    assert made.missed == {}
    assert made.result.bytes_changed == 0
    shutil.rmtree(bench.running.agent.config.state / "hashes")
    (bench.running.agent.config.state / "hashes").mkdir()
    made = bench.point()
    assert made.missed == {}
    assert "the hashes of the last point are gone" in made.result.reason


def test_by_hashes_a_disk_that_is_written_meanwhile_is_refused(two, bench_of, monkeypatch):
    bench = bench_of(tracking="hash", rounds=2)
    fill = Cutter._fill

    def disturbed(self, cut, disk):
        with (two["a"] / "x").open("wb") as file:
            file.write(os.urandom(65536))
            os.fsync(file.fileno())
        return fill(self, cut, disk)

    monkeypatch.setattr(Cutter, "_fill", disturbed)
    with pytest.raises(FarshoreError, match="written faster") as caught:
        bench.point()
    assert caught.value.code is Code.SNAPSHOT_FAILED


# -- epochs -------------------------------------------------------------------------------------------------------


def test_cuts_of_the_dead_are_reaped_and_those_of_a_successor_are_not(two, bench_of):
    bench = bench_of()
    old = bench.source.cut("farshore-m-3-7", want=Consistency.CRASH)
    with pytest.raises(FarshoreError) as caught:
        bench.source.reap("farshore-m-2-9")
    assert caught.value.code is Code.SOURCE_BUSY
    with pytest.raises(FarshoreError) as caught:
        bench.source.cut("farshore-m-2-9", want=Consistency.CRASH)
    assert caught.value.code is Code.SOURCE_BUSY
    assert len(old.read("a", 0, 4096)) == 4096
    assert bench.source.reap("farshore-m-3-8") == ["farshore-m-3-7"]
    with pytest.raises(FarshoreError, match="There is no cut") as caught:
        old.read("a", 0, 4096)
    assert caught.value.code is Code.SOURCE_READ_FAILED
    old.release()
    old.release()


# -- the network --------------------------------------------------------------------------------------------------


class Proxy:
    """Passes bytes on, and cuts each connection after so many bytes from the agent."""

    def __init__(self, port: int) -> None:
        self.after: int | None = None
        self.cuts = 0
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        done = 0
        try:
            while data := source.recv(65536):
                sink.sendall(data)
                done += len(data)
                if counted and self.after is not None and done > self.after:
                    self.cuts += 1
                    break
        except OSError:
            pass
        for one in (source, sink):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self._server.close()


def through(bench: Bench, authority: Path) -> Proxy:
    proxy = Proxy(bench.running.settings.port)
    bench.source = PhysicalSource(settings_of(authority, proxy.port, read_tries=4), machine="m")
    return proxy


def test_reads_go_on_where_a_connection_broke(two, bench_of, authority):
    (two["a"] / "big").write_bytes(os.urandom(9 * MIB))
    bench = bench_of()
    proxy = through(bench, authority)
    try:
        proxy.after = 700_000
        made = bench.point()
        assert made.missed == {}
        assert proxy.cuts > 10
    finally:
        proxy.close()


def test_an_agent_that_stays_away_is_unreachable(two, bench_of, authority):
    bench = bench_of()
    proxy = through(bench, authority)
    cut = bench.source.cut("farshore-m-1-1", want=Consistency.CRASH)
    proxy.after = 0
    proxy.close()
    with pytest.raises(FarshoreError) as caught:
        cut.read("a", 0, TWO * MIB)
    assert caught.value.code is Code.SOURCE_UNREACHABLE
    with pytest.raises(FarshoreError) as caught:
        cut.release()
    assert caught.value.code is Code.SOURCE_UNREACHABLE


def test_what_a_cut_says_of_itself(two, bench_of):
    bench = bench_of()
    cut = bench.source.cut("farshore-m-1-1", want=Consistency.FILE_SYSTEM)
    assert [disk.key for disk in cut.disks] == ["a", "b"]
    assert [disk.boot for disk in cut.disks] == [True, False]
    assert not cut.powered_off
    assert list(cut.changed("a", None)) == [Extent(0, TWO * MIB)]
    state = cut.disks[0]
    with pytest.raises(FullCopyNeeded, match="resized or replaced"):
        cut.changed("a", replace(state, identity="other"))
    with pytest.raises(FullCopyNeeded, match="no earlier state"):
        cut.changed("a", replace(state, tracker=None))
    with pytest.raises(FullCopyNeeded, match="tracked by cbt then"):
        cut.changed("a", replace(state, tracker="cbt:1:2"))
    assert list(cut.changed("a", state)) == []
    assert cut.read("a", 512, 1024) == cut.read("a", 0, 4096)[512:1536]
    assert len(cut.read("b", TWO * MIB - 512, 512)) == 512
    with pytest.raises(ValueError, match="outside"):
        cut.read("a", TWO * MIB, 512)
    cut.release()
