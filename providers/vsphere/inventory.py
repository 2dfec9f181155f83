"""Which machine a person means: by name, inventory path, instance UUID or BIOS UUID.

One bulk read serves all machines of a plan; what it found is used for a minute, and each hit is checked against the
machine itself before it is used, because names move.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.vsphere.client import Client
from farshore.providers.vsphere.errors import vim

FRESH = 60.0  # seconds for which a bulk read answers questions
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
        """The one machine that `source` means. SourceMachineNotFound when there is none, or more than one."""
        known = self._known(FRESH)
        matches = [entry for entry in known if entry.means(source)]
        if len(matches) == 1 and self._still(matches[0], source):
            return matches[0]
        matches = [entry for entry in self._known(0.0) if entry.means(source)]
        exact = [entry for entry in matches if source.strip().lower() == entry.instance_uuid]
        if exact:
            matches = exact
        if len(matches) == 1:
            return matches[0]
        host = self._client.settings.host
        where = f"vCenter {host}" + (f", datacenter {self._datacenter}" if self._datacenter else "")
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
