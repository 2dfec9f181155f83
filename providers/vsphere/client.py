"""One vCenter session for a whole site: login and renewal, bulk reads, property watches, task waiter.

Blocking and thread-safe: pyVmomi is called from threads, several machines at once over one session. Every public
method raises FarshoreError, except what the caller's checkpoint raises.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from http.client import RemoteDisconnected
from typing import Any, TypeVar

from pyVmomi.SoapAdapter import SoapStubAdapter as _SoapStubAdapter

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.vsphere.errors import NETWORK_ERRORS, classify, vim, vmodl
from farshore.providers.vsphere.settings import VSphereSettings
from farshore.providers.vsphere.transport import PinnedConnection, tls_context

SoapStubAdapter: Any = _SoapStubAdapter
Tick = Callable[[Mapping[str, Any]], None]
T = TypeVar("T")

API_VERSION = (
    "vim.version.version11"  # vSphere 6.5: servers leave out fields that are newer than the client asks for
)
PAGE = 500  # objects in one page of a bulk read
_BROKEN_KEEPALIVE = (RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)

log = logging.getLogger(__name__)


class _SessionStub(SoapStubAdapter):
    """Keeps the cookie of its login. pyVmomi takes the cookie of every answer, so that a late answer to a request of the
    old session, which brings a new, unauthenticated one, would put every thread out of the new session."""

    _adopted = ""

    @property
    def cookie(self) -> str:
        return self._adopted

    @cookie.setter
    def cookie(self, value: str) -> None:
        """What answers bring is not taken."""

    def adopt(self, cookie: str) -> None:
        self._adopted = cookie


def no_tick(_: Mapping[str, Any]) -> None:
    """For callers that have nobody to tell."""


class Client:
    """The session. Logs in when first used; `close` logs out."""

    def __init__(self, settings: VSphereSettings) -> None:
        self.settings = settings
        self.tls = tls_context(settings)
        self._stub: Any = self._connect(_SessionStub, settings.max_connections + 2)
        self._lock = threading.Lock()
        self._generation = 0  # number of logins; 0: never logged in
        self._content: Any = None
        self._refused: FarshoreError | None = (
            None  # a wrong password is asked once, not by every machine for ever
        )
        self._refused_at = 0.0
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None

    def _connect(self, kind: Any, connections: int) -> Any:
        """A stub. Only the classes of pyVmomi that speak TLS are replaced; its pool, codec and deserializer are used."""
        stub = kind(
            host=self.settings.host,
            port=self.settings.port,
            version=API_VERSION,
            sslContext=self.tls,
            poolSize=connections,
            connectionPoolTimeout=30,
        )
        stub.scheme = PinnedConnection
        stub.schemeArgs = {"settings": self.settings, "context": self.tls}
        return stub

    # -- session -------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Grows with every login; what belongs to a session (collectors, views) dies when it grows."""
        return self._generation

    @property
    def content(self) -> Any:
        """The ServiceContent, after a login."""
        self.ensure_login()
        return self._content

    def bind(self, reference: Any) -> Any:
        """A managed object of any origin as one of this session."""
        return type(reference)(reference._GetMoId(), self._stub)

    def ensure_login(self) -> int:
        """Log in unless that happened; returns the generation."""
        if self._generation == 0:
            self.renew(0)
        return self._generation

    def renew(self, seen: int) -> int:
        """Log in again unless another thread did since generation `seen`. Returns the generation."""
        with self._lock:
            if self._generation != seen:
                return self._generation
            if self._closed.is_set():
                raise FarshoreError(
                    Code.SOURCE_UNREACHABLE, f"The session with {self.settings.host} was closed."
                )
            if self._refused is not None and time.monotonic() - self._refused_at < 10:
                raise self._refused
            where = f"logging in at {self.settings.host}:{self.settings.port} as {self.settings.user}"
            private = self._connect(SoapStubAdapter, 1)  # what other threads hear meanwhile is not for us
            try:
                content = self._repeat_once(
                    vim.ServiceInstance("ServiceInstance", self._stub).RetrieveContent
                )
                manager = vim.SessionManager(content.sessionManager._GetMoId(), private)
                manager.Login(self.settings.user, self.settings.password, None)
            except (vmodl.MethodFault, *NETWORK_ERRORS) as exc:
                error = classify(exc, doing=where, subject=self.settings.host)
                if isinstance(exc, vim.fault.InvalidLogin):  # repeated refusals lock accounts
                    self._refused, self._refused_at = error, time.monotonic()
                raise error from exc
            finally:
                private.DropConnections()
            self._stub.adopt(private.cookie)
            self._content = content
            self._generation += 1
            if self._keeper is None:
                self._keeper = threading.Thread(
                    target=self._keep_alive, name="vsphere-keep-alive", daemon=True
                )
                self._keeper.start()
            return self._generation

    def cookie(self) -> str:
        """The Cookie header that `/folder` wants, after a login."""
        self.ensure_login()
        return str(self._stub.cookie).split(";", 1)[0]

    def close(self) -> None:
        """Log out, best effort. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            if self._generation:
                try:
                    self._content.sessionManager.Logout()
                except (vmodl.MethodFault, *NETWORK_ERRORS) as exc:
                    log.debug("logout at %s failed: %s", self.settings.host, exc)
            self._stub.DropConnections()

    def _keep_alive(self) -> None:
        """Range reads are not known to count as use of a session, so an authenticated SOAP call is made now and then."""
        while not self._closed.wait(self.settings.keep_alive):
            try:
                self.read(self._content.rootFolder, ("name",), doing="keeping the session alive")
            except FarshoreError as exc:  # the next real call reports it to somebody
                log.info("keep-alive of %s: %s", self.settings.host, exc)

    def _repeat_once(self, do: Callable[[], T]) -> T:
        """For reads: a kept-alive connection that the server closed meanwhile costs one repeat."""
        try:
            return do()
        except _BROKEN_KEEPALIVE:
            return do()

    def call(
        self,
        doing: str,
        do: Callable[[], T],
        *,
        subject: str = "",
        fallback: Code = Code.SOURCE_BUSY,
        reading: bool = True,
    ) -> T:
        """Run `do` within the session, logging in again when it was lost.

        `reading=False` marks a call that must not be sent twice by accident: a broken connection leaves its outcome
        unknown and is raised as it came (OSError or HTTPException), and a fault as its pyVmomi type, for the caller
        to re-read the truth.
        """
        for attempt in range(3):
            seen = self.ensure_login()
            try:
                return self._repeat_once(do) if reading else do()
            except (
                vim.fault.NotAuthenticated
            ) as exc:  # the server did nothing, so a repeat is safe for writes as well
                if attempt == 2:
                    raise classify(exc, doing=doing, subject=subject) from exc
                self.renew(seen)
            except (vmodl.MethodFault, *NETWORK_ERRORS) as exc:
                if not reading:
                    raise
                raise classify(exc, doing=doing, subject=subject, fallback=fallback) from exc
        raise AssertionError("unreachable")

    # -- reads ---------------------------------------------------------------------------------------------------

    def read(self, reference: Any, paths: Sequence[str], *, doing: str, subject: str = "") -> dict[str, Any]:
        """Properties of one object in one round trip; unset ones are absent."""
        return self.read_many([reference], paths, doing=doing, subject=subject).get(reference._GetMoId(), {})

    def read_many(
        self,
        references: Sequence[Any],
        paths: Sequence[str],
        *,
        kind: Any = None,
        doing: str,
        subject: str = "",
    ) -> dict[str, dict[str, Any]]:
        """Properties of objects of one type (or one base type, `kind`), by moid.

        A vanished object is SourceMachineNotFound.
        """
        if not references:
            return {}
        collector = vmodl.query.PropertyCollector
        spec = collector.FilterSpec(
            objectSet=[collector.ObjectSpec(obj=ref) for ref in references],
            propSet=[collector.PropertySpec(type=kind or type(references[0]), pathSet=list(paths))],
        )
        self.ensure_login()
        rows = self.call(doing, lambda: self._retrieve([spec]), subject=subject)
        return {ref._GetMoId(): values for ref, values in rows}

    def read_all(
        self, wanted: Mapping[Any, Sequence[str]], *, doing: str
    ) -> list[tuple[Any, dict[str, Any]]]:
        """Properties of every object of the wanted types below the root folder: one view, a few pages."""

        def run() -> list[tuple[Any, dict[str, Any]]]:
            content = self._content
            collector = vmodl.query.PropertyCollector
            view = content.viewManager.CreateContainerView(content.rootFolder, list(wanted), True)
            try:
                step = collector.TraversalSpec(
                    name="view", path="view", skip=False, type=vim.view.ContainerView
                )
                spec = collector.FilterSpec(
                    objectSet=[collector.ObjectSpec(obj=view, skip=True, selectSet=[step])],
                    propSet=[
                        collector.PropertySpec(type=kind, pathSet=list(paths))
                        for kind, paths in wanted.items()
                    ],
                )
                return self._retrieve([spec])
            finally:
                view.DestroyView()

        self.ensure_login()
        return self.call(doing, run)

    def _retrieve(self, specs: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
        collector = self._content.propertyCollector
        options = vmodl.query.PropertyCollector.RetrieveOptions(maxObjects=PAGE)
        rows: list[tuple[Any, dict[str, Any]]] = []
        page = collector.RetrievePropertiesEx(specs, options)
        while page is not None:
            for item in page.objects:
                for missing in item.missingSet or ():
                    if not isinstance(missing.fault, vmodl.fault.InvalidProperty):
                        raise missing.fault
                rows.append((item.obj, {p.name: p.val for p in item.propSet or ()}))
            page = collector.ContinueRetrievePropertiesEx(page.token) if page.token else None
        return rows

    # -- waiting -------------------------------------------------------------------------------------------------

    @contextmanager
    def watch(
        self, reference: Any, paths: Sequence[str], *, doing: str, subject: str = ""
    ) -> Generator[Watch]:
        """Follow properties of one object."""
        watch = Watch(self, reference, paths, doing=doing, subject=subject)
        try:
            yield watch
        finally:
            watch.close()

    def wait_task(
        self,
        task: Any,
        *,
        doing: str,
        subject: str = "",
        timeout: float,
        tick: Tick = no_tick,
        fallback: Code = Code.SOURCE_BUSY,
    ) -> Any:
        """Wait for a task; returns its result. The fault of a failed task is raised as its pyVmomi type.

        `tick` is called every few seconds. After `timeout` seconds: the task goes on, `fallback` is raised.
        """
        begun = time.monotonic()
        info: dict[str, Any] = {}
        with self.watch(
            task, ["info.state", "info.progress", "info.error", "info.result"], doing=doing, subject=subject
        ) as watch:
            while True:
                info.update(watch.changes(self.settings.poll))
                state = info.get("info.state")
                if state == "success":
                    return info.get("info.result")
                if state == "error":
                    raise info.get("info.error") or vmodl.fault.SystemError(
                        reason="the task failed without a reason"
                    )
                waited = time.monotonic() - begun
                tick({"step": doing, "percent": info.get("info.progress"), "seconds": round(waited)})
                if waited > timeout:
                    raise FarshoreError(
                        fallback,
                        f"vSphere did not finish {doing} within {timeout:.0f} s (task {task._GetMoId()}).",
                        subject=subject,
                    )


class Watch:
    """A property filter on a collector of its own, made again when the session was lost."""

    def __init__(
        self, client: Client, reference: Any, paths: Sequence[str], *, doing: str, subject: str
    ) -> None:
        self._client, self._reference, self._paths = client, client.bind(reference), list(paths)
        self._doing, self._subject = doing, subject
        self._collector: Any = None
        self._generation = 0
        self._version = ""

    def changes(self, seconds: float) -> dict[str, Any]:
        """What changed since the last call (at first: everything), after at most `seconds`; empty if nothing did."""
        return self._client.call(self._doing, lambda: self._next(seconds), subject=self._subject)

    def _next(self, seconds: float) -> dict[str, Any]:
        collector = vmodl.query.PropertyCollector
        if self._collector is None or self._generation != self._client.generation:
            self._generation = self._client.generation
            self._version = ""
            self._collector = self._client.content.propertyCollector.CreatePropertyCollector()
            spec = collector.FilterSpec(
                objectSet=[collector.ObjectSpec(obj=self._reference)],
                propSet=[collector.PropertySpec(type=type(self._reference), pathSet=self._paths)],
            )
            self._collector.CreateFilter(spec, False)
        # The server takes whole seconds; 0 would not wait at all and spin.
        options = collector.WaitOptions(maxWaitSeconds=max(1, round(seconds)))
        update = self._collector.WaitForUpdatesEx(self._version, options)
        found: dict[str, Any] = {}
        if update is None:
            return found
        self._version = update.version
        for filter_update in update.filterSet or ():
            for item in filter_update.objectSet or ():
                if item.kind == "leave":
                    raise vmodl.fault.ManagedObjectNotFound(obj=self._reference)
                for change in item.changeSet or ():
                    found[change.name] = change.val
        return found

    def close(self) -> None:
        """Give the collector back. Best effort: it dies with the session anyway."""
        if self._collector is None or self._generation != self._client.generation:
            return
        try:
            self._collector.DestroyPropertyCollector()
        except (vmodl.MethodFault, *NETWORK_ERRORS) as exc:
            log.debug("a property collector was left to its session: %s", exc)
