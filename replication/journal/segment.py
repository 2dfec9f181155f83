"""Segments: immutable objects of up to 16 MiB that hold the chunks of one disk of one cycle.

    header    magic, salt, epoch, cycle, disk size, number of chunks, number of leaf digests
    records   28 bytes a chunk, by offset: offset, length, position, stored length, kind and first digest, nonce
    digests   16 bytes for every 64 KiB leaf of chunks that are not zeros (see `table`)
    payload   the chunks, each AES-256-GCM with its tag behind it

Little-endian. The first three parts are the *index*. Its digest, keyed and bound to machine and disk, is the last
component of the segment's name, and the name is in the manifest: a flipped byte of the index, or the index of another
disk, shows at once. A flipped byte of the payload fails the chunk's tag. The associated data of a chunk name machine,
disk, epoch, cycle, offset, length and kind, and its nonce is a counter of the segment: no chunk can stand in for another
one. A chunk is at most 1 MiB, zeros excepted, which have no payload.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.journal import table
from farshore.replication.journal.keys import SALT, Keys
from farshore.replication.ports import LEAF

SEGMENT = 16 << 20  # bytes after which a segment is closed
CHUNK = 1 << 20  # the most bytes of a chunk that is not zeros
LONGEST_ZERO = (1 << 32) - LEAF  # the most bytes of a chunk of zeros
TAG = 16
_MAGIC = b"FARSEG\x00\x01"
_HEADER = struct.Struct("<8s32sQQQII")
_RECORD = struct.Struct("<QIIIII")
HEADER = _HEADER.size
RECORD = _RECORD.size
_PROBE = 4096  # bytes that are compressed to see whether a chunk is worth it
_WORTH = 0.94  # stored / raw above which a chunk stays raw: a few percent are not worth decompressing
_KIND_SHIFT = 30
_DIGEST_MASK = (1 << _KIND_SHIFT) - 1


class ChunkKind(IntEnum):
    """How a chunk is stored."""

    ZERO = 0
    RAW = 1
    ZSTD = 2


@dataclass(frozen=True, slots=True)
class Place:
    """What a segment belongs to: goes into names, headers and associated data."""

    machine: str
    disk: str
    epoch: int
    cycle: int
    size: int  # of the disk, bytes

    def aad(self, offset: int, length: int, kind: int) -> bytes:
        """Associated data of a chunk."""
        return _bound(self.machine, self.disk) + struct.pack(
            "<QQQIB", self.epoch, self.cycle, offset, length, kind
        )


def _bound(machine: str, disk: str) -> bytes:
    parts = (machine.encode(), disk.encode())
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk as an index tells it. `position` is from the start of the payload."""

    offset: int
    length: int
    kind: ChunkKind
    position: int
    stored: int
    nonce: int
    digests: int  # number of its first leaf digest

    @property
    def end(self) -> int:
        """One past its last byte of the disk."""
        return self.offset + self.length


class _Codecs(threading.local):
    """Compressors are not for several threads, and costly to make."""

    def __init__(self) -> None:
        self.level = 0
        self.compressor: zstandard.ZstdCompressor | None = None
        self.decompressor = zstandard.ZstdDecompressor()


_codecs = _Codecs()


def squeeze(data: bytes | memoryview, level: int) -> tuple[ChunkKind, bytes | memoryview]:
    """Compress where it is worth it. Level 0: never."""
    if level == 0:
        return ChunkKind.RAW, data
    if _codecs.compressor is None or _codecs.level != level:
        _codecs.compressor = zstandard.ZstdCompressor(level=level)
        _codecs.level = level
    view = memoryview(data)
    if len(view) > 4 * _PROBE:
        at = (len(view) // 2) & ~(_PROBE - 1)
        probe = _codecs.compressor.compress(view[at : at + _PROBE])
        if len(probe) > _PROBE * _WORTH:
            return ChunkKind.RAW, data
    packed = _codecs.compressor.compress(view)
    if len(packed) > len(view) * _WORTH:
        return ChunkKind.RAW, data
    return ChunkKind.ZSTD, packed


class Builder:
    """A segment that is being filled. Not thread-safe but for `seal_chunk`; the packer holds the lock."""

    def __init__(self, place: Place, keys: Keys, salt: bytes) -> None:
        if len(salt) != SALT:
            raise ValueError("a salt of the wrong length")
        self.place = place
        self._keys = keys
        self._salt = salt
        self._cipher = keys.cipher(salt)
        self._chunks: list[
            tuple[int, int, int, int, int, bytes]
        ] = []  # offset length kind stored nonce digests
        self._payload: dict[int, bytes] = {}
        self._reserved = 0
        self.stored = 0  # payload so far, also what is only reserved
        self.open = 0  # reserved, but not yet there

    def add_zeros(self, offset: int, length: int) -> None:
        """A run of zeros; continues the last one where it can."""
        if self._chunks:
            last = self._chunks[-1]
            joined = last[1] + length
            if last[2] == ChunkKind.ZERO and last[0] + last[1] == offset and joined <= LONGEST_ZERO:
                self._chunks[-1] = (last[0], joined, last[2], 0, last[4], b"")
                return
        self._chunks.append((offset, length, ChunkKind.ZERO, 0, self._next(), b""))

    def reserve(self, offset: int, length: int, kind: ChunkKind, plain: int, digests: bytes) -> int:
        """Take a nonce for a chunk of `plain` bytes before encryption."""
        nonce = self._next()
        self._chunks.append((offset, length, kind, plain + TAG, nonce, digests))
        self.stored += plain + TAG
        self.open += 1
        return nonce

    def _next(self) -> int:
        self._reserved += 1
        return self._reserved - 1

    def seal_chunk(
        self, nonce: int, offset: int, length: int, kind: ChunkKind, data: bytes | memoryview
    ) -> bytes:
        """Encrypt; may run beside other calls."""
        return self._cipher.encrypt(nonce.to_bytes(12, "little"), data, self.place.aad(offset, length, kind))

    def put(self, nonce: int, sealed: bytes) -> None:
        """What `seal_chunk` made."""
        self._payload[nonce] = sealed
        self.open -= 1

    @property
    def full(self) -> bool:
        return self.stored >= SEGMENT or len(self._chunks) >= (1 << 16)

    @property
    def empty(self) -> bool:
        return not self._chunks

    def finish(self) -> tuple[bytes, str, int, int, int]:
        """The object, its index digest (hex), length of the index, first byte and end of what it covers."""
        if self.open:
            raise AssertionError("chunks are missing")
        records, digests, body = bytearray(), bytearray(), list[bytes]()
        position = 0
        end = 0
        for offset, length, kind, stored, nonce, leaf_digests in sorted(self._chunks):
            first = len(digests) // table.ENTRY
            digests += leaf_digests
            records += _RECORD.pack(offset, length, position, stored, (kind << _KIND_SHIFT) | first, nonce)
            if kind != ChunkKind.ZERO:
                body.append(self._payload[nonce])
                position += stored
            end = max(end, offset + length)
        start = min(chunk[0] for chunk in self._chunks)
        header = _HEADER.pack(
            _MAGIC,
            self._salt,
            self.place.epoch,
            self.place.cycle,
            self.place.size,
            len(self._chunks),
            len(digests) // table.ENTRY,
        )
        index = header + records + digests
        name = index_digest(self._keys, self.place.machine, self.place.disk, index)
        return b"".join([index, *body]), name, len(index), start, end


def index_digest(keys: Keys, machine: str, disk: str, index: bytes | memoryview) -> str:
    """The last component of a segment's name."""
    hasher = blake3(_bound(machine, disk), key=keys.index)
    hasher.update(index)
    return hasher.hexdigest(length=16)


class Index:
    """An index in the form in which it is stored: some 40 bytes a chunk, parsed where it is looked at."""

    __slots__ = ("_count", "_data", "_digests", "_payload", "_salt", "place")

    def __init__(self, machine: str, disk: str, data: bytes) -> None:
        magic, salt, epoch, cycle, size, chunks, digests = _HEADER.unpack_from(data)
        if magic != _MAGIC or len(data) != HEADER + chunks * RECORD + digests * table.ENTRY:
            raise ValueError("not an index")
        self._data = data
        self._salt: bytes = salt
        self._count: int = chunks
        self._digests = HEADER + chunks * RECORD
        self._payload = len(data)
        self.place = Place(machine, disk, epoch, cycle, size)

    def __len__(self) -> int:
        """Bytes it occupies."""
        return len(self._data)

    @property
    def salt(self) -> bytes:
        return self._salt

    @property
    def payload(self) -> int:
        """Where the payload begins in the segment."""
        return self._payload

    def chunk(self, number: int) -> Chunk:
        at = HEADER + number * RECORD
        offset, length, position, stored, mixed, nonce = _RECORD.unpack_from(self._data, at)
        kind = ChunkKind(mixed >> _KIND_SHIFT)
        return Chunk(offset, length, kind, position, stored, nonce, mixed & _DIGEST_MASK)

    def chunks(self, start: int = 0, end: int = 1 << 63) -> Iterator[Chunk]:
        """Those that reach into [start, end), by offset. Chunks of one segment do not overlap."""
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            if self.chunk(middle).end <= start:
                low = middle + 1
            else:
                high = middle
        for number in range(low, self._count):
            chunk = self.chunk(number)
            if chunk.offset >= end:
                return
            yield chunk

    def digests(self, chunk: Chunk) -> bytes:
        """16 bytes a leaf of the chunk; for zeros zeros."""
        leaves = -(-chunk.length // LEAF)
        if chunk.kind is ChunkKind.ZERO:
            return bytes(leaves * table.ENTRY)
        at = self._digests + chunk.digests * table.ENTRY
        return self._data[at : at + leaves * table.ENTRY]


def index_length(head: bytes) -> int:
    """How long the index is that begins with these (at least HEADER) bytes. ValueError: it is none."""
    magic, _, _, _, _, chunks, digests = _HEADER.unpack_from(head)
    if magic != _MAGIC:
        raise ValueError("not a segment")
    return HEADER + chunks * RECORD + digests * table.ENTRY


def open_chunk(keys: Keys, index: Index, chunk: Chunk, stored: bytes | memoryview, *, name: str) -> bytes:
    """The bytes of a chunk, verified: the tag, and the leaf digests of what came out. ReplicaDamaged names the segment."""
    place = index.place
    try:
        plain = keys.cipher(index.salt).decrypt(
            chunk.nonce.to_bytes(12, "little"), stored, place.aad(chunk.offset, chunk.length, chunk.kind)
        )
        data = plain
        if chunk.kind is ChunkKind.ZSTD:
            data = _codecs.decompressor.decompress(plain, max_output_size=chunk.length)
    except (InvalidTag, zstandard.ZstdError, ValueError) as error:
        raise damaged(name, place.disk, chunk.offset, chunk.length) from error
    if len(data) != chunk.length or table.hashes(keys.leaf, data) != index.digests(chunk):
        raise damaged(name, place.disk, chunk.offset, chunk.length)
    return data


def damaged(name: str, disk: str, offset: int, length: int) -> FarshoreError:
    """The error of a segment whose bytes are not what was committed."""
    return FarshoreError(
        Code.REPLICA_DAMAGED,
        f"Segment {name} is damaged: {length} bytes at {offset} of disk {disk} cannot be read.",
        subject=name,
        details={"segment": name, "disk": disk, "areas": [[offset, length]]},
    )
