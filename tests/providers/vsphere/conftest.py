"""A laboratory vCenter in this process, a site that talks to it, and a replica that a cut is copied into."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from farshore.domain.points import Consistency
from farshore.lab.vcenter import DEFAULT_PASSWORD, DEFAULT_USER, VCenterControl
from farshore.lab.vcenter.service import LabVCenter
from farshore.lab.vcenter.settings import Settings
from farshore.providers.vsphere import VSphereSettings, VSphereSite
from farshore.providers.vsphere.snapshots import Snapshots

MIB = 1 << 20
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def vcenter(tmp_path_factory):
    """One for all tests of this folder: machines are per test."""
    with LabVCenter(tmp_path_factory.mktemp("vcenter")) as lab:
        yield lab


@pytest.fixture
def control(vcenter):
    """The test's hand inside the laboratory; what it changed is put back."""
    control = VCenterControl(vcenter.control_url)
    control.clear_requests()
    yield control
    control.clear_faults()
    control.allow_all()
    control.settings(**Settings().to_json())
    for kind in ("ds1", "ds2"):
        control.set_datastore(kind, "vmfs")


@pytest.fixture
def machine(control):
    """Creates machines; they are destroyed at the end."""
    made = []

    def create(*sizes, **fields):
        name = f"web{next(_numbers):03d}"
        control.create_vm(name, list(sizes) or [8 * MIB], **fields)
        made.append(name)
        return name

    yield create
    for name in made:
        if name in control.info()["machines"]:
            control.destroy_vm(name)


@pytest.fixture
def settings_of(vcenter):
    def make(**changes):
        defaults = {
            "host": "127.0.0.1",
            "port": vcenter.port,
            "user": DEFAULT_USER,
            "password": DEFAULT_PASSWORD,
            "ca_file": str(vcenter.ca_file),
            "poll": 1.0,
            "read_retry_delay": 0.01,
        }
        return VSphereSettings(**{**defaults, **changes})

    return make


@pytest.fixture
async def site_of(settings_of):
    sites = []

    def make(**changes):
        site = VSphereSite(settings_of(**changes))
        sites.append(site)
        return site

    yield make
    for site in sites:
        await site.close()


@pytest.fixture
def site(site_of):
    return site_of()


def leave(site, vm, *snapshots):
    """Snapshots that a dead worker of ours left. Blocking."""
    entry = site._inventory.find(vm)
    for name in snapshots:
        Snapshots(site._client, entry).create(
            name, "Farshore replicates m; removed by itself.", quiesce=False
        )


class Replica:
    """What the engine would have: bytes and the committed state of each disk."""

    def __init__(self, source, name="m", epoch=1):
        self.source, self.name, self.epoch = source, name, epoch
        self.disks: dict[str, bytearray] = {}
        self.since: dict[str, object] = {}
        self.cycle = 0
        self.shipped = 0

    def cut(self, want=Consistency.CRASH):
        self.cycle += 1
        return self.source.cut(f"farshore-{self.name}-{self.epoch}-{self.cycle}", want=want)

    def copy(self, cut):
        """Copy what changed; returns the bytes read. The states count as committed."""
        total = 0
        states = {}
        for state in cut.disks:
            disk = self.disks.setdefault(state.key, bytearray(state.size))
            for extent in cut.changed(state.key, self.since.get(state.key)):
                end = extent.start + extent.length
                disk[extent.start : end] = cut.read(state.key, extent.start, extent.length)
                total += extent.length
            states[state.key] = state
        self.since = states
        return total

    def digest(self, key):
        return hashlib.sha256(self.disks[key]).hexdigest()

    def cycle_and_check(self, control, vm, want=Consistency.CRASH):
        """One healthy cycle: cut, copy, compare with what the laboratory froze, release."""
        cut = self.cut(want)
        try:
            total = self.copy(cut)
            for state in cut.disks:
                assert self.digest(state.key) == control.sha256(vm, int(state.key), cut.name), state
        finally:
            cut.release()
        return total


@pytest.fixture
async def replica_of(site):
    """A replica of a machine with change tracking on."""

    async def make(vm, **names):
        await site.enable_tracking(vm)
        return Replica(site.open_source("m", vm), **names)

    return make
