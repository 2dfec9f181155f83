"""Commands and outputs of the outside tools that no machine of ours can run: LVM thin, dm-era, VSS.

The outputs are written after the tools' documented formats and what the reference recorded, not taken from a run of ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from farshore.providers.physical.agent import disks, dmera, lvm, windows
from farshore.providers.physical.agent.blocks import BLOCK
from farshore.providers.physical.agent.cuts import Snapshots
from farshore.providers.physical.agent.disks import Device
from farshore.providers.physical.agent.hashing import HashTracker
from farshore.providers.physical.agent.shadowed import ShadowedDisk, VssTracker
from farshore.providers.physical.agent.tracking import ChangeSource, NotKnown
from farshore.providers.physical.agent.windows import Reason, ShadowCopies, ShadowFailed, VolumePlace

MIB = 1 << 20
DEVICE = Device("/dev/vg-a/data", 253, 3, 64 * MIB, "dm", "1")


# -- LVM ----------------------------------------------------------------------------------------------------------


class Lvm:
    """A volume group that answers as lvs, lvcreate and thin_delta do; it keeps what was asked."""

    def __init__(self) -> None:
        self.rows = {"pool": ("", "", "twi-aotz--"), "data": ("pool", "1", "Vwi-aotz--")}
        self.asked: list[list[str]] = []
        self.delta = ""

    def __call__(self, command) -> str:
        self.asked.append(list(command))
        match command[0]:
            case "lvs":
                return json.dumps({"report": [{"lv": [self.row(name) for name in self.named(command[-1])]}]})
            case "lvcreate":
                self.rows[command[3]] = ("pool", str(len(self.rows)), "Vwi---tz-k")
            case "lvremove":
                del self.rows[command[-1].split("/")[1]]
            case "thin_delta":
                return self.delta
        return ""

    def named(self, what: str) -> list[str]:
        return [what.rpartition("/")[2]] if what.startswith("/dev/") else list(self.rows)

    def row(self, name: str) -> dict[str, str]:
        pool, number, attributes = self.rows[name]
        return {
            "vg_name": "vg-a",
            "lv_name": name,
            "pool_lv": pool,
            "thin_id": number,
            "lv_path": f"/dev/vg-a/{name}",
            "data_percent": "12.50",
            "lv_attr": attributes,
        }


class NoReader:
    def __init__(self, device: Device) -> None:
        self.path = device.path

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(bytes(length))

    def close(self) -> None:
        return None


DELTA = """<superblock uuid="" time="3" transaction="4" data_block_size="128" nr_data_blocks="0">
  <diff left="2" right="3">
    <same begin="0" length="5"/>
    <different begin="5" length="2"/>
    <right_only begin="20" length="1"/>
    <left_only begin="30" length="3"/>
    <same begin="40" length="900"/>
  </diff>
</superblock>"""


def test_a_thin_volume_is_cut_by_a_snapshot_and_compared_with_the_former_one():
    pool = Lvm()
    tracker = lvm.ThinTracker(pool, NoReader)  # type: ignore[arg-type]
    tracker.watch({"d": DEVICE})
    first = tracker.mark()["d"]
    images = tracker.take("c1")
    assert images["d"].path == "/dev/vg-a/data-farshore-1"  # type: ignore[attr-defined]
    assert ["lvcreate", "--snapshot", "--name", "data-farshore-1", "vg-a/data"] in pool.asked
    assert ["lvchange", "--activate", "y", "--ignoreactivationskip", "vg-a/data-farshore-1"] in pool.asked
    second = tracker.mark()["d"]
    tracker.take("c2")
    pool.delta = DELTA
    assert list(tracker.changed("d", first, second).runs()) == [
        (5 * BLOCK, 2 * BLOCK),
        (20 * BLOCK, BLOCK),
        (30 * BLOCK, 3 * BLOCK),
    ]
    assert pool.asked[-3:] == [
        ["dmsetup", "message", "/dev/mapper/vg--a-pool-tpool", "0", "reserve_metadata_snap"],
        ["thin_delta", "-m", "--snap1", "2", "--snap2", "3", "/dev/mapper/vg--a-pool_tmeta"],
        ["dmsetup", "message", "/dev/mapper/vg--a-pool-tpool", "0", "release_metadata_snap"],
    ]
    for _ in range(3):
        tracker.mark()
        tracker.take("c")
        tracker.release("c")
    assert [name for name in pool.rows if "farshore" in name] == [
        "data-farshore-3",
        "data-farshore-4",
        "data-farshore-5",
    ]
    with pytest.raises(NotKnown, match="snapshot of the last point is gone"):
        tracker.changed("d", first, tracker.mark()["d"])
    with pytest.raises(NotKnown, match="another volume"):
        tracker.changed("d", "thin:vg-a.other:3", second)


@pytest.mark.parametrize("text", ["", "<x/>", DELTA.replace("left_only", "sideways"), DELTA[:-20]])
def test_an_answer_of_thin_delta_that_is_not_understood_is_no_answer(text):
    with pytest.raises(NotKnown):
        lvm.parse_delta(text, DEVICE.size)


@pytest.mark.parametrize("text", ["", "{}", '{"report": []}', '{"report": [{"lv": [{"thin_id": "x"}]}]}'])
def test_an_answer_of_lvs_that_is_not_understood_is_told(text):
    with pytest.raises(lvm.LvmFailed):
        lvm.parse_lvs(text)


# -- dm-era -------------------------------------------------------------------------------------------------------


class Era:
    def __init__(self) -> None:
        self.era, self.asked, self.answer = 4, [], "<blocks>\n</blocks>"

    def __call__(self, command) -> str:
        self.asked.append(list(command))
        if command[:2] == ["dmsetup", "status"]:
            return f"0 131072 era 8 12/2048 {self.era} -\n"
        if command[:2] == ["dmsetup", "table"]:
            return "0 131072 era 253:1 253:2 128\n"
        if command[0] == "era_invalidate":
            return self.answer
        if command[-1] == "checkpoint":
            self.era += 1
        return ""


def test_an_era_is_ended_at_the_mark_and_what_was_written_since_is_asked():
    kernel = Era()
    tracker = dmera.EraTracker(kernel)
    one = Device("/dev/mapper/data", 253, 3, 64 * MIB, "dm", "1")
    tracker.watch({"d": one})
    mark = tracker.mark()["d"]
    assert mark == "era:data:5"
    kernel.answer = '<blocks>\n  <block block="3"/>\n  <range begin="10" end = "12"/>\n</blocks>'
    assert list(tracker.changed("d", mark).runs()) == [(3 * BLOCK, BLOCK), (10 * BLOCK, 2 * BLOCK)]
    assert [
        "era_invalidate",
        "--metadata-snapshot",
        "--written-since",
        "5",
        "/dev/block/253:1",
    ] in kernel.asked
    assert kernel.asked[-1][-1] == "drop_metadata_snap"
    tracker.changed("d", mark, carry=60.0)
    assert [
        "era_invalidate",
        "--metadata-snapshot",
        "--written-since",
        "4",
        "/dev/block/253:1",
    ] in kernel.asked
    with pytest.raises(NotKnown, match="went backwards"):
        tracker.changed("d", "era:data:99")
    with pytest.raises(NotKnown, match="another device"):
        tracker.changed("d", "era:other:2")
    kernel.answer = "error: no such device"
    with pytest.raises(NotKnown, match="not understood"):
        tracker.changed("d", mark)
    assert kernel.asked[-1][-1] == "drop_metadata_snap", "the metadata snapshot stayed"


def test_a_failed_era_target_is_told():
    with pytest.raises(lvm.LvmFailed):
        dmera.parse_status("0 131072 era Fail")


# -- mounts -------------------------------------------------------------------------------------------------------


def test_mounts_are_read_with_their_traps():
    table = "\n".join(
        [
            "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/nowhere0 rw,discard",
            "30 22 254:0 /var/lib /srv/bind rw - ext4 /dev/nowhere0 rw",
            "31 22 7:1 / /mnt/with\\040space ro - xfs /dev/nowhere1 ro",
            "32 22 0:5 / /proc rw - proc proc rw",
            "33 22 0:44 / /data rw - tmpfs tmpfs rw",
        ]
    )
    found = disks.mounts(table)
    assert [(m.path, m.number, m.read_only) for m in found] == [
        ("/", "254:0", False),
        ("/mnt/with space", "7:1", True),
    ]


# -- VSS ----------------------------------------------------------------------------------------------------------

C = "\\\\?\\Volume{11111111-1111-1111-1111-111111111111}\\"
D = "\\\\?\\Volume{22222222-2222-2222-2222-222222222222}\\"


def guid(number: int) -> str:
    return f"{{{number:08x}-0000-0000-0000-000000000000}}"


class Vss:
    """A machine that answers as diskshadow and vssadmin are documented to."""

    def __init__(self) -> None:
        self.shadows: dict[str, tuple[str, str, str]] = {}
        self.scripts: list[str] = []
        self.fail: list[tuple[int, str]] = []
        self.failed_writers: list[list[str]] = []
        self.count = 0

    def __call__(self, command) -> tuple[int, str]:
        if command[:3] == ["vssadmin", "list", "shadows"]:
            return (0, self.list()) if self.shadows else (1, "No items found that satisfy the query.\r\n")
        if command[:3] == ["vssadmin", "list", "writers"]:
            bad = self.failed_writers.pop(0) if self.failed_writers else []
            return 0, "\r\n".join(
                f"Writer name: '{name}'\r\n   Writer Id: {guid(1)}\r\n   State: [{8 if name in bad else 1}] x\r\n"
                f"   Last error: {'Retryable error' if name in bad else 'No error'}\r\n"
                for name in ("System Writer", "SqlServerWriter")
            )
        assert command[:2] == ["diskshadow", "/s"]
        script = Path(command[2]).read_bytes().decode()
        self.scripts.append(script)
        return self.run(script)

    def run(self, script: str) -> tuple[int, str]:
        set_id, answer, fail = guid(1000 + len(self.scripts)), [], None
        for line in script.split("\r\n"):
            words = line.split(" ")
            if line == "CREATE" and self.fail:
                fail = self.fail.pop(0)
            if words[:2] == ["ADD", "VOLUME"]:
                self.count += 1
                one = guid(self.count)
                device = f"\\\\?\\GLOBALROOT\\Device\\HarddiskVolumeShadowCopy{self.count}"
                self.shadows[one] = (set_id, words[2], device)
                answer.append(f"Alias {words[4]} for shadow ID {one} set as environment variable.")
            if words[:3] == ["DELETE", "SHADOWS", "ID"]:
                del self.shadows[words[3]]
        return fail or (0, "\r\n".join(answer))

    def list(self) -> str:
        return "\r\n".join(
            f"Contents of shadow copy set ID: {set_id}\r\n   Contained 1 shadow copies at creation time: x\r\n"
            f"      Shadow Copy ID: {one}\r\n         Original Volume: (C:){volume}\r\n"
            f"         Shadow Copy Volume: {device}\r\n         Originating Machine: m\r\n"
            for one, (set_id, volume, device) in self.shadows.items()
        )


def test_one_shadow_copy_set_of_all_volumes_with_writers(tmp_path):
    vss = Vss()
    copies = ShadowCopies(tmp_path, vss)
    made = copies.create([C, D], application=True)
    assert made.with_writers
    assert set(made.shadows) == {C, D}
    lines = vss.scripts[0].split("\r\n")
    assert lines[0] == "SET CONTEXT PERSISTENT"
    assert lines.index("BEGIN BACKUP") < lines.index(f"ADD VOLUME {C} ALIAS farshore0")
    assert lines.index(f"ADD VOLUME {D} ALIAS farshore1") < lines.index("CREATE") < lines.index("END BACKUP")
    assert copies.still_there(made)
    copies.delete([shadow.id for shadow in made.shadows.values()])
    assert vss.shadows == {}
    assert not copies.still_there(made)
    copies.delete([shadow.id for shadow in made.shadows.values()])  # once more: nothing to do
    assert list(tmp_path.iterdir()) == []


def test_without_writers_nothing_of_them_is_in_the_script(tmp_path):
    vss = Vss()
    assert not ShadowCopies(tmp_path, vss).create([C], application=False).with_writers
    assert vss.scripts[0].startswith("SET CONTEXT PERSISTENT NOWRITERS\r\n")
    assert "BACKUP" not in vss.scripts[0]


def test_a_writer_that_fails_once_is_tried_again_and_twice_costs_the_label_only(tmp_path):
    vss = Vss()
    vss.failed_writers = [["SqlServerWriter"], []]
    assert ShadowCopies(tmp_path, vss).create([C], application=True).with_writers
    assert len(vss.shadows) == 1, "the voided shadow stayed"
    vss = Vss()
    vss.fail = [(1, "VSS_E_WRITERERROR_TIMEOUT")] * 2
    made = ShadowCopies(tmp_path, vss).create([C], application=True)
    assert not made.with_writers
    assert "VSS_E_WRITERERROR_TIMEOUT" in made.less_because[0]
    assert len(vss.shadows) == 1, "parts of failed sets stayed"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("COM call failed: VSS_E_INSUFFICIENT_STORAGE", Reason.STORAGE),
        ("error 0x80042317", Reason.LIMIT),
        ("VSS_E_SNAPSHOT_SET_IN_PROGRESS", Reason.BUSY),
        ("something else", Reason.OTHER),
    ],
)
def test_a_refused_shadow_copy_says_why_and_leaves_nothing(tmp_path, text, reason):
    vss = Vss()
    vss.fail = [(1, text)]
    with pytest.raises(ShadowFailed) as caught:
        ShadowCopies(tmp_path, vss).create([C, D], application=False)
    assert caught.value.reason == reason
    assert vss.shadows == {}


@pytest.mark.parametrize("volume", ["", "C:\\", "C: ALIAS x\r\nEXEC evil", "\\\\?\\Volume{1}\\"])
def test_what_is_no_volume_never_gets_into_a_script(volume):
    with pytest.raises(ValueError, match="no volume"):
        windows.create_script([volume], writers=False, metadata="m.cab")
    with pytest.raises(ValueError, match="no id"):
        windows.delete_script([volume])


def test_half_a_list_is_an_error():
    vss = Vss()
    vss.run(f"ADD VOLUME {C} ALIAS a")
    text = vss.list()
    assert len(windows.parse_list(text)) == 1
    with pytest.raises(ShadowFailed):
        windows.parse_list(text.split("         Shadow Copy Volume")[0])
    with pytest.raises(ShadowFailed):
        windows.parse_list("Shadow Copy Volume: \\\\?\\GLOBALROOT\\Device\\HarddiskVolumeShadowCopy3")


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.closed = data, False

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]

    def close(self) -> None:
        self.closed = True


def test_a_disk_is_put_together_from_shadows_and_gaps():
    disk = Bytes(b"t" * 100)
    shadows = {C: Bytes(b"c" * 30), D: Bytes(b"d" * 20)}
    whole = ShadowedDisk(disk, [VolumePlace(D, "0", 60, 20), VolumePlace(C, "0", 10, 30)], shadows)
    truth = b"t" * 10 + b"c" * 30 + b"t" * 20 + b"d" * 20 + b"t" * 20
    for offset in range(0, 100, 7):
        for length in (1, 13, 50, 100 - offset):
            if offset + length <= 100:
                assert bytes(whole.read(offset, length)) == truth[offset : offset + length]
    shadows[C].data = b"c" * 5
    with pytest.raises(ShadowFailed):
        whole.read(10, 30)
    whole.close()
    assert disk.closed
    with pytest.raises(ValueError, match="overlaps"):
        ShadowedDisk(disk, [VolumePlace(D, "0", 0, 20), VolumePlace(C, "0", 10, 30)], shadows)
    with pytest.raises(ValueError, match="no shadow"):
        ShadowedDisk(disk, [VolumePlace("E:", "0", 0, 20)], shadows)


def test_shadow_copies_and_hashes_fill_the_ports_of_the_agent(tmp_path):
    """Two instants of a disk whose volume is written in between; then one whose shadow is deleted while it is read."""
    vss = Vss()
    live = {"disk": bytearray(8 * BLOCK), C: bytearray(4 * BLOCK)}
    devices: dict[str, bytes] = {}

    def shell(command) -> tuple[int, str]:
        before = set(vss.shadows)
        answer = vss(command)
        for one in set(vss.shadows) - before:
            devices[vss.shadows[one][2]] = bytes(live[vss.shadows[one][1]])
        return answer

    def open_device(path: str) -> Bytes:
        return Bytes(devices[path] if path in devices else bytes(live["disk"]))

    hashes = HashTracker(tmp_path / "hashes", counters=lambda _: (0,))
    tracker = VssTracker(
        ShadowCopies(tmp_path, shell),
        hashes,
        lambda key: [VolumePlace(C, key, 2 * BLOCK, 4 * BLOCK)],
        open_device,
        application=True,
    )
    source: ChangeSource = tracker
    maker: Snapshots = tracker
    source.watch({"d": Device("disk", 0, 0, 8 * BLOCK, "x", "")})
    first = source.mark()["d"]
    image = maker.take("c1")["d"]
    live[C][BLOCK] = 1  # after the instant
    assert bytes(image.read(0, 8 * BLOCK)) == bytes(8 * BLOCK)
    with pytest.raises(NotKnown, match="are gone"):
        source.changed("d", "hash:00:0", first)
    maker.release("c1")
    assert vss.shadows == {}
    second = source.mark()["d"]
    image = maker.take("c2")["d"]
    assert list(source.changed("d", first, second).runs()) == [(3 * BLOCK, BLOCK)]
    assert image.read(3 * BLOCK, 1)[0] == 1
    vss.shadows.clear()  # shadow storage ran full
    with pytest.raises(ShadowFailed, match="deleted while it was read"):
        image.read(0, BLOCK)
    maker.release("c2")
    maker.release("c2")
    third = source.mark()["d"]
    maker.take("c3")
    vss.shadows.clear()
    with pytest.raises(ShadowFailed, match="deleted while it was read"):
        source.changed("d", second, third)
