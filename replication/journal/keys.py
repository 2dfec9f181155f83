"""Keys of a machine: one data key, wrapped by a key that the caller owns (KEK), stored as `<machine>/k/key.json`.

Nothing is encrypted with the data key itself. From it are derived, each for one purpose: a key for leaf hashes, a key for
digests of indexes, and for every segment a key of its own, from 32 random bytes in the segment's header. Nonces are
counters inside a segment, so a pair of key and nonce never repeats, however many segments there are and whatever crashes.

Without a KEK the data key lies beside the data: chunks are then protected against damage and mix-up, not against readers
of the store. `rewrap` changes the KEK and no data.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Backend

KEY = 32  # bytes of every key here
SALT = 32  # random bytes of a segment
_NONCE = 12

Random = Callable[[int], bytes]


class Kek(Protocol):
    """A key that wraps data keys: in a vault, or `LocalKek`."""

    @property
    def id(self) -> str:
        """Which key: stored in clear beside what it wrapped."""
        ...

    def wrap(self, data_key: bytes, context: bytes) -> bytes: ...
    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The data key. SecretUnavailable when it was wrapped by another key or for another context, or altered."""
        ...


class LocalKek:
    """A KEK of 32 bytes that the caller holds in memory: AES-256-GCM."""

    def __init__(self, key: bytes, *, random: Random = os.urandom) -> None:
        if len(key) != KEY:
            raise FarshoreError(Code.CONFIGURATION_INVALID, f"A key-encryption key has {KEY} bytes.")
        self._cipher = AESGCM(key)
        self._random = random
        self._id = "local-" + blake3(key, derive_key_context="farshore kek id 1").hexdigest(length=8)

    @property
    def id(self) -> str:
        return self._id

    def wrap(self, data_key: bytes, context: bytes) -> bytes:
        nonce = self._random(_NONCE)
        return nonce + self._cipher.encrypt(nonce, data_key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        try:
            return self._cipher.decrypt(wrapped[:_NONCE], wrapped[_NONCE:], context)
        except (InvalidTag, ValueError) as error:
            raise FarshoreError(
                Code.SECRET_UNAVAILABLE, f"The data key cannot be unwrapped with {self._id}."
            ) from error


@dataclass(frozen=True, slots=True)
class Keys:
    """What is derived from a data key. The hash keys are not secret towards who may read the disks."""

    leaf: bytes
    index: bytes
    segments: bytes

    @staticmethod
    def of(data_key: bytes) -> Keys:
        """Derive."""

        def derive(purpose: str) -> bytes:
            return blake3(data_key, derive_key_context=f"farshore journal 1 {purpose}").digest()

        return Keys(derive("leaf hashes"), derive("index digests"), derive("segment keys"))

    def cipher(self, salt: bytes) -> AESGCM:
        """The cipher of the one segment with this salt."""
        return AESGCM(blake3(salt, key=self.segments).digest())

    def __repr__(self) -> str:
        return "Keys(…)"


def load(backend: Backend, prefix: str, kek: Kek | None, *, random: Random = os.urandom) -> Keys:
    """The keys of a machine, made and stored when it has none. SecretUnavailable, ReplicaDamaged."""
    name = f"{prefix}k/key.json"
    data = backend.get(name)
    if data is None:
        backend.create(name, _sealed(prefix, random(KEY), kek))
        data = backend.get(name)  # somebody else's, if that one was first
        if data is None:
            raise FarshoreError(Code.TARGET_NOT_VISIBLE_YET, f"{name} is not visible yet.", subject=name)
    return Keys.of(_opened(name, prefix, data, kek))


def find(backend: Backend, prefix: str, kek: Kek | None) -> Keys:
    """The keys of a machine that has some. ReplicaDamaged when they are gone: nothing can be read without them."""
    name = f"{prefix}k/key.json"
    data = backend.get(name)
    if data is None:
        raise FarshoreError(Code.REPLICA_DAMAGED, f"The data key {name} is missing.", subject=name)
    return Keys.of(_opened(name, prefix, data, kek))


def rewrap(backend: Backend, prefix: str, old: Kek | None, new: Kek | None) -> None:
    """Change the KEK of a machine. Idempotent: a key that `new` opens already stays."""
    name = f"{prefix}k/key.json"
    data = backend.get(name)
    if data is None:
        return
    try:
        _opened(name, prefix, data, new)
        return
    except FarshoreError as error:
        if error.code is not Code.SECRET_UNAVAILABLE:
            raise
    backend.put(name, _sealed(prefix, _opened(name, prefix, data, old), new))


def _sealed(prefix: str, data_key: bytes, kek: Kek | None) -> bytes:
    body = data_key if kek is None else kek.wrap(data_key, prefix.encode())
    check = blake3(data_key, derive_key_context="farshore journal 1 key check").hexdigest(length=16)
    text = {
        "format": 1,
        "kek": "" if kek is None else kek.id,
        "key": base64.b64encode(body).decode(),
        "check": check,
    }
    return json.dumps(text, sort_keys=True).encode()


def _opened(name: str, prefix: str, data: bytes, kek: Kek | None) -> bytes:
    try:
        raw = cast("dict[str, Any]", json.loads(data))
        wrapped_by, body = str(raw["kek"]), base64.b64decode(raw["key"], validate=True)
        check, form = str(raw["check"]), raw["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise FarshoreError(Code.REPLICA_DAMAGED, f"The data key {name} is damaged.", subject=name) from error
    if form != 1:
        raise FarshoreError(Code.REPLICA_DAMAGED, f"{name} has a form that is not known.", subject=name)
    if wrapped_by != ("" if kek is None else kek.id):
        raise FarshoreError(
            Code.SECRET_UNAVAILABLE,
            f"The data key {name} is wrapped by {wrapped_by or 'no key'}, not by {kek.id if kek else 'none'}.",
            subject=name,
        )
    data_key = body if kek is None else kek.unwrap(body, prefix.encode())
    if blake3(data_key, derive_key_context="farshore journal 1 key check").hexdigest(length=16) != check:
        raise FarshoreError(Code.REPLICA_DAMAGED, f"The data key {name} is damaged.", subject=name)
    return data_key
