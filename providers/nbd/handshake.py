"""Getting into transmission with an NBD server: TLS, structured replies, metadata contexts, the export."""

from __future__ import annotations

import ssl
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.nbd import protocol as nbd
from farshore.providers.nbd.errors import Malformed, unreachable, untrusted
from farshore.providers.nbd.wire import PlainWire, TlsWire, Wire, connect

Address = str | tuple[str, int]


@dataclass(frozen=True, slots=True)
class ClientTls:
    """What is trusted and who we are. Paths of PEM files; `name` is the server's where the address is no host name."""

    ca_file: Path
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None

    def context(self) -> ssl.SSLContext:
        """ConfigurationInvalid when a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(self.ca_file)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as exc:
            raise FarshoreError(
                Code.CONFIGURATION_INVALID,
                f"The TLS files for NBD ({self.ca_file}, {self.certificate}) cannot be used: {exc}.",
            ) from exc
        return context


@dataclass(frozen=True, slots=True)
class Terms:
    """What client and server agreed on. Sizes in bytes."""

    size: int
    flags: int
    structured: bool
    contexts: dict[int, str] = field(default_factory=dict[int, str])
    min_block: int = 1
    max_block: int = nbd.MAX_BLOCK


def told(address: Address) -> str:
    """An address as people write it."""
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def open_export(
    address: Address,
    export: str,
    *,
    contexts: tuple[str, ...] = (),
    tls: ClientTls | None = None,
    timeout: float = 10.0,
    silence: float = 30.0,
) -> tuple[Wire, Terms]:
    """Connect and negotiate within `timeout` seconds, read-only in effect: no command that writes is ever sent.

    SourceUnreachable, AccessDenied, SourceNotEligible (no such export), ConfigurationInvalid (TLS),
    SourceReadFailed (a reply that the protocol does not allow). Contexts that the server does not have are left out of the terms.
    """
    where = f"the NBD server at {told(address)}"
    context = tls.context() if tls else None
    wire: Wire | None = None
    try:
        plain = PlainWire(connect(address, timeout), timeout)
        wire = plain
        talk = _Talk(wire, where, time.monotonic() + timeout)
        talk.greet()
        if tls is not None and context is not None:
            talk.start_tls()
            name = tls.name or (address[0] if isinstance(address, tuple) else "localhost")
            try:
                wire = TlsWire(plain, context, name, timeout)
            except (OSError, ssl.SSLError) as exc:
                raise untrusted(where, exc) from exc
            talk.wire = wire
        terms = talk.agree(export, contexts)
        plain.patience(silence)
        return wire, terms
    except BaseException as exc:
        if wire is not None:
            wire.close()
        if isinstance(exc, Malformed):
            raise FarshoreError(
                Code.SOURCE_READ_FAILED,
                f"{where} does not speak NBD as it should: {exc}.",
                details={"reason": "malformed"},
            ) from exc
        if isinstance(exc, ssl.SSLError):
            raise untrusted(
                where, exc
            ) from exc  # in TLS 1.3 a server refuses a certificate after our handshake
        if isinstance(exc, OSError):
            if tls is not None and isinstance(wire, TlsWire) and isinstance(exc, ConnectionError):
                raise untrusted(where, exc) from exc
            raise unreachable(where, f"opening export {export!r}", exc) from exc
        raise


class _Talk:
    """The haggling phase of one connection."""

    def __init__(self, wire: Wire, where: str, until: float) -> None:
        self.wire = wire
        self._where = where
        self._until = until

    def greet(self) -> None:
        if self._receive(8) != nbd.INIT_MAGIC:
            raise Malformed("its greeting is not NBD's")
        if self._receive(8) != nbd.OPTION_MAGIC:
            raise Malformed("it speaks the old style, which is not supported")
        (flags,) = struct.unpack(">H", self._receive(2))
        if not flags & nbd.FIXED_NEWSTYLE:
            raise Malformed("it lacks the fixed new style")
        self.wire.send(struct.pack(">I", flags & (nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)))

    def start_tls(self) -> None:
        for kind, payload in self._ask(nbd.option(nbd.OPT_STARTTLS), nbd.OPT_STARTTLS):
            if kind & nbd.REP_ERROR:
                raise untrusted(self._where, _refusal(kind, payload))

    def agree(self, export: str, contexts: tuple[str, ...]) -> Terms:
        structured = True
        for kind, payload in self._ask(nbd.option(nbd.OPT_STRUCTURED), nbd.OPT_STRUCTURED):
            if kind & nbd.REP_ERROR:
                self._refuse(kind, payload, export, only=(nbd.REP_TLS_REQUIRED,))
                structured = False
        found: dict[int, str] = {}
        if contexts and structured:
            found = self._contexts(export, contexts)
        size = flags = -1
        min_block, max_block = 1, nbd.MAX_BLOCK
        for kind, payload in self._ask(nbd.go(export), nbd.OPT_GO):
            if kind & nbd.REP_ERROR:
                self._refuse(kind, payload, export)
            elif kind == nbd.REP_INFO:
                if len(payload) < 2:
                    raise Malformed(f"an information reply of {len(payload)} bytes")
                (about,) = struct.unpack_from(">H", payload)
                if about == nbd.INFO_EXPORT:
                    if len(payload) != 12:
                        raise Malformed(f"an export reply of {len(payload)} bytes")
                    size, flags = struct.unpack_from(">QH", payload, 2)
                elif about == nbd.INFO_BLOCK_SIZE:
                    if len(payload) != 14:
                        raise Malformed(f"a block size reply of {len(payload)} bytes")
                    min_block, _, max_block = struct.unpack_from(">III", payload, 2)
                    if min_block == 0 or min_block & (min_block - 1) or max_block < min_block:
                        raise Malformed(f"block sizes {min_block} to {max_block}")
        if size < 0 or not flags & nbd.HAS_FLAGS:
            raise Malformed("it did not describe the export")
        if size >= 1 << 63:
            raise Malformed(f"a size of {size} bytes")
        # Limits above ours would only make buffers larger.
        max_block = max(min_block, min(max_block, nbd.MAX_BLOCK) // min_block * min_block)
        return Terms(size, flags, structured, found, min_block, max_block)

    def _contexts(self, export: str, wanted: tuple[str, ...]) -> dict[int, str]:
        found: dict[int, str] = {}
        for kind, payload in self._ask(nbd.set_meta(export, wanted), nbd.OPT_SET_META):
            if kind & nbd.REP_ERROR:
                self._refuse(
                    kind, payload, export, only=(nbd.REP_UNKNOWN, nbd.REP_TLS_REQUIRED, nbd.REP_POLICY)
                )
                return {}
            if kind == nbd.REP_META:
                if len(payload) < 5:
                    raise Malformed(f"a context reply of {len(payload)} bytes")
                number = struct.unpack_from(">I", payload)[0]
                name = payload[4:].decode("utf-8", "replace")
                if name not in wanted or number in found or name in found.values():
                    raise Malformed(f"context {name!r}, which was not asked for or came twice")
                found[number] = name
        return found

    def _ask(self, message: bytes, option: int) -> Iterator[tuple[int, bytes]]:
        """All replies to one option, up to and with the one that ends it."""
        self.wire.send(message)
        for _ in range(1000):
            magic, about, kind, length = nbd.OPTION_REPLY.unpack(self._receive(nbd.OPTION_REPLY.size))
            if magic != nbd.OPTION_REPLY_MAGIC:
                raise Malformed(f"an option reply begins with {magic:#x}")
            if about != option:
                raise Malformed(f"a reply to option {about} instead of {option}")
            if length > nbd.MAX_OPTION_REPLY:
                raise Malformed(f"an option reply of {length} bytes")
            payload = self._receive(length)
            if kind == nbd.REP_ACK and payload:
                raise Malformed("an acknowledgement with data")
            yield kind, payload
            if kind == nbd.REP_ACK or kind & nbd.REP_ERROR:
                return
        raise Malformed("more than 1,000 replies to one option")

    def _refuse(self, kind: int, payload: bytes, export: str, only: tuple[int, ...] = ()) -> None:
        """The error of a refused option; with `only`, other refusals mean that the server lacks the option."""
        if only and kind not in only:
            return
        why = _refusal(kind, payload)
        if kind == nbd.REP_TLS_REQUIRED:
            raise untrusted(self._where, why)
        code = Code.SOURCE_READ_FAILED
        if kind == nbd.REP_UNKNOWN:
            code = Code.SOURCE_NOT_ELIGIBLE
        elif kind == nbd.REP_POLICY:
            code = Code.ACCESS_DENIED
        raise FarshoreError(code, f"{self._where} refuses export {export!r}: {why}.")

    def _receive(self, count: int) -> bytes:
        if time.monotonic() > self._until:
            raise TimeoutError("the negotiation did not end in time")
        data = bytearray(count)
        self.wire.read_into(memoryview(data))
        return bytes(data)


def _refusal(kind: int, payload: bytes) -> str:
    known = nbd.OPTION_ERRORS.get(kind, f"error {kind:#x}")
    said = " ".join(payload[: nbd.MAX_STRING].decode("utf-8", "replace").split())
    return f"{known} ({said})" if said else known
