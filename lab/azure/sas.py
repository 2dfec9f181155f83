"""Bytes behind a disk's SAS, in the page-blob dialect: Get (with ranges), properties, page ranges and diffs, Put Page."""

from __future__ import annotations

import asyncio
import hmac
import os
import re
import time
from email.utils import formatdate
from pathlib import Path

from aiohttp import web

from farshore.lab.azure import diskfiles, disks
from farshore.lab.azure.model import DISK, SNAPSHOT, Resource
from farshore.lab.azure.world import World

ACCOUNT = "md-lab"
_MAX_PUT = 4 << 20
_CHUNK = 1 << 20


class Refused(Exception):
    """An error in the storage service's dialect."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


async def handle(world: World, request: web.Request) -> web.StreamResponse:
    try:
        disk = _authorise(world, request)
        path = disks.file_of(world, disk)
        comp = request.query.get("comp")
        if request.method == "PUT" and comp == "page":
            return await _put_page(request, path)
        if request.method == "GET" and comp == "pagelist":
            return await _page_list(world, request, disk, path)
        if request.method in {"GET", "HEAD"} and comp is None:
            return await _get(request, disk, path)
        raise Refused(
            400, "UnsupportedHttpVerb", "Disks answer Get, properties, page ranges and Put Page only."
        )
    except Refused as refusal:
        body = f"<?xml version='1.0' encoding='utf-8'?><Error><Code>{refusal.code}</Code><Message>{refusal.message}</Message></Error>"
        headers = {**_headers(), "x-ms-error-code": refusal.code}
        return web.Response(status=refusal.status, text=body, content_type="application/xml", headers=headers)


def _authorise(world: World, request: web.Request) -> Resource:
    parts = request.path.strip("/").split("/")
    unique = parts[1] if len(parts) == 3 else ""
    for type_ in (DISK, SNAPSHOT):
        for disk in world.store.of_type(type_):
            if disk.properties.get("uniqueId") == unique:
                return _check_access(disk, request)
    raise Refused(404, "ResourceNotFound", "The specified resource does not exist.")


def _check_access(disk: Resource, request: web.Request) -> Resource:
    access = disk.hidden.get("access")
    if not access or not hmac.compare_digest(str(access["sig"]), request.query.get("sig", "")):
        raise Refused(
            403, "AuthenticationFailed", "Server failed to authenticate the request: access was not granted."
        )
    if time.time() >= access["until"]:
        raise Refused(
            403,
            "AuthenticationFailed",
            "Server failed to authenticate the request: the signature has expired.",
        )
    if request.method == "PUT" and access["access"] != "Write":
        raise Refused(403, "AuthorizationPermissionMismatch", "This signature does not allow writing.")
    return disk


def _headers() -> dict[str, str]:
    return {
        "x-ms-version": "2018-03-28",
        "x-ms-request-id": os.urandom(16).hex(),
        "Last-Modified": formatdate(usegmt=True),
    }


def _size(disk: Resource, path: Path) -> int:
    """A readable disk looks like its VHD: the bytes and a footer; one being uploaded has its room for the footer already."""
    return path.stat().st_size + (0 if disk.hidden.get("upload") else diskfiles.FOOTER)


_RANGE = re.compile(r"^bytes=(\d+)-(\d*)$")


def _range(request: web.Request, size: int) -> tuple[int, int] | None:
    text = request.headers.get("x-ms-range") or request.headers.get("Range")
    if text is None:
        return None
    found = _RANGE.match(text)
    if found is None or int(found[1]) >= size:
        raise Refused(
            416, "InvalidRange", "The range specified is invalid for the current size of the resource."
        )
    return int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)


async def _get(request: web.Request, disk: Resource, path: Path) -> web.StreamResponse:
    size = _size(disk, path)
    wanted = _range(request, size) if request.method == "GET" else None
    start, end = wanted or (0, size)
    headers = {
        **_headers(),
        "Accept-Ranges": "bytes",
        "Content-Length": str(end - start),
        "Content-Type": "application/octet-stream",
        "ETag": f'"{disk.properties["uniqueId"]}"',
        "x-ms-blob-type": "PageBlob",
        "x-ms-blob-sequence-number": "0",
    }
    if wanted is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    response = web.StreamResponse(status=206 if wanted else 200, headers=headers)
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    footer = b"" if disk.hidden.get("upload") else _footer(disk, path)
    for at in range(start, end, _CHUNK):
        await response.write(await asyncio.to_thread(_read, path, footer, at, min(_CHUNK, end - at)))
    await response.write_eof()
    return response


def _footer(disk: Resource, path: Path) -> bytes:
    return diskfiles.vhd_footer(
        path.stat().st_size, bytes.fromhex(str(disk.properties["uniqueId"]).replace("-", ""))
    )


def _read(path: Path, footer: bytes, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        data = os.pread(file.fileno(), length, offset)
    if len(data) < length:
        at = offset + len(data) - path.stat().st_size
        data += footer[at : at + length - len(data)]
    return data


async def _put_page(request: web.Request, path: Path) -> web.Response:
    size = path.stat().st_size
    wanted = _range(request, size)
    if wanted is None or wanted[0] % 512 or wanted[1] % 512:
        raise Refused(416, "InvalidPageRange", "The page range specified is invalid.")
    start, end = wanted
    kind = request.headers.get("x-ms-page-write", "").lower()
    data = await request.read()
    if kind == "update":
        if end - start > _MAX_PUT:
            raise Refused(413, "RequestBodyTooLarge", "The request body is larger than 4 MiB.")
        if len(data) != end - start:
            raise Refused(400, "InvalidHeaderValue", "Content-Length does not agree with the range.")
    elif kind != "clear":
        raise Refused(400, "InvalidHeaderValue", "x-ms-page-write must be update or clear.")
    await asyncio.to_thread(_write, path, start, end, data if kind == "update" else None)
    headers = {**_headers(), "ETag": f'"{os.urandom(8).hex()}"', "x-ms-blob-sequence-number": "0"}
    return web.Response(status=201, headers=headers)


def _write(path: Path, start: int, end: int, data: bytes | None) -> None:
    with path.open("r+b") as file:
        for at in range(start, end, _CHUNK):
            piece = (
                data[at - start : at - start + _CHUNK] if data is not None else bytes(min(_CHUNK, end - at))
            )
            os.pwrite(file.fileno(), piece, at)


async def _page_list(world: World, request: web.Request, disk: Resource, path: Path) -> web.Response:
    size = _size(disk, path)
    start, end = _range(request, size) or (0, size)
    previous = request.headers.get("x-ms-previous-snapshot-url")
    rows: list[tuple[int, int, bool]]
    if previous is not None:
        older = disks.file_of(world, _previous(world, previous))
        rows = await asyncio.to_thread(lambda: list(diskfiles.differences(path, older, start, end)))
    else:
        found = await asyncio.to_thread(diskfiles.page_ranges, path, start, end)
        rows = [(offset, length, False) for offset, length in found]
    tags = {False: "PageRange", True: "ClearRange"}
    body = "".join(
        f"<{tags[cleared]}><Start>{offset}</Start><End>{offset + length - 1}</End></{tags[cleared]}>"
        for offset, length, cleared in rows
    )
    return web.Response(
        text=f"<?xml version='1.0' encoding='utf-8'?><PageList>{body}</PageList>",
        content_type="application/xml",
        headers={**_headers(), "x-ms-blob-content-length": str(size), "ETag": '"0"'},
    )


def _previous(world: World, url: str) -> Resource:
    """The snapshot behind another one's SAS URL."""
    unique = url.split("?", 1)[0].rstrip("/").split("/")[-2:]
    for snapshot in world.store.of_type(SNAPSHOT):
        if snapshot.properties.get("uniqueId") == unique[0]:
            return snapshot
    raise Refused(400, "PreviousSnapshotNotFound", "The previous snapshot is not found.")
