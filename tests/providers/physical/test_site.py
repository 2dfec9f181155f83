"""What the site says of its servers, and what it refuses to promise."""

from __future__ import annotations

import copy

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.physical.adapter import PhysicalSite
from farshore.providers.physical.readiness import assess
from farshore.providers.ports import Power, Severity, SourceSite

MACHINE = {
    "protocol": 1,
    "name": "db1",
    "abilities": {"hooks": 1},
    "disks": [
        {
            "key": "root",
            "path": "/dev/sda",
            "boot": True,
            "size": 1 << 30,
            "tracking": "trace",
            "tracking_reason": "",
            "mounts": [["/", "ext4", "rw"]],
            "error": "",
        }
    ],
}


def findings(seed_folder: bool = True, **changes) -> list[tuple[Severity, str]]:
    machine = copy.deepcopy(MACHINE)
    machine["disks"][0].update({key: value for key, value in changes.items() if key in machine["disks"][0]})
    machine.update({key: value for key, value in changes.items() if key in machine})
    _, found = assess(machine, seed_folder=seed_folder)
    return [(finding.severity, finding.message) for finding in found]


@pytest.mark.parametrize(
    ("changes", "severity", "text"),
    [
        ({"protocol": 2}, Severity.ERROR, "speaks protocol 2"),
        ({"error": "/dev/sda is not there"}, Severity.ERROR, "is not there"),
        ({"tracking": "hash"}, Severity.ERROR, "cannot be replicated while it is written"),
        ({"tracking": "hash", "mounts": []}, Severity.WARNING, "reads the whole disk"),
        ({"boot": False}, Severity.ERROR, "exactly one disk"),
        ({"mounts": [["/boot/efi", "vfat", "rw"]]}, Severity.WARNING, "cannot be frozen"),
        ({"abilities": {"hooks": 0}}, Severity.INFO, "no hooks"),
        ({"seed_folder": False}, Severity.WARNING, "has to fit the agent's spool"),
    ],
)
def test_what_stands_in_the_way_is_found(changes, severity, text):
    found = findings(**changes)
    assert len(found) == 1
    assert found[0][0] is severity
    assert text in found[0][1]


def test_a_good_machine_has_no_findings():
    assert findings() == []


async def test_a_server_is_found_by_name_and_id(machine, start):
    machine.add("d", 8)
    running = start(machine.loops)
    site: SourceSite = PhysicalSite({"db1": running.settings})
    seen = await site.inspect("db1")
    assert seen.power is Power.ON
    assert seen.tracking
    assert [disk.size for disk in seen.disks] == [8 << 20]
    if seen.id:
        assert await site.inspect(f"db1#{seen.id}") == seen
    with pytest.raises(FarshoreError) as caught:
        await site.inspect("db1#00000000-0000-0000-0000-000000000001")
    assert caught.value.code is Code.SOURCE_MACHINE_NOT_FOUND
    with pytest.raises(FarshoreError) as caught:
        await site.inspect("db2")
    assert caught.value.code is Code.SOURCE_MACHINE_NOT_FOUND
    await site.enable_tracking("db1")
    source = site.open_source("db1", "db1")
    source.cut("farshore-db1-1-1", want=Consistency.CRASH)
    source.close()
    assert await site.reap("db1") == ["farshore-db1-1-1"]
    await site.close()


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (lambda site: site.prove_off("db1"), Code.FENCE_NOT_PROVEN),
        (lambda site: site.power_on("db1"), Code.OPERATION_NOT_ALLOWED),
        (
            lambda site: site.shut_down("db1", guest_timeout=1, force=True, checkpoint=lambda _: None),
            Code.SHUTDOWN_FAILED,
        ),
    ],
)
async def test_nothing_is_promised_that_software_on_the_server_cannot_do(ask, code):
    with pytest.raises(FarshoreError) as caught:
        await ask(PhysicalSite({}))
    assert caught.value.code is code
