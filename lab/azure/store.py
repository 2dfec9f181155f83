"""State that survives `kill -9`: resources, operations, history, request log and knobs in one SQLite file.

Resources live in memory and are written through. Committed writes are in the kernel's page cache, so they outlive the
process; `synchronous=OFF` gives up only what a power cut would take, which no test of the laboratory asks for.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from farshore.lab.azure.model import Json, Resource, new_etag

_SCHEMA = """
create table if not exists resources (key text primary key, doc text not null);
create table if not exists operations (id text primary key, status text not null, doc text not null);
create table if not exists history (
  seq integer primary key autoincrement, at real not null, event text not null, id text not null, type text not null,
  tags text not null);
create table if not exists requests (seq integer primary key autoincrement, at real not null, doc text not null);
create table if not exists settings (name text primary key, doc text not null);
"""
_KEEP_REQUESTS = 20_000


class Store:
    """All methods belong to the event loop's thread."""

    def __init__(self, file: Path) -> None:
        self._db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=off")
        self._db.executescript(_SCHEMA)
        self.resources: dict[str, Resource] = {
            key: Resource(**json.loads(doc))
            for key, doc in self._db.execute("select key, doc from resources")
        }
        self._in_transaction = False
        self._requests_since_prune = 0

    def close(self) -> None:
        self._db.close()

    def begin(self) -> None:
        """Start collecting the writes of one request; `commit` makes them one step."""
        if not self._in_transaction:
            self._db.execute("begin")
            self._in_transaction = True

    def commit(self) -> None:
        if self._in_transaction:
            self._db.execute("commit")
            self._in_transaction = False

    # resources

    def get(self, id_: str | None) -> Resource | None:
        return self.resources.get(id_.lower()) if id_ else None

    def put(self, resource: Resource) -> None:
        """Write a resource; it gets a new ETag."""
        resource.etag = new_etag()
        resource.changed = time.time()
        self.resources[resource.key] = resource
        self._db.execute(
            "insert or replace into resources values (?, ?)", (resource.key, json.dumps(asdict(resource)))
        )

    def create(self, resource: Resource) -> None:
        resource.created = time.time()
        self.put(resource)
        self.event("created", resource)

    def remove(self, resource: Resource) -> None:
        if self.resources.pop(resource.key, None) is not None:
            self._db.execute("delete from resources where key = ?", (resource.key,))
            self.event("deleted", resource)

    def of_type(self, type_: str, group: str | None = None) -> list[Resource]:
        wanted, in_group = type_.lower(), group.lower() if group else None
        return sorted(
            (
                r
                for r in self.resources.values()
                if r.type.lower() == wanted and (in_group is None or r.group.lower() == in_group)
            ),
            key=lambda r: r.key,
        )

    def children(self, parent: Resource, type_: str) -> list[Resource]:
        prefix, wanted = parent.key + "/", type_.lower()
        return sorted(
            (r for r in self.resources.values() if r.type.lower() == wanted and r.key.startswith(prefix)),
            key=lambda r: r.created,
        )

    # history

    def event(self, event: str, resource: Resource) -> None:
        self._db.execute(
            "insert into history (at, event, id, type, tags) values (?, ?, ?, ?, ?)",
            (time.time(), event, resource.id, resource.type, json.dumps(resource.tags)),
        )

    def history(self) -> list[Json]:
        rows = self._db.execute("select seq, at, event, id, type, tags from history order by seq")
        return [
            {"seq": seq, "at": at, "event": event, "id": id_, "type": type_, "tags": json.loads(tags)}
            for seq, at, event, id_, type_, tags in rows
        ]

    # operations

    def save_operation(self, id_: str, status: str, doc: Json) -> None:
        self._db.execute("insert or replace into operations values (?, ?, ?)", (id_, status, json.dumps(doc)))

    def operations(self) -> Iterator[Json]:
        for (doc,) in self._db.execute("select doc from operations").fetchall():
            yield json.loads(doc)

    # request log

    def log(self, doc: Json) -> None:
        self._db.execute("insert into requests (at, doc) values (?, ?)", (doc["at"], json.dumps(doc)))
        self._requests_since_prune += 1
        if self._requests_since_prune >= 1000:
            self._requests_since_prune = 0
            self._db.execute(
                "delete from requests where seq <= (select max(seq) from requests) - ?", (_KEEP_REQUESTS,)
            )

    def requests(self, after: int = 0) -> list[Json]:
        rows = self._db.execute("select seq, doc from requests where seq > ? order by seq", (after,))
        return [{"seq": seq, **json.loads(doc)} for seq, doc in rows]

    def clear_requests(self) -> None:
        self._db.execute("delete from requests")

    # settings

    def setting(self, name: str, default: Any = None) -> Any:
        row = self._db.execute("select doc from settings where name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else default

    def set_setting(self, name: str, value: Any) -> None:
        self._db.execute("insert or replace into settings values (?, ?)", (name, json.dumps(value)))
