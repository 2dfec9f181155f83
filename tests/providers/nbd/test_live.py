"""Live guests: every point mounts and is consistent across the disks of a machine and the machines of a group.

The guest's writer counts on ext4 first (synced) and on a raw disk second, so that b ≤ a ≤ b + 1 at every instant. Two
guests play ping-pong: what B has, A wrote before. The negative controls show that the checkers can fail.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.nbd import QemuSettings, QemuSource
from farshore.providers.nbd.qmp import Monitor
from farshore.replication.engine import Member, Stopped, cut_together

from . import guest as guests
from .quiet import MIB
from .through import Site

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(600)]


def settings(guest: guests.Guest, **more) -> QemuSettings:
    values = {"qmp": guest.qmp, "fleece_folder": guest.folder, "nbd": guest.nbd, "fleece_free": 64 * MIB}
    return QemuSettings(**(values | more))


def counting(tmp_path, boot, initrd, **options) -> guests.Guest:
    disks = [
        guests.make_disk(tmp_path / "system.qcow2", "40M", ext4=True),
        guests.make_disk(tmp_path / "data.qcow2", "8M"),
    ]
    running = boot(initrd, "count", disks, **options)
    running.wait(lambda _: running.count() >= 3, "writer")
    return running


def consistent(files: dict[str, Path]) -> bool:
    first, second = guests.counters(files["disk0"], files["disk1"])
    return second <= first <= second + 1 and second > 0


def apart(guest: guests.Guest):
    """Instead of one transaction: each disk's own, with some writes between them."""

    def transactions(self, actions):
        for node in ("node0", "node1"):
            self(
                "transaction",
                actions=[a for a in actions if (a["data"].get("node") or a["data"].get("device")) == node],
            )
            guest.advance(4)

    return transactions


def mounted(boot, initrd, points: list[dict[str, Path]]) -> list[tuple[bool, int, int]]:
    """What a guest that boots with the disks of all these points sees."""
    disks = [points[0]["disk0"], points[0]["disk1"]] if len(points) == 1 else []
    if not disks:
        disks = [file for point in points for file in (point["disk0"], point["disk1"])]
    checker = boot(initrd, "verify", disks, image="raw", name="checker")
    found = re.compile(r"VERIFY (\w+) (\d*) (\d*)")
    checker.wait(
        lambda lines: len([line for line in lines if line.startswith("VERIFY")]) == len(points),
        "verification",
    )
    rows = [match for line in checker.lines if (match := found.match(line))]
    return [(row[1] == "mounted", int(row[2] or -1), int(row[3] or -1)) for row in rows]


def descriptors(guest: guests.Guest) -> int:
    """How many fleece files this QEMU holds."""
    count = 0
    for entry in Path(f"/proc/{guest.process.pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        count += "(deleted)" in target and str(guest.folder) in target
    return count


def test_every_point_of_a_live_guest_mounts_and_is_of_one_instant(tmp_path, boot, initrd, monkeypatch):
    guest = counting(tmp_path, boot, initrd)
    site = Site(tmp_path, QemuSource(settings(guest), machine="vm"))
    results = []
    for _ in range(3):
        results.append(site.cycle())
        guest.advance(4)
    assert not any(result.full or result.release_error for result in results)
    points = [site.files(result) for result in results]
    assert all(consistent(files) for files in points)
    for (whole, first, second), number in zip(mounted(boot, initrd, points), range(9), strict=False):
        assert whole and 0 < second <= first <= second + 1, number
    assert descriptors(guest) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "transaction", apart(guest))
        skewed = site.files(site.cycle())
    assert not consistent(skewed), "the checker cannot fail"
    guest.advance()  # it still runs


@pytest.mark.slow
def test_points_of_a_live_guest_stay_right_in_bad_weather(tmp_path, boot, initrd, monkeypatch):
    guest = counting(tmp_path, boot, initrd)
    site = Site(tmp_path, QemuSource(settings(guest, bitmaps=4), machine="vm"))
    choose = random.Random(11)
    kept = []
    happened: dict[str, int] = {}
    for _ in range(60):
        guest.advance(1)
        weather = choose.choice(["calm", "calm", "stopped", "dead", "job", "tracker", "release"])
        happened[weather] = happened.get(weather, 0) + 1
        full = False
        try:
            if weather == "stopped":
                site.cycle(should_stop=lambda: True)
            elif weather == "dead":  # after the cut, before anything else
                site.witness.source.cut(site.next_name(), want=Consistency.CRASH)
                continue
            elif weather == "job":

                def lose(progress):
                    if progress.stage == "looking for changes":
                        with Monitor(guest.qmp, subject="vm", timeout=30) as monitor:
                            for job in monitor("query-block-jobs"):
                                monitor("block-job-cancel", device=job["device"])

                site.cycle(progress=lose)
                raise AssertionError("a cut without its job was committed")
            elif weather == "tracker":
                with Monitor(guest.qmp, subject="vm", timeout=30) as monitor:
                    for node in monitor("query-named-block-nodes", flat=True):
                        for bitmap in node.get("dirty-bitmaps", ()):
                            if node["node-name"] == "node0" and "name" in bitmap:
                                monitor("block-dirty-bitmap-remove", node="node0", name=bitmap["name"])
                full = bool(kept)
            elif weather == "release":
                with monkeypatch.context() as patch:

                    def fail(self):
                        raise FarshoreError(Code.SOURCE_UNREACHABLE, "gone")

                    from farshore.providers.nbd.cut import QemuCut

                    patch.setattr(QemuCut, "release", fail)
                    kept.append(site.cycle())
                continue
            result = site.cycle()
        except Stopped:
            continue
        except FarshoreError:
            if weather != "job":
                raise
            continue
        assert result.full == full or result.reason, (weather, result.reason)
        kept.append(result)
    assert len(happened) == 6 and len(kept) > 20, happened
    points = [site.files(result) for result in kept]
    assert all(consistent(files) for files in points)
    few = [points[index] for index in sorted(choose.sample(range(len(points)), 8))]
    assert all(whole and 0 < b <= a <= b + 1 for whole, a, b in mounted(boot, initrd, few))
    site.witness.source.reap()
    assert descriptors(guest) == 0


# -- groups ----------------------------------------------------------------------------------------------------------


def ping_pong(tmp_path, boot, initrd) -> list[guests.Guest]:
    link = f"path={tmp_path / 'link'}"
    pair = []
    for role, side in (("A", f"socket,id=link,{link},server=on,wait=off"), ("B", f"socket,id=link,{link}")):
        disk = guests.make_disk(tmp_path / f"{role}.qcow2", "4M")
        extra = ["-chardev", side, "-serial", "chardev:link"]
        pair.append(boot(initrd, role, [disk], extra=extra, name=role))
        until = time.monotonic() + 30
        while not (tmp_path / "link").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
    pair[0].wait(lambda _: pair[0].count() >= 10, "ping-pong")
    return pair


class Group:
    def __init__(self, tmp_path, pair) -> None:
        self.sites = [
            Site(tmp_path / str(number), QemuSource(settings(guest), machine=f"vm{number}"), f"vm{number}")
            for number, guest in enumerate(pair)
        ]

    def cycle(self, cut) -> tuple[int, int]:
        """Cut by `cut`, copy and commit every member, and return both counters."""
        members = [Member(site.witness.source, site.next_name()) for site in self.sites]
        for site, ready in zip(self.sites, cut(members), strict=True):
            site.witness.ready = ready
        counters = []
        for site in self.sites:
            files = site.files(site.cycle())
            counters.append(guests.raw_counter(files["disk0"]))
        return counters[0], counters[1]


def together(members):
    return list(cut_together(members, want=Consistency.CRASH, deadline=20.0).cuts.values())


def one_after_the_other(guest):
    def cut(members):
        found = []
        for member in members:
            found.append(member.source.cut(member.name, want=Consistency.CRASH))
            guest.advance(4)
        return found

    return cut


def status(guest: guests.Guest) -> str:
    with Monitor(guest.qmp, subject="vm", timeout=30) as monitor:
        return monitor("query-status")["status"]


def test_points_of_a_group_are_of_one_instant(tmp_path, boot, initrd):
    pair = ping_pong(tmp_path, boot, initrd)
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    group = Group(tmp_path, pair)
    for _ in range(3):
        pair[0].advance(3)
        first, second = group.cycle(together)
        assert 0 < second <= first <= second + 1
    first, second = group.cycle(one_after_the_other(pair[0]))
    assert second > first, "the checker cannot fail"

    # A member that stops too slowly: no cut, everybody runs, nothing is left.
    class Slow:
        cannot_hold = ""

        def __init__(self, source) -> None:
            self.source = source

        def prepare(self, name, *, want):
            prepared = self.source.prepare(name, want=want)
            hold = prepared.hold

            def slowly():
                hold()
                time.sleep(1.2)  # this member's slowness is what is tested

            prepared.hold = slowly
            return prepared

    members = [Member(site.witness.source, site.next_name()) for site in group.sites]
    members[1] = Member(Slow(members[1].source), members[1].name)
    with pytest.raises(FarshoreError, match="are allowed") as failed:
        cut_together(members, want=Consistency.CRASH, deadline=1.0)
    assert failed.value.code is Code.SNAPSHOT_FAILED
    assert [status(guest) for guest in pair] == ["running", "running"]
    # A member that is held longer than it may be resumes by itself; that voids the cut of all.
    hasty = QemuSource(settings(pair[0], hold_limit=0.3), machine="vm0")
    members = [Member(hasty, group.sites[0].next_name()), members[1]]
    with pytest.raises(FarshoreError, match="missed the instant"):
        cut_together(members, want=Consistency.CRASH, deadline=20.0)
    assert [status(guest) for guest in pair] == ["running", "running"]
    for site in group.sites:
        assert site.witness.source.reap() == []
    pair[0].advance()


@pytest.mark.slow
def test_a_guest_that_shut_down_gives_a_final_point(tmp_path, boot, initrd):
    disks = [
        guests.make_disk(tmp_path / "s.qcow2", "40M", ext4=True),
        guests.make_disk(tmp_path / "d.qcow2", "4M"),
    ]
    guest = boot(initrd, "verify", disks, extra=["-no-shutdown"])
    site = Site(tmp_path, QemuSource(settings(guest), machine="vm"))
    guest.wait(lambda lines: any(line.startswith("VERIFY") for line in lines), "the guest's last words")
    until = time.monotonic() + guests.PATIENCE
    while status(guest) != "shutdown":
        assert time.monotonic() < until
        time.sleep(0.2)
    result = site.cycle(final=True)
    assert result.point.final
    site.files(result)


@pytest.mark.slow
def test_a_guest_runs_again_after_its_worker_was_killed_while_it_was_held(tmp_path, boot, initrd):
    guest = counting(tmp_path, boot, initrd)
    script = """
        import os, signal, sys
        from pathlib import Path
        from farshore.domain.points import Consistency
        from farshore.providers.nbd import QemuSettings, QemuSource
        qmp, folder, nbd = sys.argv[1:]
        source = QemuSource(QemuSettings(qmp=Path(qmp), fleece_folder=Path(folder), nbd=nbd, fleece_free=1, hold_limit=600), machine="vm")
        prepared = source.prepare("farshore-vm-1-1", want=Consistency.CRASH)
        prepared.hold()
        print(prepared._holder.run("query-status")["status"], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    worker = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(guest.qmp), str(tmp_path), guest.nbd],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert worker.stdout.strip() == "paused" and worker.returncode == -9, worker.stderr
    guest.advance(3)
    source = QemuSource(settings(guest), machine="vm")
    assert source.reap() == ["farshore-vm-1-1"]
    source.cut("farshore-vm-1-2", want=Consistency.CRASH).release()
    assert descriptors(guest) == 0
    # Worker and guardian dead at once: the next worker lets it run.
    with Monitor(guest.qmp, subject="vm", timeout=30) as monitor:
        monitor("object-add", qom_type="throttle-group", id="farshore-held")
        monitor("stop")
    source.reap()
    assert status(guest) == "running"
    # Somebody else's stop is none of our business.
    with Monitor(guest.qmp, subject="vm", timeout=30) as monitor:
        monitor("stop")
    source.reap()
    assert status(guest) == "paused"
