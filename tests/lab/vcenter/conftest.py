"""A laboratory vCenter in this process, and a pyVmomi client of it."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pyVim.connect import Disconnect, SmartConnect
from pyVmomi import vim, vmodl

from farshore.lab.vcenter import DEFAULT_PASSWORD, DEFAULT_USER, VCenterControl
from farshore.lab.vcenter.service import LabVCenter

MIB = 1 << 20
PC = vmodl.query.PropertyCollector


def eventually(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.01)


@dataclass
class Client:
    """What a product would do with pyVmomi and HTTP, without any of the product's care."""

    lab: Any
    port: int
    ca: Path
    user: str = DEFAULT_USER
    password: str = DEFAULT_PASSWORD
    si: Any = None
    web: http.client.HTTPSConnection | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def login(self) -> Client:
        self.context = ssl.create_default_context(cafile=self.ca)
        self.si = SmartConnect(
            host="127.0.0.1", port=self.port, user=self.user, pwd=self.password, sslContext=self.context
        )
        self.content = self.si.content
        self.cookie = self.si._stub.cookie.split(";")[0]
        return self

    def vm(self, name: str) -> Any:
        view = self.content.viewManager.CreateContainerView(
            self.content.rootFolder, [vim.VirtualMachine], True
        )
        try:
            return next(v for v in view.view if v.name == name)
        finally:
            view.DestroyView()

    def wait(self, task: Any, seconds: float = 60.0) -> Any:
        """Result of a task; its fault is raised."""
        info = eventually(
            lambda: i if (i := task.info).state in ("success", "error") else None, "the task", seconds
        )
        if info.state == "error":
            raise info.error
        return info.result

    def snapshot(self, vm: Any, name: str = "s", *, quiesce: bool = False) -> Any:
        return self.wait(vm.CreateSnapshot_Task(name=name, description="", memory=False, quiesce=quiesce))

    def remove(self, snapshot: Any, *, consolidate: bool = True) -> None:
        self.wait(snapshot.RemoveSnapshot_Task(removeChildren=False, consolidate=consolidate))

    def track(self, vm: Any, enabled: bool = True) -> None:
        self.wait(vm.ReconfigVM_Task(vim.vm.ConfigSpec(changeTrackingEnabled=enabled)))

    def changed(self, vm: Any, snapshot: Any, key: int, since: str, capacity: int) -> list[tuple[int, int]]:
        """All windows of a change query."""
        offset, areas = 0, []
        while offset < capacity:
            answer = vm.QueryChangedDiskAreas(snapshot, key, offset, since)
            assert answer.startOffset == offset
            assert answer.length > 0
            areas += [(a.start, a.length) for a in answer.changedArea]
            offset += answer.length
        assert offset == capacity
        return areas

    def request(
        self,
        method: str,
        path: str,
        *,
        query: str | None = None,
        cookie: bool = True,
        body: Any = None,
        **headers: str,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request to /folder; a kept connection is used again."""
        if self.web is None:
            self.web = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context, timeout=60)
        target = f"/folder/{quote(path)}?{query if query is not None else 'dcPath=DC0&dsName=ds1'}"
        sent = {**({"Cookie": self.cookie} if cookie else {}), **headers}
        try:
            self.web.request(method, target, body=body, headers=sent)
            answer = self.web.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        except (http.client.HTTPException, OSError):
            self.web.close()
            raise

    def read(self, path: str, start: int, length: int, **more: Any) -> bytes:
        status, headers, data = self.request(
            "GET", path, **{"Range": f"bytes={start}-{start + length - 1}"}, **more
        )
        assert status == 206, (status, data)
        assert headers["content-range"].startswith(f"bytes {start}-{start + length - 1}/")
        assert len(data) == length
        return data

    def close(self) -> None:
        if self.web is not None:
            self.web.close()
        if self.si is not None:
            Disconnect(self.si)


def disks(holder: Any) -> list[Any]:
    return [d for d in holder.config.hardware.device if isinstance(d, vim.vm.device.VirtualDisk)]


def extent(file_name: str) -> str:
    """`[ds1] web/web.vmdk` → `web/web-flat.vmdk`."""
    return file_name.partition("] ")[2].replace(".vmdk", "-flat.vmdk")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[LabVCenter]:
    service = LabVCenter(tmp_path / "lab")
    service.start()
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def control(lab: LabVCenter) -> VCenterControl:
    return VCenterControl(lab.control_url)


@pytest.fixture
def client(lab: LabVCenter) -> Iterator[Client]:
    made = Client(lab, lab.port, lab.ca_file).login()
    try:
        yield made
    finally:
        with contextlib.suppress(vim.fault.NotAuthenticated):  # the test may have ended the session itself
            made.close()
