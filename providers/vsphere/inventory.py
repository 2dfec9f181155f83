"""Which machine a person means: by name, inventory path, instance UUID or BIOS UUID.

One bulk read serves all machines of a plan; what it found is used for a minute, and each hit is checked against the
machine itself before it is used, because names move.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.vsphere.client import Client
from farshore.providers.vsphere.errors import vim

FRESH = 60.0  # seconds for which a bulk read answers questions
_PINNED = re.compile(r"(.*)#([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.IGNORECASE | re.DOTALL)
_MACHINE_PATHS = ("name", "parent", "parentVApp", "config.uuid", "config.instanceUuid", "config.template")


@dataclass(frozen=True, slots=True)
class Entry:
    """A machine in the tree."""

    reference: Any
    name: str
    path: str  # "DC/vm/folder/name", as `govc ls` prints it, without the leading slash
    datacenter: str  # inventory path of its datacenter, for dcPath
    uuid: str
    instance_uuid: str

    @property
    def moid(self) -> str:
        return self.reference._GetMoId()

    def means(self, source: str) -> bool:
        """Whether a person who wrote `source` may mean this machine."""
        wanted = source.strip().strip("/")
        return wanted in (
            self.name,
            self.path,
            self.path.replace("/vm/", "/", 1),
            self.moid,
        ) or wanted.lower() in (self.uuid, self.instance_uuid)


class Inventory:
    """The machines of one vCenter."""

    def __init__(self, client: Client, datacenter: str | None) -> None:
        self._client = client
        self._datacenter = datacenter.strip("/") if datacenter else None
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._read_at = float("-inf")

    def find(self, source: str) -> Entry:
        """The one machine that `source` means. SourceMachineNotFound when there is none, or more than one.

        `name#uuid` means the machine of this instance UUID, also under a new name; it is an error when another machine
        has the name now.
        """
        name, pin = split_pin(source)
        matches = _meant(self._known(FRESH), name, pin)
        if len(matches) == 1 and self._still(matches[0], source):
            return matches[0]
        known = self._known(0.0)
        matches = _meant(known, name, pin)
        exact = [entry for entry in matches if source.strip().lower() == entry.instance_uuid]
        if exact:
            matches = exact
        if len(matches) == 1:
            return matches[0]
        host = self._client.settings.host
        where = f"vCenter {host}" + (f", datacenter {self._datacenter}" if self._datacenter else "")
        if pin and not matches:
            raise _lost(where, name, pin, [entry for entry in known if entry.means(name)])
        if not matches:
            raise FarshoreError(
                Code.SOURCE_MACHINE_NOT_FOUND, f"{where} has no machine {source!r}.", subject=source
            )
        paths = ", ".join(sorted(f"/{entry.path} (instance UUID {entry.instance_uuid})" for entry in matches))
        raise FarshoreError(
            Code.SOURCE_MACHINE_NOT_FOUND,
            f"{where} has {len(matches)} machines {source!r}: {paths}.",
            subject=source,
            causes=("The name is not unique.",),
            action="Use the inventory path or the instance UUID as the machine's source in the plan.",
        )

    def forget(self) -> None:
        """The next question reads anew."""
        with self._lock:
            self._read_at = float("-inf")

    def _known(self, fresh: float) -> list[Entry]:
        asked = time.monotonic()
        with self._lock:  # whoever waited here for another's bulk read uses its result
            if self._read_at < asked - fresh:
                begun = time.monotonic()
                self._entries = self._read()
                self._read_at = begun
            return self._entries

    def _still(self, entry: Entry, source: str) -> bool:
        try:
            now = self._client.read(
                entry.reference,
                ("name", "config.uuid", "config.instanceUuid"),
                doing=f"finding {source}",
                subject=source,
            )
        except FarshoreError as exc:
            if exc.code is Code.SOURCE_MACHINE_NOT_FOUND:
                return False
            raise
        return (
            unquote(now.get("name", "")) == entry.name
            and str(now.get("config.instanceUuid", "")).lower() == entry.instance_uuid
            and str(now.get("config.uuid", "")).lower() == entry.uuid
        )

    def _read(self) -> list[Entry]:
        rows = self._client.read_all(
            {
                vim.VirtualMachine: _MACHINE_PATHS,
                vim.Folder: ("name", "parent"),
                vim.Datacenter: ("name", "parent"),
                vim.VirtualApp: ("name", "parent", "parentFolder"),
            },
            doing="reading the inventory",
        )
        nodes = {reference._GetMoId(): (reference, values) for reference, values in rows}
        root = self._client.content.rootFolder._GetMoId()
        entries: list[Entry] = []
        for reference, values in rows:
            if not isinstance(reference, vim.VirtualMachine) or "name" not in values:
                continue
            path, datacenter = _climb(reference, nodes, root)
            if self._datacenter is not None and datacenter != self._datacenter:
                continue
            entries.append(
                Entry(
                    reference=self._client.bind(reference),
                    name=unquote(values["name"]),
                    path=path,
                    datacenter=datacenter,
                    uuid=str(values.get("config.uuid", "")).lower(),
                    instance_uuid=str(values.get("config.instanceUuid", "")).lower(),
                )
            )
        return entries


def split_pin(source: str) -> tuple[str, str]:
    """Name and instance UUID, in lower case, of `name#uuid`; ("…", "") for all other sources."""
    match = _PINNED.fullmatch(source.strip())
    return (match[1], match[2].lower()) if match else (source, "")


def _meant(known: Sequence[Entry], name: str, pin: str) -> list[Entry]:
    """Which machines a source means."""
    if not pin:
        return [entry for entry in known if entry.means(name)]
    pinned = [entry for entry in known if entry.instance_uuid == pin]
    if not any(entry.means(name) for entry in pinned) and any(entry.means(name) for entry in known):
        return []
    return pinned


def _lost(where: str, name: str, pin: str, others: Sequence[Entry]) -> FarshoreError:
    """A pinned machine that is not there, or whose name another one has."""
    if others:
        paths = ", ".join(f"/{entry.path} (instance UUID {entry.instance_uuid})" for entry in others)
        text = f"another machine has this name now: {paths}"
    else:
        text = "the machine with this id is gone"
    return FarshoreError(
        Code.SOURCE_MACHINE_NOT_FOUND,
        f"{where} no longer has {name!r} with instance UUID {pin}: {text}.",
        subject=name,
        causes=("The machine was deleted, restored or replaced by another one.",),
        action="Protect the new machine anew if it is the one that is meant; else give the name back.",
    )


def _climb(reference: Any, nodes: Mapping[str, tuple[Any, Mapping[str, Any]]], root: str) -> tuple[str, str]:
    """Inventory path of a machine, and of its datacenter. Names hold `%2f` for a slash, as the API has them."""
    names: list[str] = []
    datacenter: list[str] | None = None
    here: Any = reference
    while here is not None and here._GetMoId() != root:
        values = nodes.get(here._GetMoId(), (here, {}))[1]
        if isinstance(here, vim.Datacenter):
            datacenter = []
        name = str(values.get("name", here._GetMoId()))
        names.insert(0, name)
        if datacenter is not None:
            datacenter.insert(0, name)
        here = values.get("parent") or values.get("parentFolder") or values.get("parentVApp")
    return "/".join(names), "/".join(datacenter or [])
