"""Managed objects: what every object of the inventory and every service has in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from farshore.lab.vcenter.vim import Array, ManagedObject, array, long, make_fault, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.service import LabVCenter

F = TypeVar("F", bound=Callable[..., Any])
_STEP = re.compile(r'\[(?:"([^"]*)"|([^\]]*))\]|([^.\[\]]+)')


class InvalidPathError(Exception):
    """A property path that the type does not have."""


def wsdl(function: F) -> F:
    """Mark a method as callable over SOAP under its own name."""
    function.__dict__["wsdl"] = True
    return function


class Managed:
    """A managed object. Property `x` is served by method `p_x`; a property of the schema without one is unset."""

    vtype: ClassVar[Any] = None

    def __init__(self, lab: LabVCenter, moid: str) -> None:
        self.lab = lab
        self.moid = moid
        self.generation = 0
        """Of the laboratory's change counter when this object changed last."""

    @property
    def ref(self) -> Any:
        """A reference to this object."""
        return self.vtype(self.moid)

    @property
    def label(self) -> str:
        """Name for people, fault rules and logs."""
        return getattr(self, "name", self.moid)

    def method(self, name: str) -> Callable[..., Any] | None:
        """The SOAP method of that name, if this object has it."""
        function = getattr(self, name, None)
        return function if function is not None and getattr(function, "wsdl", False) else None

    def get(self, path: str) -> Any:
        """The value at a property path such as `config.hardware.device[2000].backing`; None where unset.

        Raises `InvalidPathError`.
        """
        steps = _STEP.findall(path)
        if not steps or not steps[0][2]:
            raise InvalidPathError(path)
        info = self.info(steps[0][2])
        value = self.value(steps[0][2])
        for quoted, index, name in steps[1:]:
            if name:
                if value is None:
                    return None
                if isinstance(value, (list, ManagedObject)):
                    raise InvalidPathError(path)
                try:
                    info = value._GetPropertyInfo(name)
                except AttributeError as error:
                    raise InvalidPathError(path) from error
                value = getattr(value, name)
            else:
                key = quoted or index
                value = next((v for v in value or () if str(getattr(v, "key", None)) == key), None)
                info = None
        if isinstance(value, int) and info is not None and info.type is long:
            return long(value)
        if isinstance(value, list) and not isinstance(value, Array) and info is not None:
            typed: Any = (
                info.type()
            )  # a list inside a data object may be a plain one, which has no type on the wire
            typed.extend(value)  # pyright: ignore[reportUnknownArgumentType] values of pyVmomi types
            return typed
        return value

    def value(self, name: str) -> Any:
        """The value of one property; None where unset."""
        getter = getattr(self, "p_" + name, None)
        value = getter() if getter else None
        if isinstance(value, list) and not isinstance(value, Array):
            kind = self.info(name).type
            typed: Any = kind()
            typed.extend(value)  # pyright: ignore[reportUnknownArgumentType] values of pyVmomi types
            return typed
        return value

    def info(self, name: str) -> Any:
        """pyVmomi's description of a property. Raises `InvalidPathError`."""
        try:
            return self.vtype._GetPropertyInfo(name)
        except AttributeError as error:
            raise InvalidPathError(name) from error

    def touch(self) -> None:
        """Tell property collectors that something about this object changed."""
        self.lab.touch(self)


class Entity(Managed):
    """A `ManagedEntity`: has a name, a parent, a status."""

    def __init__(self, lab: LabVCenter, moid: str, name: str, parent: Entity | None) -> None:
        super().__init__(lab, moid)
        self.name = name
        self.parent = parent

    def p_name(self) -> Any:
        return self.name

    def p_parent(self) -> Any:
        return self.parent.ref if self.parent else None

    def p_overallStatus(self) -> Any:
        return "green"

    def p_configStatus(self) -> Any:
        return "green"

    def p_effectiveRole(self) -> Any:
        return [-1]

    def p_alarmActionsEnabled(self) -> Any:
        return True

    def p_recentTask(self) -> Any:
        return array(vim.Task, [t.ref for t in self.lab.tasks.recent_of(self)])

    def children(self) -> list[Entity]:
        """Entities right below this one in the inventory tree."""
        return []

    def path(self) -> str:
        """Inventory path below the root folder."""
        parts: list[str] = []
        node: Entity = self
        while node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return "/".join(reversed(parts))

    @wsdl
    def Rename_Task(self, newName: str) -> Any:
        return self.lab.tasks.start(self, "Rename_Task", lambda _task: self._rename(newName))

    def _rename(self, name: str) -> None:
        if not name:
            raise make_fault("vim.fault.InvalidName", "The name is empty.", name=name, entity=self.ref)
        self.name = name
        self.touch()
