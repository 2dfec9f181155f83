"""The property collector and container views.

Objects carry the change counter at which they changed last; a filter serialises an object again only if that moved, so
that many waiting clients cost little.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.objects import Entity, InvalidPathError, Managed, wsdl
from farshore.lab.vcenter.vim import ManagedObject, array, make_fault, soap, support, vim, vmodl

if TYPE_CHECKING:
    from farshore.lab.vcenter.service import LabVCenter
    from farshore.lab.vcenter.sessions import Session

PC = vmodl.query.PropertyCollector
_LONGEST_WAIT = 1800.0


def _not_found(ref: Any) -> Any:
    return make_fault(
        "vmodl.fault.ManagedObjectNotFound",
        f"The object '{ref}' has already been deleted or has not been completely created",
        obj=ref,
    )


class _Missing(Exception):
    def __init__(self, ref: Any) -> None:
        super().__init__(str(ref))
        self.ref = ref


@dataclass(slots=True)
class _Walk:
    """One evaluation of a specification: named selections, what was found, what was seen."""

    named: dict[str, Any]
    found: dict[str, Managed]
    visited: set[tuple[str, str]]


class Selection:
    """A filter specification, ready to be evaluated."""

    def __init__(self, lab: LabVCenter, spec: Any) -> None:
        self._lab = lab
        self._spec = spec
        self.traverses = any(o.selectSet for o in spec.objectSet)
        for prop in spec.propSet:
            if not isinstance(prop.type, type) or not issubclass(prop.type, ManagedObject):
                raise make_fault(
                    "vmodl.fault.InvalidType", "Not a managed object type.", argument=str(prop.type)
                )
            for path in prop.pathSet or ():
                self._check(prop.type, path)

    def _check(self, kind: Any, path: str) -> None:
        head = path.partition(".")[0].partition("[")[0]
        try:
            kind._GetPropertyInfo(head)
        except AttributeError as error:
            raise make_fault("vmodl.query.InvalidProperty", f"Invalid property {path}", name=path) from error

    def objects(self) -> dict[str, Managed]:
        """Selected objects by moid. Raises `ManagedObjectNotFound`."""
        found: dict[str, Managed] = {}
        for start in self._spec.objectSet:
            named: dict[str, Any] = {}
            _collect_names(start.selectSet or (), named)
            visited: set[tuple[str, str]] = set()
            try:
                walk = _Walk(named, found, visited)
                self._walk(walk, start.obj, start.selectSet or (), bool(start.skip))
            except _Missing as missing:
                if not self._spec.reportMissingObjectsInResults:
                    raise _not_found(missing.ref) from missing
        return found

    def _walk(self, walk: _Walk, ref: Any, selects: Iterable[Any], skip: bool) -> None:
        obj = self._lab.find(ref)
        if obj is None:
            raise _Missing(ref)
        if not skip:
            walk.found[obj.moid] = obj
        for select in selects:
            step = select if isinstance(select, PC.TraversalSpec) else walk.named.get(select.name)
            if step is None:
                raise make_fault(
                    "vmodl.fault.InvalidArgument",
                    "A specified parameter was not correct: selectSet",
                    invalidProperty="selectSet",
                )
            if not issubclass(obj.vtype, step.type):
                continue
            mark = (obj.moid, step.name or str(id(step)))
            if mark in walk.visited:
                continue
            walk.visited.add(mark)
            try:
                value = obj.get(step.path)
            except InvalidPathError as error:
                raise make_fault(
                    "vmodl.query.InvalidProperty", f"Invalid property {step.path}", name=step.path
                ) from error
            targets: list[Any] = (
                list(value) if isinstance(value, list) else [value] if value is not None else []
            )
            for target in targets:
                try:
                    self._walk(walk, target, step.selectSet or (), bool(step.skip))
                except _Missing:
                    continue  # it went while we walked

    def content(self, obj: Managed) -> Any:
        """`ObjectContent` of a selected object, None if no property set is for its type."""
        specs = [p for p in self._spec.propSet if issubclass(obj.vtype, p.type)]
        if not specs:
            return None
        paths: dict[str, None] = {}
        for spec in specs:
            if spec.all:
                paths.update(dict.fromkeys(p.name for p in obj.vtype._GetPropertyList()))
            else:
                paths.update(dict.fromkeys(spec.pathSet or ()))
        values: list[Any] = []
        missing: list[Any] = []
        for path in paths:
            denied = self._lab.denied("System.Read", obj, path)
            if denied is not None:
                missing.append(vmodl.query.PropertyCollector.MissingProperty(path=path, fault=denied))
                continue
            try:
                value = obj.get(path)
            except InvalidPathError as error:
                raise make_fault(
                    "vmodl.query.InvalidProperty", f"Invalid property {path}", name=path
                ) from error
            if value is not None:
                values.append(vmodl.DynamicProperty(name=path, val=value))
        return PC.ObjectContent(obj=obj.ref, propSet=values, missingSet=missing)

    def contents(self) -> list[Any]:
        return [c for o in self.objects().values() if (c := self.content(o)) is not None]


def _collect_names(selects: Iterable[Any], named: dict[str, Any]) -> None:
    for select in selects:
        if isinstance(select, PC.TraversalSpec):
            if select.name:
                named.setdefault(select.name, select)
            _collect_names(select.selectSet or (), named)


Seen = dict[str, tuple[int, dict[str, str]]]


class Filter(Managed):
    """A property filter; `seen` is what the client knows at the collector's present version."""

    vtype = PC.Filter

    def __init__(self, lab: LabVCenter, moid: str, collector: PropertyCollector, spec: Any) -> None:
        super().__init__(lab, moid)
        self.collector = collector
        self.spec = spec
        self.selection = Selection(lab, spec)
        self.seen: Seen = {}
        self.known: dict[str, Managed] | None = None

    def p_spec(self) -> Any:
        return self.spec

    def p_partialUpdates(self) -> Any:
        return False

    @wsdl
    def DestroyPropertyFilter(self) -> None:
        self.collector.filters.pop(self.moid, None)
        self.collector.disown(self)

    def changes(self, room: int) -> tuple[list[Any], bool]:
        """Up to `room` object updates since `seen`, and whether there are more."""
        if self.known is None or self.selection.traverses:
            self.known = self.selection.objects()
        updates: list[Any] = []
        truncated = False
        for moid, obj in self.known.items():
            before = self.seen.get(moid)
            if self.lab.find(obj.ref) is not obj:
                continue
            if before is not None and before[0] == obj.generation:
                continue
            if len(updates) >= room:
                truncated = True
                break
            generation = obj.generation
            content = self.selection.content(obj)
            if content is None:
                continue
            values = {p.name: (p.val, soap.SerializeToStr(p.val)) for p in content.propSet}
            old = before[1] if before else {}
            changed = [
                PC.Change(name=name, op="assign", val=value)
                for name, (value, text) in values.items()
                if old.get(name) != text
            ]
            changed += [PC.Change(name=name, op="assign", val=None) for name in old if name not in values]
            if changed or before is None:
                updates.append(
                    PC.ObjectUpdate(
                        kind="enter" if before is None else "modify",
                        obj=obj.ref,
                        changeSet=changed,
                        missingSet=content.missingSet,
                    )
                )
            self.seen[moid] = (generation, {name: text for name, (_, text) in values.items()})
        for moid in [m for m in self.seen if m not in self.known or self.lab.find_moid(m) is None]:
            if len(updates) >= room:
                truncated = True
                break
            gone = self.known.get(moid)
            kind = gone.vtype if gone else support.GetWsdlType("urn:vim25", "ManagedEntity")
            updates.append(PC.ObjectUpdate(kind="leave", obj=kind(moid)))
            del self.seen[moid]
        return updates, truncated


class PropertyCollector(Managed):
    """The default collector of a session, or one made by `CreatePropertyCollector`."""

    vtype = PC

    def __init__(self, lab: LabVCenter, moid: str, session: Session | None) -> None:
        super().__init__(lab, moid)
        self.session = session
        self.filters: dict[str, Filter] = {}
        self.pages: dict[str, tuple[list[Any], int]] = {}
        self._version = 0
        self._before: dict[str, Seen] = {}
        self._cancelled = 0
        self._destroyed = False
        self._turn = threading.Lock()

    def p_filter(self) -> Any:
        return array(PC.Filter, [f.ref for f in self.filters.values()])

    # ------------------------------------------------------------------ one-time reads

    @wsdl
    def RetrievePropertiesEx(self, specSet: Any, options: Any = None) -> Any:
        contents = self._retrieve(specSet)
        wanted = options.maxObjects if options is not None else None
        limit = self.lab.settings.page_size
        return self._page(contents, min(wanted, limit) if wanted else limit)

    @wsdl
    def ContinueRetrievePropertiesEx(self, token: str) -> Any:
        try:
            rest, size = self.pages.pop(token)
        except KeyError as error:
            raise make_fault(
                "vmodl.fault.InvalidArgument",
                "A specified parameter was not correct: token",
                invalidProperty="token",
            ) from error
        return self._page(rest, size)

    @wsdl
    def CancelRetrievePropertiesEx(self, token: str) -> None:
        self.pages.pop(token, None)

    @wsdl
    def RetrieveProperties(self, specSet: Any) -> Any:
        return self._retrieve(specSet)

    def _retrieve(self, specs: Any) -> list[Any]:
        contents: list[Any] = []
        for spec in specs:
            contents += Selection(self.lab, spec).contents()
        return contents

    def _page(self, contents: list[Any], size: int) -> Any:
        if not contents:
            return None
        token = None
        if len(contents) > size:
            token = uuid.uuid4().hex
            self.pages[token] = (contents[size:], size)
        return PC.RetrieveResult(token=token, objects=contents[:size])

    # ------------------------------------------------------------------ waiting

    @wsdl
    def CreateFilter(self, spec: Any, partialUpdates: bool) -> Any:
        item = Filter(self.lab, self._moid(), self, spec)
        item.selection.objects()
        self.filters[item.moid] = item
        self._own(item)
        return item.ref

    @wsdl
    def CreatePropertyCollector(self) -> Any:
        item = PropertyCollector(self.lab, self._moid(), self.lab.calls.session)
        self._own(item)
        return item.ref

    @wsdl
    def DestroyPropertyCollector(self) -> None:
        self._destroyed = True
        for item in list(self.filters.values()):
            item.DestroyPropertyFilter()
        self.disown(self)
        self.lab.wake()

    @wsdl
    def WaitForUpdatesEx(self, version: str | None = None, options: Any = None) -> Any:
        seconds = options.maxWaitSeconds if options is not None else None
        room = (options.maxObjectUpdates if options is not None else None) or 1 << 30
        return self._wait(version, _LONGEST_WAIT if seconds is None else float(seconds), room)

    @wsdl
    def WaitForUpdates(self, version: str | None = None) -> Any:
        return self._wait(version, _LONGEST_WAIT, 1 << 30)

    @wsdl
    def CheckForUpdates(self, version: str | None = None) -> Any:
        return self._wait(version, 0.0, 1 << 30)

    @wsdl
    def CancelWaitForUpdates(self) -> None:
        self._cancelled += 1
        self.lab.wake()

    def _wait(self, version: str | None, seconds: float, room: int) -> Any:
        lab = self.lab
        deadline = time.monotonic() + seconds
        cancelled = self._cancelled
        session = lab.calls.session
        with self._turn:
            self._rewind(version)
        while True:
            generation = lab.generation
            with self._turn:
                updates = self._updates(room)
            if updates is not None:
                return updates
            if session is not None and not session.alive:
                raise make_fault(
                    "vim.fault.NotAuthenticated", "The session is not authenticated.", object=self.ref
                )
            if self._destroyed:
                raise _not_found(self.ref)
            if self._cancelled != cancelled or lab.stopping:
                raise make_fault("vmodl.fault.RequestCanceled", "The request was canceled.")
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            lab.wait_for_change(generation, left)

    def _rewind(self, version: str | None) -> None:
        """Go to what the client says it knows: nothing, the last answer, or (that got lost) the one before."""
        known = not version or (version.isdecimal() and int(version) <= self._version)
        if not known:
            raise make_fault("vmodl.query.InvalidCollectorVersion", "The data version is not known.")
        if not version or int(version) < self._version - 1:
            for item in self.filters.values():
                item.seen = {}
        elif version == str(self._version):
            return
        else:
            for item in self.filters.values():
                item.seen = dict(self._before.get(item.moid, {}))
            self._version -= 1

    def _updates(self, room: int) -> Any:
        before = {f.moid: dict(f.seen) for f in self.filters.values()}
        parts: list[Any] = []
        truncated = False
        for item in list(self.filters.values()):
            changes, more = item.changes(room)
            room -= len(changes)
            truncated = truncated or more
            if changes:
                parts.append(PC.FilterUpdate(filter=item.ref, objectSet=changes))
            if truncated:
                break
        if not parts:
            return None
        self._before = before
        self._version += 1
        return PC.UpdateSet(version=str(self._version), filterSet=parts, truncated=truncated)

    def _moid(self) -> str:
        session = self.lab.calls.session
        return f"session[{session.key if session else ''}]{uuid.uuid4()}"

    def disown(self, item: Managed) -> None:
        """Forget an object of this session."""
        if self.session is not None:
            self.session.objects.pop(item.moid, None)
        self.lab.forget(item)

    def _own(self, item: Managed) -> None:
        session = self.lab.calls.session
        if session is not None:
            session.objects[item.moid] = item
        self.lab.add(item)


class ViewManager(Managed):
    """`ViewManager`: container views only."""

    vtype = vim.view.ViewManager

    def p_viewList(self) -> Any:
        session = self.lab.calls.session
        views = [o for o in session.objects.values() if isinstance(o, ContainerView)] if session else []
        return array(vim.view.View, [v.ref for v in views])

    @wsdl
    def CreateContainerView(self, container: Any, type: Any = None, recursive: bool = False) -> Any:
        root = self.lab.find(container)
        if not isinstance(root, Entity):
            raise _not_found(container)
        session = self.lab.calls.session
        assert session is not None
        view = ContainerView(
            self.lab, f"session[{session.key}]{uuid.uuid4()}", root, tuple(type or ()), recursive
        )
        session.objects[view.moid] = view
        self.lab.add(view)
        return view.ref


class ContainerView(Managed):
    """The entities below a container, always up to date."""

    vtype = vim.view.ContainerView

    def __init__(
        self, lab: LabVCenter, moid: str, container: Entity, kinds: tuple[Any, ...], recursive: bool
    ) -> None:
        super().__init__(lab, moid)
        self.container = container
        self.kinds = kinds or (vim.ManagedEntity,)
        self.recursive = recursive

    def p_container(self) -> Any:
        return self.container.ref

    def p_type(self) -> Any:
        return None

    def p_recursive(self) -> Any:
        return self.recursive

    def p_view(self) -> Any:
        found: dict[str, Any] = {}
        stack = list(self.container.children())
        while stack:
            entity = stack.pop()
            if entity.moid in found:
                continue
            found[entity.moid] = entity
            if self.recursive:
                stack.extend(entity.children())
        refs = [
            e.ref for e in sorted(found.values(), key=lambda e: e.moid) if issubclass(e.vtype, self.kinds)
        ]
        return array(vim.ManagedEntity, refs)

    @wsdl
    def DestroyView(self) -> None:
        session = self.lab.calls.session
        if session is not None:
            session.objects.pop(self.moid, None)
        self.lab.forget(self)
