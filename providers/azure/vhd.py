"""The fixed VHD: a raw disk followed by one footer of 512 bytes.

Azure imports a page blob as a disk if it ends with such a footer and the disk's size is whole MiB. Layout after the
published Virtual Hard Disk image format specification; all numbers big endian.
"""

from __future__ import annotations

import struct
import uuid

FOOTER = 512
MIB = 1 << 20


def virtual_size(size: int) -> int:
    """Bytes of the disk inside the VHD: `size` rounded up to whole MiB."""
    return max(MIB, -(-size // MIB) * MIB)


def blob_size(size: int) -> int:
    """Bytes of the page blob for a disk of `size` bytes."""
    return virtual_size(size) + FOOTER


def footer(size: int, identity: str) -> bytes:
    """The footer for a disk of `size` bytes. The same `identity` always gives the same bytes."""
    virtual = virtual_size(size)
    unique = uuid.uuid5(uuid.NAMESPACE_URL, f"farshore:{identity}")
    cylinders, heads, sectors = 65535, 16, 255  # at their maximum: readers then use the size instead
    fixed = 2
    raw = bytearray(
        struct.pack(
            ">8sIIQI4sI4sQQHBBII16s428x",
            b"conectix",
            2,  # features: the reserved bit, always set
            0x00010000,  # format version
            2**64 - 1,  # no dynamic header
            0,  # creation time: constant, so that the footer can be compared
            b"fars",
            0x00010000,
            b"Wi2k",
            virtual,
            virtual,
            cylinders,
            heads,
            sectors,
            fixed,
            0,  # the checksum's place
            unique.bytes,
        )
    )
    struct.pack_into(">I", raw, 64, ~sum(raw) & 0xFFFFFFFF)
    return bytes(raw)
