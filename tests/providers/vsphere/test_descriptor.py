"""The descriptor decides whether a disk can be read by range, and where its bytes are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.providers.vsphere.descriptor import FlatExtent, UnreadableDisk, parse, pieces


def text(*extents: str, kind: str = "vmfs", parent: str = "ffffffff") -> str:
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        "CID=fffffffe",
        f"parentCID={parent}",
        f'createType="{kind}"',
        "",
        "# Extent description",
        *extents,
        "",
        "# The Disk Data Base",
        'ddb.adapterType = "lsilogic"',
    ]
    return "\n".join(lines) + "\n"


def test_a_base_disk_on_vmfs_is_one_flat_file():
    assert parse(text('RW 2048 VMFS "web 1-flat.vmdk"')) == (
        "vmfs",
        (FlatExtent(0, 1048576, "web 1-flat.vmdk", 0),),
    )


def test_several_flat_extents_follow_each_other():
    kind, extents = parse(
        text('RW 8 FLAT "a-f001.vmdk" 0', 'RW 4 FLAT "a-f002.vmdk" 2', kind="twoGbMaxExtentFlat")
    )
    assert kind == "twoGbMaxExtentFlat"
    assert extents == (FlatExtent(0, 4096, "a-f001.vmdk", 0), FlatExtent(4096, 2048, "a-f002.vmdk", 1024))
    assert pieces(extents, 4000, 200) == [("a-f001.vmdk", 4000, 96), ("a-f002.vmdk", 1024, 104)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (text('RW 2048 SESPARSE "web-000001-sesparse.vmdk"', kind="seSparse"), "SESPARSE"),
        (text('RW 2048 VMFSSPARSE "web-000001-delta.vmdk"', kind="vmfsSparse"), "VMFSSPARSE"),
        (text('RW 2048 VMFSRDM "web-rdmp.vmdk"', kind="vmfsRawDeviceMap"), "VMFSRDM"),
        (text('RW 2048 VMFS "vsan://52a1-8e"'), "object store"),
        (text('RW 2048 VMFS "/vmfs/volumes/x/web-flat.vmdk"'), "outside its folder"),
        (text('RW 2048 VMFS "web-flat.vmdk"', parent="0a1b2c3d"), "on top of another disk"),
        (text(), "names no extent"),
        ("KDMV\x01\x00\x00\x00", "not a disk descriptor"),
    ],
)
def test_what_cannot_be_read_by_range_is_refused_with_the_reason(content, says):
    with pytest.raises(UnreadableDisk, match=says):
        parse(content)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.data())
def test_pieces_cover_a_range_exactly(sectors, data):
    extents = parse(text(*(f'RW {n} FLAT "{i}" 0' for i, n in enumerate(sectors))))[1]
    total = sum(sectors) * 512
    offset = data.draw(st.integers(0, total))
    length = data.draw(st.integers(0, total - offset))
    found = pieces(extents, offset, length)
    starts = [sum(sectors[: int(file)]) * 512 + at for file, at, _ in found]
    assert sum(n for _, _, n in found) == length
    position = offset
    for start, (_, _, n) in zip(starts, found, strict=True):
        assert start == position
        position += n


def test_a_range_behind_the_end_is_an_error():
    extents = parse(text('RW 2 VMFS "x-flat.vmdk"'))[1]
    with pytest.raises(ValueError, match="outside"):
        pieces(extents, 1000, 100)
