"""CRC-64 as the blob service uses it: reflected polynomial 0x9A6C9329AC4BC9B5, all ones before and after.

Table-driven and slow (a few MiB/s); clients send it only when asked to. Known answer: "123456789" →
0xAE8B14860A799888 (catalogue of parametrised CRC algorithms, CRC-64/NVME).
"""

from __future__ import annotations

_POLY = 0x9A6C9329AC4BC9B5
_ONES = 0xFFFFFFFFFFFFFFFF


def _table() -> list[int]:
    out: list[int] = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ _POLY if value & 1 else value >> 1
        out.append(value)
    return out


_TABLE = _table()


def crc64(data: bytes | bytearray) -> int:
    """Checksum of the whole of `data`."""
    value = _ONES
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ _ONES
