"""Freeze and thaw through the guest agent: the label says what was achieved, and no guest stays frozen."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from farshore.domain.points import Consistency
from farshore.providers.nbd import QemuSource
from farshore.providers.nbd.keeper import Keeper, KeeperFailed
from farshore.providers.nbd.source import Prepared

from . import guest as guests
from .quiet import MIB, name
from .test_live import settings
from .through import Site

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(600)]

WORKER = """
    import os, signal, sys
    from pathlib import Path
    from farshore.providers.nbd.keeper import Keeper
    keeper = Keeper("agent", Path(sys.argv[1]))
    keeper.arm(600)
    print(keeper.run("guest-fsfreeze-freeze", answer=60), keeper.run("guest-fsfreeze-status"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def agent_initrd(tmp_path_factory):
    guests.need(agent=True)
    return guests.initramfs(tmp_path_factory.mktemp("initramfs") / "agent.gz", agent=True)


def asked(guest) -> str:
    keeper = Keeper("agent", guest.agent)
    try:
        return str(keeper.run("guest-fsfreeze-status", answer=30))
    finally:
        keeper.close()


def until_thawed(guest) -> None:
    """By somebody else: this only looks."""
    until = time.monotonic() + 60
    while True:
        try:
            if asked(guest) == "thawed":
                return
        except KeeperFailed:
            pass  # the guardian holds the agent
        assert time.monotonic() < until, "the guest stays frozen"
        time.sleep(0.1)


@pytest.mark.slow
def test_app_consistent_points_start_clean_and_no_guest_stays_frozen(
    tmp_path, boot, agent_initrd, monkeypatch
):
    disk = guests.make_disk(tmp_path / "database.qcow2", "40M", ext4=True)
    guest = boot(agent_initrd, "sql", [disk], agent=True)
    guest.wait(lambda _: guest.count() >= 3, "writer")
    source = QemuSource(settings(guest, guest_agent=guest.agent, hooks=True, freeze_limit=60), machine="vm")
    site = Site(tmp_path, source)

    def point(want: Consistency):
        guest.advance(2)
        result = site.cycle(want)
        return result, site.files(result)["disk0"]

    points = [point(Consistency.APPLICATION) for _ in range(3)]
    points.append(point(Consistency.CRASH))
    labels = [result.manifest.consistency for result, _ in points]
    assert labels == [Consistency.APPLICATION] * 3 + [Consistency.CRASH]
    assert len([line for line in guest.lines if line.startswith("HOOK")]) == 6
    checker = boot(agent_initrd, "verifysql", [file for _, file in points], image="raw", name="checker")
    checker.wait(lambda lines: len([x for x in lines if x.startswith("SQL")]) == 4, "verification")
    found = [
        re.match(r"SQL wal=(\d+) ok (\d+) +unfinished=(\d+)", line)
        for line in checker.lines
        if line.startswith("SQL")
    ]
    assert all(found), checker.lines
    rows = [[int(number) for number in row.groups()] for row in found if row]
    assert all(log == 0 and unfinished == 0 for log, _, unfinished in rows[:3]), rows
    assert rows[3][0] > 0 and rows[3][2] > 0, f"a crash point that starts clean shows nothing: {rows}"
    assert 0 < rows[0][1] < rows[1][1] < rows[2][1] < rows[3][1]

    # Without hooks it is the file systems that are consistent, and that is what the label says.
    plain = QemuSource(settings(guest, guest_agent=guest.agent, freeze_limit=60), machine="vm")
    cut = plain.cut(site.next_name(), want=Consistency.APPLICATION)
    assert cut.consistency is Consistency.FILE_SYSTEM
    cut.release()

    # Too late: the guardian thaws in time, the worker still sleeps, the label is void and the point is not.
    hasty = QemuSource(settings(guest, guest_agent=guest.agent, hooks=True, freeze_limit=5), machine="vm")
    take = Prepared.take
    with monkeypatch.context() as patch:

        def slowly(self):
            guest.advance(1)  # the writer goes on although this worker has not said so
            take(self)

        patch.setattr(Prepared, "take", slowly)
        cut = hasty.cut(site.next_name(), want=Consistency.APPLICATION)
    assert cut.consistency is Consistency.CRASH
    cut.release()

    # The worker is killed while the guest is frozen.
    worker = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(guest.agent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert worker.stdout.split() == ["1", "frozen"] and worker.returncode == -9, worker.stderr
    until_thawed(guest)
    guest.advance(1)

    # The guardian is killed while the guest is frozen: the worker thaws, and the label is void.
    keeper = Keeper("agent", guest.agent)
    keeper.arm(60)
    assert keeper.run("guest-fsfreeze-freeze", answer=60) == 1
    keeper._process.kill()
    assert keeper.undo(60) == (1, False)
    keeper.close()
    guest.advance(1)

    # Both are dead: the next worker thaws.
    keeper = Keeper("agent", guest.agent)
    assert keeper.run("guest-fsfreeze-freeze", answer=60) == 1
    keeper._process.kill()
    keeper.close()
    source.reap()
    guest.advance(1)


def test_an_agent_that_does_not_answer_costs_the_label_and_not_the_point(quiet):
    machine = quiet(MIB)
    deaf = QemuSource(machine.settings(guest_agent=machine.folder / "nobody", hooks=True), machine="vm")
    cut = deaf.cut(name(1), want=Consistency.APPLICATION)
    assert cut.consistency is Consistency.CRASH
    assert cut.read("disk0", 0, 512) == bytes(512)
    cut.release()


class FakeAgent(threading.Thread):
    """A guest agent that can be deaf to some commands. It counts what it was asked."""

    def __init__(self, path) -> None:
        import socket

        super().__init__(daemon=True)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen(1)
        self.frozen = False
        self.deaf: set[str] = set()
        self.asked: list[str] = []
        self.start()

    def run(self) -> None:
        import json

        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            with client, client.makefile("rwb", buffering=0) as stream:
                for line in stream:
                    message = json.loads(line.lstrip(b"\xff"))
                    command = message["execute"]
                    self.asked.append(command)
                    if command == "guest-fsfreeze-freeze":
                        self.frozen = True
                    if command in self.deaf:
                        continue
                    answer = {"return": {}}
                    start = b""
                    if command == "guest-sync-delimited":
                        answer, start = {"return": message["arguments"]["id"]}, b'{"stale": 1}\n\xff'
                    elif command == "guest-fsfreeze-status":
                        answer = {"return": "frozen" if self.frozen else "thawed"}
                    elif command == "guest-fsfreeze-thaw":
                        answer, self.frozen = {"return": int(self.frozen)}, False
                    elif command == "guest-fsfreeze-freeze":
                        answer = {"return": 1}
                    try:
                        stream.write(start + json.dumps(answer).encode() + b"\n")
                    except OSError:
                        break


def test_a_freeze_whose_answer_never_comes_is_thawed(quiet, tmp_path):
    machine = quiet(MIB)
    agent = FakeAgent(tmp_path / "agent")
    agent.deaf = {"guest-fsfreeze-freeze"}
    source = QemuSource(
        machine.settings(guest_agent=tmp_path / "agent", hooks=True, freeze_limit=0.5), machine="vm"
    )
    cut = source.cut(name(1), want=Consistency.APPLICATION)
    assert cut.consistency is Consistency.CRASH
    assert not agent.frozen and agent.asked.count("guest-fsfreeze-thaw") == 1
    cut.release()
    agent.server.close()


def test_the_thaw_comes_before_anything_is_exported_or_read(quiet, tmp_path, monkeypatch):
    machine = quiet(MIB)
    agent = FakeAgent(tmp_path / "agent")
    source = QemuSource(machine.settings(guest_agent=tmp_path / "agent", hooks=True), machine="vm")
    frozen: dict[str, bool] = {}
    for step in ("take", "finish"):
        real = getattr(Prepared, step)

        def noted(self, step=step, real=real):
            frozen[step] = agent.frozen
            return real(self)

        monkeypatch.setattr(Prepared, step, noted)
    cut = source.cut(name(1), want=Consistency.APPLICATION)
    assert frozen == {"take": True, "finish": False}
    assert cut.consistency is Consistency.APPLICATION
    cut.release()

    # Also when the instant fails.
    monkeypatch.setattr(Prepared, "take", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        source.cut(name(2), want=Consistency.APPLICATION)
    assert not agent.frozen
    assert machine.leftovers() == []
    agent.server.close()


def test_a_guest_that_somebody_else_froze_is_left_to_them(quiet, tmp_path):
    machine = quiet(MIB)
    agent = FakeAgent(tmp_path / "agent")
    agent.frozen = True
    source = QemuSource(machine.settings(guest_agent=tmp_path / "agent", hooks=True), machine="vm")
    cut = source.cut(name(1), want=Consistency.APPLICATION)
    assert cut.consistency is Consistency.CRASH and agent.frozen
    cut.release()
    agent.server.close()
