"""A leg of a group over live QEMU guests that play ping-pong: what B has, A wrote before, in every group point."""

from __future__ import annotations

import json

import pytest

from farshore.providers.nbd import QemuSettings, QemuSource
from farshore.replication.engine import Groups
from farshore.replication.filestore import FileReplicaStore
from farshore.replication.group_leg import run_group_leg
from farshore.replication.loop import LegPlan

from ..providers.nbd import guest as guests  # noqa: TID252  tests are no installed package
from ..providers.nbd.quiet import MIB  # noqa: TID252  tests are no installed package
from ..providers.nbd.test_live import ping_pong  # noqa: TID252  tests are no installed package

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(600)]


@pytest.fixture
def boot(tmp_path):
    """A function that starts live guests; they are stopped at the end."""
    started: list[guests.Guest] = []

    def start(*args, **kwargs) -> guests.Guest:
        started.append(guests.Guest(tmp_path, *args, **kwargs))
        return started[-1]

    yield start
    for running in started:
        running.stop()


def test_a_leg_of_a_group_of_guests_makes_points_of_one_instant(tmp_path, boot):
    guests.need()
    pair = ping_pong(tmp_path, boot, guests.initramfs(tmp_path / "plain.gz"))
    sources = {
        role: QemuSource(
            QemuSettings(qmp=guest.qmp, fleece_folder=guest.folder, nbd=guest.nbd, fleece_free=64 * MIB),
            machine=role,
        )
        for role, guest in zip("AB", pair, strict=True)
    }
    store = FileReplicaStore(tmp_path / "store", durable=False)
    plan = LegPlan("pair", "test", interval_s=0.5, until_s=6.0, scrub_every_s=None)
    result = run_group_leg(sources, store, plan, deadline_s=20.0)
    assert result.points >= 3 and not result.unusable, (result.missed_by, result.last_missed)
    groups = Groups(store)
    points = groups.points("pair")
    assert len(points) == result.points
    seen: list[tuple[int, int]] = []
    for point in points:
        counters: list[int] = []
        for member in point.members:
            reader = store.read_point(member.machine, member.point, "disk0")
            path = tmp_path / f"{member.machine}-{point.number}.raw"
            path.write_bytes(reader.read(0, reader.size))
            counters.append(guests.raw_counter(path))
        first, second = counters
        assert 0 < second <= first <= second + 1, json.dumps([point.id, counters])
        seen.append((first, second))
    assert seen[0] < seen[-1], "the guests stood still"
    pair[0].advance()  # and they still run
    pair[1].advance()
