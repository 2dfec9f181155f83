"""The laboratory vCenter as a whole: state, dispatch, start and stop."""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import resource
import shutil
import threading
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from farshore.lab import tls
from farshore.lab.vcenter import config as configuration
from farshore.lab.vcenter import provision, soap
from farshore.lab.vcenter.collector import PropertyCollector, ViewManager
from farshore.lab.vcenter.control_server import ControlServer
from farshore.lab.vcenter.disks import Disk
from farshore.lab.vcenter.faults import Faults
from farshore.lab.vcenter.folder import FolderService
from farshore.lab.vcenter.guests import Guests
from farshore.lab.vcenter.inventory import (
    Folder,
    Host,
    SearchIndex,
    ServiceInstance,
    Tree,
    VirtualDiskManager,
)
from farshore.lab.vcenter.machine import Machine
from farshore.lab.vcenter.objects import Entity, InvalidPathError, Managed
from farshore.lab.vcenter.server import Server
from farshore.lab.vcenter.sessions import Session, SessionManager, Sessions
from farshore.lab.vcenter.settings import Settings
from farshore.lab.vcenter.store import Store
from farshore.lab.vcenter.tasks import Task, TaskManager, Tasks
from farshore.lab.vcenter.vim import ManagedObject, make_fault, vim, vmodl

LOGGED = 20_000
"""Requests remembered."""
_STATIC_NUMBERS = 1
_DYNAMIC_NUMBERS = 1001
_PUBLIC = {"RetrieveServiceContent", "Login", "CurrentTime"}


class RootInUseError(RuntimeError):
    """Another laboratory runs on this root directory."""


class Calls(threading.local):
    """The call that the present thread serves."""

    session: Session | None = None
    cookie: str | None = None
    agent: str = ""
    set_cookie: str | None = None

    def begin(self, cookie: str | None, agent: str) -> None:
        self.session, self.cookie, self.agent, self.set_cookie = None, cookie, agent, None

    def end(self) -> None:
        self.session = None

    @property
    def user(self) -> str:
        return self.session.user if self.session else "LAB\\root"


class LabVCenter:
    """A vCenter with real bytes behind it. State lives in `root` and survives SIGKILL of the process."""

    def __init__(
        self,
        root: Path,
        config: Path | dict[str, Any] | None = None,
        *,
        port: int = 0,
        control_port: int = 0,
        user: str | None = None,
        password: str | None = None,
    ) -> None:
        """`config` (see `config`) counts only at the first start on `root`; ports are remembered there.

        Raises `RootInUseError`.
        """
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock_file = (self.root / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise RootInUseError(f"another laboratory runs on {self.root}") from error
        _raise_file_limit()
        self.lock = threading.RLock()
        self.started = dt.datetime.now(dt.UTC)
        self.stopping = False
        self.generation = 0
        self._change = threading.Condition()
        self._objects: dict[str, Managed] = {}
        self._machines: dict[str, Machine] = {}
        self._withdrawn: dict[str, Machine] = {}
        self._places: dict[tuple[str, str], Machine] = {}
        self._denials: list[dict[str, str]] = []
        self._requests: deque[dict[str, Any]] = deque(maxlen=LOGGED)
        self.calls = Calls()
        self.store = Store(self.root / "lab.sqlite")
        self.faults = Faults()
        self._wanted_ports = (port, control_port)
        self._load(
            configuration.load(config) if self.store.get("lab", "config") is None else None, user, password
        )
        self.sessions = Sessions(self)
        self.tasks = Tasks(self)
        self.guests = Guests(self)
        self.folder = FolderService(self)
        self._services()
        self.tree = Tree(self)
        self.tree.build(self._config)
        self.tree.restore_folders()
        self.tree.restore_kinds()
        self._restore_machines()
        self._server: Server | None = None
        self._control: ControlServer | None = None

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Listen, and let the guests of powered-on machines run on."""
        saved: dict[str, int] = self.store.get("lab", "ports") or {}
        context = tls.server_context(self.root / "tls")
        self._server = Server(self._wanted_ports[0] or saved.get("sdk", 0), context, self)
        self._control = ControlServer(self._wanted_ports[1] or saved.get("control", 0), self)
        self.store.put("lab", "ports", {"sdk": self.port, "control": self.control_port})
        self._first_machines()
        for machine in self.machines():
            if machine.powered_on:
                self.guests.power_on(machine, booted=False)
        for server in (self._server, self._control):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Orderly end of the laboratory. Powered-on machines run on at the next start."""
        if self.stopping:
            return
        self.stopping = True
        self.wake()
        self.guests.stop_all()
        for server in (self._server, self._control):
            if server is not None:
                server.shutdown()
                server.server_close()
        if self._server is not None:
            self._server.cut_connections()
        for machine in [*self._machines.values(), *self._withdrawn.values()]:
            with machine.io:
                for disk in machine.disks.values():
                    disk.close()
        self.store.close()
        self._lock_file.close()

    def __enter__(self) -> LabVCenter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def host(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        assert self._server is not None
        return self._server.server_address[1]

    @property
    def control_port(self) -> int:
        assert self._control is not None
        return self._control.server_address[1]

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}/sdk"

    @property
    def control_url(self) -> str:
        return f"http://{self.host}:{self.control_port}"

    @property
    def ca_file(self) -> Path:
        return tls.ensure_ca(self.root / "tls").ca_file

    @property
    def thumbprint(self) -> str:
        """SHA-256 of the server's certificate."""
        return tls.thumbprint(tls.ensure_server_cert(self.root / "tls")[0])

    @property
    def acks_path(self) -> Path:
        return self.root / "acks"

    def cut_connections(self) -> None:
        if self._server is not None:
            self._server.cut_connections()

    # ------------------------------------------------------------------ state

    def _load(self, fresh: dict[str, Any] | None, user: str | None, password: str | None) -> None:
        if fresh is not None:
            if user is not None or password is not None:
                fresh["credentials"] = {
                    user or configuration.DEFAULT_USER: password or configuration.DEFAULT_PASSWORD
                }
            identity = {"instance_uuid": str(uuid.uuid4()), "next": _DYNAMIC_NUMBERS}
            self.store.put("lab", "identity", identity)
            settings = Settings()
            settings.update(**fresh["settings"])
            self.store.put("lab", "settings", settings.to_json())
            self.store.put("lab", "config", fresh)
        self._config: dict[str, Any] = self.store.get("lab", "config") or {}
        identity = self.store.get("lab", "identity") or {}
        self.instance_uuid: str = identity["instance_uuid"]
        self._next: int = identity["next"]
        self._next_static = _STATIC_NUMBERS
        self.settings = Settings()
        self.settings.update(**(self.store.get("lab", "settings") or {}))
        self._denials = self.store.get("lab", "denials") or []
        self.credentials: dict[str, str] = dict(self._config["credentials"])

    def save_settings(self) -> None:
        self.store.put("lab", "settings", self.settings.to_json())

    def _services(self) -> None:
        for service in (
            ServiceInstance(self, "ServiceInstance"),
            SessionManager(self, "SessionManager"),
            ViewManager(self, "ViewManager"),
            TaskManager(self, "TaskManager"),
            SearchIndex(self, "SearchIndex"),
            VirtualDiskManager(self, "virtualDiskManager"),
        ):
            self.add(service)

    def _restore_machines(self) -> None:
        records = self.store.all("vm")
        for moid in sorted(records, key=lambda m: int(m.rpartition("-")[2])):
            record = records[moid]
            folder, host = self.find_moid(record["folder"]), self.find_moid(record["host"])
            assert isinstance(folder, Folder)
            assert isinstance(host, Host)
            machine = Machine(self, record, folder, host)
            if self.settings.after_crash == "poweredOff" and machine.powered_on:
                machine.power = "poweredOff"
                self.store.put("vm", moid, machine.to_json())
            if machine.registered:
                self.enlist(machine)
            else:
                self._withdrawn[moid] = machine

    def _first_machines(self) -> None:
        """Machines of the configuration, created at the first start; each once."""
        for spec in self._config["vms"]:
            if self.store.get("first", spec["name"]) is None:
                self.create_machine(spec)
                self.store.put("first", spec["name"], True)

    def create_machine(self, spec: dict[str, Any]) -> Machine:
        """Create a machine from a control or configuration entry: with its workload, powered on if asked for."""
        machine = provision.create(self, spec)
        if spec.get("workload") is not None:
            self.guests.set_workload(machine, spec["workload"])
        if spec.get("cbt"):
            machine.set_change_tracking(True)
        if spec.get("power", "poweredOff") == "poweredOn":
            machine.power_on()
        return machine

    def next_number(self) -> int:
        """A number for a new object, never used again."""
        with self.lock:
            number = self._next
            self._next += 1
            if number % 100 == 1 or self._next > self._reserved:
                self._reserved = self._next + 100
                identity = {"instance_uuid": self.instance_uuid, "next": self._reserved}
                self.store.put("lab", "identity", identity)
            return number

    _reserved = 0

    def next_static(self) -> int:
        """A number for an object of the configured tree: the same at every start."""
        self._next_static += 1
        return self._next_static

    # ------------------------------------------------------------------ objects

    def add(self, item: Managed) -> None:
        with self.lock:
            self._objects[item.moid] = item
        self.touch(item)

    def forget(self, item: Managed) -> None:
        with self.lock:
            if self._objects.get(item.moid) is item:
                del self._objects[item.moid]
        self.touch(item)

    def find_moid(self, moid: str) -> Managed | None:
        if moid == "propertyCollector":
            session = self.calls.session
            return session.objects.get(moid) if session else None
        return self._objects.get(moid)

    def find(self, ref: Any) -> Managed | None:
        """The object of a reference, None if it is gone."""
        return self.find_moid(ref._moId)

    def entities(self) -> list[Entity]:
        with self.lock:
            return [o for o in self._objects.values() if isinstance(o, Entity)]

    def machines(self) -> list[Machine]:
        with self.lock:
            return list(self._machines.values())

    def withdrawn(self) -> list[Machine]:
        """Unregistered machines whose files are still there."""
        with self.lock:
            return list(self._withdrawn.values())

    def machine(self, which: str) -> Machine:
        """By name or moid. Raises `ValueError`."""
        found = [m for m in self.machines() if which in (m.name, m.moid)]
        if not found:
            raise ValueError(f"no machine {which!r}")
        return found[0]

    def machine_in(self, datastore: str, directory: str) -> Machine | None:
        """The machine that lives in a datastore directory."""
        return self._places.get((datastore, directory))

    def disk_by_name(self, file_name: str) -> tuple[Machine | None, Disk | None]:
        """Machine and disk of `[ds] dir/x.vmdk`."""
        for machine in self.machines():
            for disk in machine.disks.values():
                if file_name in (machine.file_name(disk, n) for n in list(disk.links)):
                    return machine, disk
        return None, None

    def enlist(self, machine: Machine) -> None:
        """Put a machine into the inventory."""
        with self.lock:
            self._withdrawn.pop(machine.moid, None)
            self._machines[machine.moid] = machine
            for place in {machine.datastore, *(d.datastore for d in machine.disks.values())}:
                self._places[(place, machine.directory)] = machine
            assert isinstance(machine.parent, Folder)
            machine.parent.entities[machine.moid] = machine
            for snapshot in machine.tree.all():
                self.add(snapshot)
        self.add(machine)
        self.touch(machine.parent)

    def withdraw(self, machine: Machine) -> None:
        """Take a machine out of the inventory; its files stay."""
        self._remove(machine)
        with self.lock:
            self._withdrawn[machine.moid] = machine

    def destroy(self, machine: Machine) -> None:
        """Delete a machine and its files."""
        self._remove(machine)
        self.store.delete("vm", machine.moid)
        with self.lock:
            for key in [k for k, m in self._places.items() if m is machine]:
                del self._places[key]
        with machine.io:
            for disk in machine.disks.values():
                disk.remove()
        for store in {machine.datastore, *(d.datastore for d in machine.disks.values())}:
            shutil.rmtree(machine.store_path(store), ignore_errors=True)
        shutil.rmtree(machine.state_path, ignore_errors=True)

    def _remove(self, machine: Machine) -> None:
        with self.lock:
            self._machines.pop(machine.moid, None)
            if isinstance(machine.parent, Folder):
                machine.parent.entities.pop(machine.moid, None)
                self.touch(machine.parent)
            for snapshot in machine.tree.all():
                self.forget(snapshot)
        self.forget(machine)

    # ------------------------------------------------------------------ change

    def touch(self, item: Managed) -> None:
        """Note that an object changed; wakes everybody who waits for updates."""
        with self._change:
            self.generation += 1
            item.generation = self.generation
            self._change.notify_all()

    def wake(self) -> None:
        with self._change:
            self.generation += 1
            self._change.notify_all()

    def wait_for_change(self, since: int, seconds: float) -> None:
        """Return when something changed after `since`, or after a while (at most five seconds)."""
        with self._change:
            if self.generation == since:
                self._change.wait(min(seconds, 5.0))

    def occupy(self, task: Task) -> Entity:
        """Reserve the task's entity for it. Raises `TaskInProgress`."""
        entity = task.entity
        with self.lock:
            busy = getattr(entity, "busy", None)
            if busy is not None:
                raise make_fault(
                    "vim.fault.TaskInProgress",
                    "The operation is not allowed in the current state: another task is already in progress.",
                    task=busy.ref,
                )
            if isinstance(entity, Machine):
                entity.busy = task
        return entity

    def release(self, entity: Entity, task: Task) -> None:
        with self.lock:
            if isinstance(entity, Machine) and entity.busy is task:
                entity.busy = None

    # ------------------------------------------------------------------ calls

    def dispatch(self, body: bytes) -> tuple[soap.Call, Any, Any]:
        """Carry out a SOAP request: (call, declared result type, value). Raises faults."""
        begin = time.monotonic()
        call = soap.decode(body)
        outcome, target = "ok", None
        session = self.sessions.find(self.calls.cookie)
        self.calls.session = session
        if session is not None:
            session.calls += 1
            session.waiting += 1
            session.objects.setdefault(
                "propertyCollector", PropertyCollector(self, "propertyCollector", session)
            )
        try:
            item = self.find(call.this)
            target = self._label(item)
            moid = item.moid if item else None
            self.faults.call(call.name, target, moid, "before")
            kind, value = self._invoke(call, item, session)
            self.faults.call(call.name, target, moid, "after")
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            if session is not None:
                session.waiting -= 1
                session.last_used = self.sessions.now()
            self.record(
                call.name, str(call.this._moId), target=target, session=session, outcome=outcome, begin=begin
            )
        return call, kind, value

    def _invoke(self, call: soap.Call, item: Managed | None, session: Session | None) -> tuple[Any, Any]:
        public = call.name in _PUBLIC or (call.name == "Fetch" and call.this._moId == "ServiceInstance")
        if session is None and not public:
            raise make_fault(
                "vim.fault.NotAuthenticated",
                "The session is not authenticated.",
                object=call.this,
                privilegeId="System.View",
            )
        if item is None:
            raise make_fault(
                "vmodl.fault.ManagedObjectNotFound",
                f"The object '{call.this}' has already been deleted or has not been completely created",
                obj=call.this,
            )
        if call.name == "Fetch":
            return self._fetch(item, call.arguments.get("prop", ""))
        function = item.method(call.name)
        if function is None:
            raise make_fault(
                "vmodl.fault.NotSupported", f"The operation {call.name} is not supported on the object."
            )
        denied = self.denied(call.name, item, None)
        if denied is not None:
            raise denied
        missing = [p.name for p in call.info.params if not p.flags & 4 and p.name not in call.arguments]
        lists = {p.name: p.type() for p in call.info.params if issubclass(p.type, list)}
        for name in missing:
            if name not in lists:
                raise make_fault("vmodl.fault.InvalidRequest", f"Missing parameter {name} of {call.name}.")
            call.arguments[name] = lists[name]
        return call.info.result, function(**call.arguments)

    def _fetch(self, item: Managed, name: str) -> tuple[Any, Any]:
        denied = self.denied("System.Read", item, name)
        if denied is not None:
            raise denied
        try:
            return item.info(name).type, item.value(name)
        except InvalidPathError as error:
            raise make_fault("vmodl.query.InvalidProperty", f"Invalid property {name}", name=name) from error

    def _label(self, item: Managed | None) -> str | None:
        """Name of the machine a call is about, for fault rules."""
        machine = getattr(item, "machine", None)
        return machine.name if isinstance(machine, Machine) else item.label if item else None

    def denied(self, what: str, item: Managed, path: str | None) -> Any:
        """A `NoPermission` fault if the user has lost that privilege (a method's name, or `System.Read`)."""
        for denial in self._denials:
            if (
                denial["what"] in ("*", what)
                and denial.get("vm", "*") in ("*", item.label, item.moid)
                and denial.get("user", "*") in ("*", self.calls.user)
                and (path is None or not denial.get("path") or path.startswith(denial["path"]))
            ):
                ref = item.ref if isinstance(item, Entity) else self.tree.root.ref
                return make_fault(
                    "vim.fault.NoPermission",
                    "Permission to perform this operation was denied.",
                    object=ref,
                    privilegeId=what,
                )
        return None

    def set_denials(self, denials: list[dict[str, str]]) -> None:
        self._denials = denials
        self.store.put("lab", "denials", denials)

    def record(
        self,
        method: str,
        moid: str,
        *,
        target: str | None,
        session: Session | None,
        outcome: str,
        begin: float,
    ) -> None:
        self._requests.append(
            {
                "time": time.time(),
                "method": method,
                "object": moid,
                "target": target,
                "session": session.key if session else None,
                "outcome": outcome,
                "ms": round((time.monotonic() - begin) * 1000, 2),
            }
        )

    def requests(self) -> list[dict[str, Any]]:
        return list(self._requests)

    def clear_requests(self) -> None:
        self._requests.clear()

    # ------------------------------------------------------------------ what it says of itself

    def about(self, product: str = "VMware vCenter Server", line: str = "vpx") -> Any:
        return vim.AboutInfo(
            name=product,
            fullName=f"{product} 8.0.3 build-24322831 (Farshore laboratory)",
            vendor="VMware, Inc.",
            version="8.0.3",
            build="24322831",
            localeVersion="INTL",
            localeBuild="000",
            osType="linux-x64",
            productLineId=line,
            apiType="VirtualCenter" if line == "vpx" else "HostAgent",
            apiVersion="8.0.3.0",
            instanceUuid=self.instance_uuid if line == "vpx" else None,
            licenseProductName="VMware VirtualCenter Server",
            licenseProductVersion="8.0",
        )

    def content(self) -> Any:
        return vim.ServiceInstanceContent(
            rootFolder=self.tree.root.ref,
            propertyCollector=vmodl.query.PropertyCollector("propertyCollector"),
            viewManager=vim.view.ViewManager("ViewManager"),
            about=self.about(),
            sessionManager=vim.SessionManager("SessionManager"),
            searchIndex=vim.SearchIndex("SearchIndex"),
            taskManager=vim.TaskManager("TaskManager"),
            virtualDiskManager=vim.VirtualDiskManager("virtualDiskManager"),
        )

    def describe(self) -> dict[str, Any]:
        """What a client has to know: the line that the process prints when it is ready."""
        return {
            "sdk": self.url,
            "control": self.control_url,
            "ca": str(self.ca_file),
            "thumbprint": self.thumbprint,
            "pid": os.getpid(),
        }


def _raise_file_limit() -> None:
    """Links and bitmaps keep files open; take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def read_ready_line(line: str) -> dict[str, Any]:
    """Parse what `python -m farshore.lab.vcenter` prints."""
    return json.loads(line)


__all__ = ["LabVCenter", "ManagedObject", "RootInUseError", "read_ready_line"]
