"""Typed client of the control API, for tests and the demo. Standard library only; synchronous."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Literal

DiskName = int | str
"""Index from 0, device key, or label."""


class ControlError(RuntimeError):
    """The laboratory refused a control operation."""


class VCenterControl:
    """`url`: what the laboratory's ready line calls `control`. Operations raise `ControlError`."""

    def __init__(self, url: str, timeout: float = 180.0) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, operation: str, **arguments: Any) -> Any:
        """Any operation of `operations.Operations` by name."""
        request = urllib.request.Request(
            f"{self.url}/control/{operation}",
            data=json.dumps(arguments).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return json.load(answer)["result"]
        except urllib.error.HTTPError as error:
            raise ControlError(f"{operation}: {json.load(error)['error']}") from error
        except OSError as error:
            raise ControlError(f"{operation}: the laboratory does not answer: {error}") from error

    # ------------------------------------------------------------------ machines

    def info(self) -> dict[str, Any]:
        return self.call("info")

    def create_vm(
        self,
        name: str,
        disks: Sequence[int | dict[str, Any]],
        *,
        networks: Sequence[str | dict[str, Any]] = ("VM Network",),
        workload: dict[str, Any] | None = None,
        power: Literal["poweredOn", "poweredOff"] = "poweredOn",
        **fields: Any,
    ) -> dict[str, Any]:
        """`disks`: sizes in bytes or {size, label, datastore, mode, backing}; `workload`: see `guests`.

        `fields`: folder, datacenter, datastore, host, guest_id, num_cpu, memory_mb, firmware, tools, hostname,
        annotation, extra, shutdown ({seconds, hangs}), cbt.
        """
        return self.call(
            "create_vm",
            name=name,
            disks=list(disks),
            networks=list(networks),
            workload=workload,
            power=power,
            **fields,
        )

    def vm(self, name: str) -> dict[str, Any]:
        return self.call("vm", name=name)

    def vms(self) -> list[dict[str, Any]]:
        return self.call("vms")

    def destroy_vm(self, name: str) -> None:
        self.call("destroy_vm", name=name)

    def add_disk(self, name: str, size: int, label: str | None = None, **fields: Any) -> dict[str, Any]:
        return self.call("add_disk", name=name, size=size, label=label, **fields)

    def set_vm(self, name: str, **fields: Any) -> dict[str, Any]:
        return self.call("set_vm", name=name, **fields)

    def set_disk(self, name: str, disk: DiskName, **fields: Any) -> None:
        self.call("set_disk", name=name, disk=disk, **fields)

    def hold_extent(self, name: str, disk: DiskName, held: bool = True) -> None:
        self.call("hold_extent", name=name, disk=disk, held=held)

    # ------------------------------------------------------------------ guests

    def guest_write(self, name: str, disk: DiskName, offset: int, data: bytes) -> None:
        self.call("guest_write", name=name, disk=disk, offset=offset, data=base64.b64encode(data).decode())

    def guest_fill(self, name: str, disk: DiskName, offset: int, length: int, seed: int = 0) -> None:
        self.call("guest_fill", name=name, disk=disk, offset=offset, length=length, seed=seed)

    def guest_read(self, name: str, disk: DiskName, offset: int, length: int) -> bytes:
        return base64.b64decode(self.call("guest_read", name=name, disk=disk, offset=offset, length=length))

    def set_workload(self, name: str, **workload: Any) -> None:
        """`records_per_second`, `churn_bytes_per_second`, `area_size`, `hot_size`; what is left out stays."""
        self.call("set_workload", name=name, workload=workload)

    def clear_workload(self, name: str) -> None:
        self.call("set_workload", name=name, workload=None)

    def pause_guests(self) -> None:
        self.call("pause_guests")

    def resume_guests(self) -> None:
        self.call("resume_guests")

    def acks(self, name: str, last: int | None = None) -> list[dict[str, Any]]:
        return self.call("acks", name=name, last=last)

    def verify_ledger(self, name: str) -> dict[str, Any]:
        return self.call("verify_ledger", name=name)

    # ------------------------------------------------------------------ power and other people's actions

    def power_on(self, name: str) -> None:
        self.call("power_on", name=name)

    def power_off(self, name: str) -> None:
        self.call("power_off", name=name)

    def power_loss(self, name: str | None = None) -> list[str]:
        return self.call("power_loss", name=name)

    def extend(self, name: str, disk: DiskName, capacity: int) -> None:
        self.call("extend", name=name, disk=disk, capacity=capacity)

    def set_cbt(self, name: str, enabled: bool) -> None:
        self.call("set_cbt", name=name, enabled=enabled)

    def reset_cbt(self, name: str) -> None:
        self.call("reset_cbt", name=name)

    def snapshot(self, name: str, snapshot: str = "foreign", quiesce: bool = False) -> str:
        return self.call("snapshot", name=name, snapshot=snapshot, quiesce=quiesce)

    def remove_snapshot(self, name: str, snapshot: str, consolidate: bool = True) -> None:
        self.call("remove_snapshot", name=name, snapshot=snapshot, consolidate=consolidate)

    def revert(self, name: str, snapshot: str) -> None:
        self.call("revert", name=name, snapshot=snapshot)

    def set_datastore(self, name: str, kind: Literal["vmfs", "nfs_whole", "vsan", "vvol"]) -> None:
        self.call("set_datastore", name=name, kind=kind)

    # ------------------------------------------------------------------ sessions, rights, behaviour

    def sessions(self) -> list[dict[str, Any]]:
        return self.call("sessions")

    def kill_sessions(self, user: str | None = None) -> int:
        return self.call("kill_sessions", user=user)

    def advance_clock(self, seconds: float) -> None:
        self.call("advance_clock", seconds=seconds)

    def deny(self, what: str, **scope: str) -> None:
        """Take away one privilege (a method's name or `System.Read`); scope: vm, user, path."""
        self.call("set_denials", denials=[{"what": what, **scope}])

    def allow_all(self) -> None:
        self.call("set_denials", denials=[])

    def cut_connections(self) -> None:
        self.call("cut_connections")

    def settings(self, **values: Any) -> dict[str, Any]:
        """See `settings.Settings`."""
        return self.call("settings", **values)

    def add_fault(self, method: str, **rule: Any) -> int:
        """See `faults.FaultRule`: stage, action, vm, count, skip, probability, seed, when, fault, …"""
        return self.call("add_fault", method=method, **rule)

    def faults(self) -> list[dict[str, Any]]:
        return self.call("faults")

    def clear_faults(self, rule: int | None = None) -> None:
        self.call("clear_faults", id=rule)

    # ------------------------------------------------------------------ looking inside

    def digest_log(self, on: bool = True) -> None:
        self.call("settings", digest_log=on)

    def digests(self, name: str | None = None, snapshot: str | None = None) -> list[dict[str, Any]]:
        """Entries {vm, snapshot, moref, disk, label, bytes, sha256, time, ledger_last}."""
        return self.call("digests", name=name, snapshot=snapshot)

    def sha256(self, name: str, disk: DiskName, snapshot: str | None = None) -> str:
        return self.call("sha256", name=name, disk=disk, snapshot=snapshot)

    def requests(self, method: str | None = None) -> list[dict[str, Any]]:
        return self.call("requests", method=method)

    def clear_requests(self) -> None:
        self.call("clear_requests")

    def leaks(self) -> dict[str, Any]:
        return self.call("leaks")
