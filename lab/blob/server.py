"""The blob service over HTTP or HTTPS: addresses, authorisation, faults, threads for everything that blocks."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from aiohttp import web

from . import xml
from .auth import Target, check_sas, check_shared_key, parse_query, split_path
from .call import Call, Reply, read_metadata
from .errors import BlobAuthError, NotModified, StorageError
from .faults import BlobFaults, Seen
from .routes import Operation, find
from .store import BlobStore

log = logging.getLogger(__name__)

STREAM_PIECE = 4 * 1024 * 1024
MAX_BODY = {"PutPage": 4 * 1024**2, "PutBlock": 4000 * 1024**2, "PutBlob": 5000 * 1024**2}
T = TypeVar("T")
BearerCheck = Callable[[str], bool]


class BlobServer:
    """Serves one or more storage accounts, path style: `<url>/ACCOUNT/container/blob`.

    `bearer` says whether a token is good (its bearer may do everything); None refuses tokens. `faults` is the
    control object; without one the server makes its own (`.faults`).
    """

    def __init__(
        self,
        stores: BlobStore | Sequence[BlobStore],
        *,
        faults: BlobFaults | None = None,
        bearer: BearerCheck | None = None,
        threads: int = 16,
    ) -> None:
        self.faults = faults or BlobFaults()
        self._bearer = bearer
        self._stores: dict[str, BlobStore] = {}
        self._thread_count = threads
        self._threads: ThreadPoolExecutor | None = None
        self._runner: web.ServerRunner | None = None
        self._secure = False
        self.url = ""
        for store in [stores] if isinstance(stores, BlobStore) else stores:
            self.add_store(store)

    def add_store(self, store: BlobStore) -> None:
        """Serve one more account from now on; copies between accounts of one server work."""
        self._stores[store.account] = store
        store.peer = self._stores.get
        self.faults.attach(store)

    def account_url(self, account: str) -> str:
        """What a client gives as `account_url`."""
        return f"{self.url}/{account}"

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        """Listen; port 0 lets the system choose. `url` is set afterwards."""
        self._threads = ThreadPoolExecutor(self._thread_count, thread_name_prefix="blob")
        server = web.Server(self._handle, read_bufsize=1024 * 1024, access_log=None, lingering_time=2.0)
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=ssl_context)
        await site.start()
        self._secure = ssl_context is not None
        bound = self._runner.addresses[0][1]
        self.url = f"{'https' if self._secure else 'http'}://{host}:{bound}"

    async def stop(self) -> None:
        """Stop listening and finish what runs; stores stay open (they are their owner's). `start` works again."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._threads is not None:
            await asyncio.to_thread(self._threads.shutdown, wait=True)
            self._threads = None

    # --- one request ----------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        request_id = str(uuid.uuid4())
        headers = {k.lower(): v for k, v in request.headers.items()}
        common = {
            "Server": "Windows-Azure-Blob/1.0 Microsoft-HTTPAPI/2.0",
            "x-ms-request-id": request_id,
            "x-ms-version": headers.get("x-ms-version", "2021-12-02"),
        }
        if "x-ms-client-request-id" in headers:
            common["x-ms-client-request-id"] = headers["x-ms-client-request-id"]
        raw_path, _, raw_query = request.raw_path.partition("?")
        target = split_path(raw_path, parse_query(raw_query))
        path = f"{target.account}/{target.container}/{target.blob}".rstrip("/")
        seen = Seen("?", path, 0)
        try:
            return await self._answer(request, headers, target, common, seen)
        except NotModified as e:
            seen.status = 304
            return web.Response(status=304, headers={**common, "ETag": e.etag})
        except StorageError as e:
            seen.status, seen.code = e.status, e.code
            return _error(e, common, request_id)
        except _CutError:
            seen.code = "reset"
            return _cut(request)
        except ConnectionError:
            seen.code = "client gone"
            raise
        except (
            Exception
        ) as e:  # the service answers 500 to whatever it did not foresee; the log has the trace
            log.exception("blob request failed: %s %s", request.method, path)
            seen.status, seen.code = 500, "InternalError"
            return _error(StorageError("InternalError", f"{type(e).__name__}: {e}"), common, request_id)
        finally:
            self.faults.seen(seen)

    async def _answer(
        self,
        request: web.BaseRequest,
        headers: dict[str, str],
        target: Target,
        common: dict[str, str],
        seen: Seen,
    ) -> web.StreamResponse:
        op = find(request.method, target, headers)
        seen.op = op.name
        verdict = self.faults.judge(op.name, seen.path)
        if verdict.delay:
            await asyncio.sleep(verdict.delay)
        if verdict.lose_lease:
            await self._run(lambda: self.faults.lose_lease(target.account, target.container, target.blob))
        if verdict.reset_before:
            raise _CutError
        if verdict.error is not None:
            raise verdict.error
        store = self._stores.get(target.account)
        if store is None:
            raise StorageError("ResourceNotFound", f"There is no storage account {target.account}.")
        granted = self._authorise(store, request, headers, target, op)
        seen.bytes = request.content_length or 0
        if op.resource == "o":
            self.faults.limits.take(seen.path, _cost(op, headers))
        call = Call(
            store,
            op.name,
            request.method,
            target,
            headers,
            read_metadata(list(request.headers.items())),
            self.account_url(store.account) + "/",
            granted=granted,
            peers=self._stores,
        )
        call.body = await _body(request, op.name)
        reply = await self._run(lambda: op.handler(call))
        if verdict.reset_after:
            raise _CutError
        seen.status = reply.status
        return await self._send(request, store, reply, common)

    def _authorise(
        self,
        store: BlobStore,
        request: web.BaseRequest,
        headers: dict[str, str],
        target: Target,
        op: Operation,
    ) -> str:
        """Permissions granted, "*" for the owner. 401 without any credentials, 403 with wrong ones."""
        given = headers.get("authorization", "")
        if given.lower().startswith("bearer "):
            if self._bearer is None or not self._bearer(given[7:].strip()):
                raise BlobAuthError("InvalidAuthenticationInfo", "The token is not accepted.")
            return "*"
        if given:
            check_shared_key(store, request.method, target, headers)
            return "*"
        if "sig" in target.query:
            return check_sas(
                store,
                target,
                permission=op.permission,
                resource=op.resource,
                https=self._secure,
                client=request.remote or "",
            )
        raise BlobAuthError(
            "NoAuthenticationInformation",
            "Server failed to authenticate the request. Please refer to the information in the www-authenticate header.",
            headers={"WWW-Authenticate": "Bearer"},
        )

    async def _send(
        self, request: web.BaseRequest, store: BlobStore, reply: Reply, common: dict[str, str]
    ) -> web.StreamResponse:
        headers = {**common, **reply.headers}
        row = reply.row
        if row is None:
            return web.Response(status=reply.status, headers=headers, body=reply.body)
        if reply.length <= STREAM_PIECE:
            start, length = reply.start, reply.length
            body = await self._run(lambda: store.read(row, start, length) if length else b"")
            return web.Response(status=reply.status, headers=headers, body=body)
        response = web.StreamResponse(status=reply.status, headers=headers)
        response.content_length = reply.length
        await response.prepare(request)
        done = 0
        while done < reply.length:
            at, piece = reply.start + done, min(STREAM_PIECE, reply.length - done)
            try:
                data = await self._run(lambda at=at, piece=piece: store.read(row, at, piece))
            except StorageError:
                return _cut(request)  # the blob went away: a truncated body, not a wrong one
            await response.write(data)
            done += piece
        await response.write_eof()
        return response

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class _CutError(Exception):
    """Leave the client without an answer."""


def _cut(request: web.BaseRequest) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


def _error(e: StorageError, common: dict[str, str], request_id: str) -> web.Response:
    headers = {**common, **e.headers, "x-ms-error-code": e.code, "Content-Type": "application/xml"}
    return web.Response(status=e.status, headers=headers, body=xml.error(e, request_id, time.time()))


def _cost(op: Operation, headers: dict[str, str]) -> int:
    """Bytes a request counts against the blob's bandwidth."""
    if op.name in ("PutPage", "PutBlob", "PutBlock"):
        return int(headers.get("content-length", "0"))
    if op.name == "GetBlob":
        text = headers.get("x-ms-range") or headers.get("range", "")
        low, _, high = text.removeprefix("bytes=").partition("-")
        return int(high) - int(low) + 1 if low.isdigit() and high.isdigit() else 0
    return 0


async def _body(request: web.BaseRequest, op: str) -> bytes | bytearray:
    length = request.content_length
    limit = MAX_BODY.get(op, 4 * 1024**2)
    if length is not None and length > limit:
        raise StorageError("RequestBodyTooLarge", f"The request body is larger than {limit} bytes.")
    if not request.can_read_body:
        return b""
    if length is None:
        raise StorageError("MissingContentLengthHeader")
    body = bytearray(length)
    at = 0
    async for piece in request.content.iter_any():
        body[at : at + len(piece)] = piece
        at += len(piece)
    if at != length:
        raise ConnectionResetError("the body ended early")
    return body
