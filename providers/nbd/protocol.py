"""NBD on the wire: numbers, packing, and what a reply may look like. Pure.

Source: the NBD protocol document (fixed newstyle negotiation, structured replies, metadata contexts). Everything is
big-endian. Only what a reader needs is here: there is no way to write.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from farshore.providers.nbd.errors import Malformed, error_name

PORT = 10809
INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

FIXED_NEWSTYLE, NO_ZEROES = 1, 2  # handshake flags, the same bits in the client's answer

OPT_ABORT, OPT_STARTTLS, OPT_GO, OPT_STRUCTURED, OPT_SET_META = 2, 5, 7, 8, 10
REP_ACK, REP_INFO, REP_META = 1, 3, 4
REP_ERROR = 1 << 31
OPTION_ERRORS = {
    REP_ERROR + 1: "the option is not supported",
    REP_ERROR + 2: "the server's policy forbids it",
    REP_ERROR + 3: "the request is invalid",
    REP_ERROR + 4: "the platform does not support it",
    REP_ERROR + 5: "TLS is required",
    REP_ERROR + 6: "there is no such export",
    REP_ERROR + 7: "the server is shutting down",
    REP_ERROR + 8: "the client must take account of the block size",
    REP_ERROR + 9: "the request is too big",
}
REP_POLICY, REP_TLS_REQUIRED, REP_UNKNOWN = REP_ERROR + 2, REP_ERROR + 5, REP_ERROR + 6
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

HAS_FLAGS, CAN_MULTI_CONN = 1, 1 << 8  # transmission flags
CMD_READ, CMD_DISC, CMD_BLOCK_STATUS = 0, 2, 7

CHUNK_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS = 0, 1, 2, 5
CHUNK_ERROR, CHUNK_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2

MAX_STRING = 4096
MAX_OPTION_REPLY = 1 << 16
MAX_ERROR_CHUNK = 1 << 16
MAX_STATUS_CHUNK = (
    64 << 20
)  # 8 MiB of extents would be a million; a server that sends more is not answering us
MAX_BLOCK = 32 << 20  # longest request where the server names no limit
STATUS_STEP = 1 << 31  # block status is asked in steps of this: lengths have 32 bits

ALLOCATION = "base:allocation"
STATE_HOLE, STATE_ZERO = 1, 2  # flags of base:allocation
STATE_DIRTY = 1  # flag of qemu:dirty-bitmap:*

REQUEST = struct.Struct(">IHHQQI")
SIMPLE = struct.Struct(">IQ")  # after the magic: error, cookie
STRUCTURED = struct.Struct(">HHQI")  # after the magic: flags, type, cookie, length
OPTION_REPLY = struct.Struct(">QIII")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The head of one structured reply chunk."""

    flags: int
    kind: int
    cookie: int
    length: int

    @property
    def done(self) -> bool:
        return bool(self.flags & CHUNK_DONE)

    @property
    def error(self) -> bool:
        return bool(self.kind & 1 << 15)


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION_MAGIC + struct.pack(">II", number, len(data)) + data


def text(value: str) -> bytes:
    """A counted string. ValueError when the protocol does not allow it."""
    data = value.encode()
    if len(data) > MAX_STRING:
        raise ValueError(f"a name of {len(data)} bytes; NBD allows {MAX_STRING}")
    return struct.pack(">I", len(data)) + data


def go(export: str) -> bytes:
    return option(OPT_GO, text(export) + struct.pack(">HH", 1, INFO_BLOCK_SIZE))


def set_meta(export: str, contexts: tuple[str, ...]) -> bytes:
    queries = b"".join(text(context) for context in contexts)
    return option(OPT_SET_META, text(export) + struct.pack(">I", len(contexts)) + queries)


def request(command: int, cookie: int, offset: int, length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, length)


def parse_error(payload: bytes) -> str:
    """What an error chunk says, on one line."""
    if len(payload) < 6:
        raise Malformed(f"an error chunk of {len(payload)} bytes")
    number, length = struct.unpack_from(">IH", payload)
    if 6 + length > len(payload):
        raise Malformed("the text of an error chunk is longer than the chunk")
    if number == 0:
        raise Malformed("an error chunk with error 0")
    message = " ".join(payload[6 : 6 + length].decode("utf-8", "replace").split())
    return f"the server says {error_name(number)}" + (f" ({message})" if message else "")


def parse_status(payload: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Context id and (length, flags) runs of a block status chunk. Malformed unless every run has a length."""
    if len(payload) < 12 or (len(payload) - 4) % 8:
        raise Malformed(f"a block status chunk of {len(payload)} bytes")
    numbers = struct.unpack(f">{len(payload) // 4}I", payload)
    lengths = numbers[1::2]
    if 0 in lengths:
        raise Malformed("a block status run without a length")
    return numbers[0], list(zip(lengths, numbers[2::2], strict=True))
