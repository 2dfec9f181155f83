"""The border to pyVmomi, whose types are made at run time: everything behind these names is `Any` to the type checker."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

from pyVmomi import SoapAdapter as _soap
from pyVmomi import VmomiSupport as _support
from pyVmomi import vim as _vim
from pyVmomi import vmodl as _vmodl

vim: Any = _vim
vmodl: Any = _vmodl
support: Any = _support
soap: Any = _soap

ManagedObject: Any = support.ManagedObject
MethodFault: Any = vmodl.MethodFault
Array: Any = support.Array
long: Any = support.long


def array(item: Any, values: Iterable[Any] = ()) -> Any:
    """A typed pyVmomi array of `item`."""
    result = support.GetVmodlType(item.__name__ + "[]")()
    result.extend(values)
    return result


def utc(timestamp: float) -> dt.datetime:
    """Seconds since the epoch as pyVmomi's date type."""
    return dt.datetime.fromtimestamp(timestamp, dt.UTC)


def by_name(name: str) -> Any:
    """A type by its dotted name, such as `vim.fault.TaskInProgress`. Raises `KeyError`."""
    found: Any = {"vim": vim, "vmodl": vmodl}[name.partition(".")[0]]
    for part in name.split(".")[1:]:
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise KeyError(name) from error
    return found


def make_fault(name: str, message: str | None = None, /, **fields: Any) -> Any:
    """A fault by its dotted name, with its required fields filled by harmless values where not given."""
    kind = by_name(name) if "." in name else getattr(vim.fault, name, None) or getattr(vmodl.fault, name)
    fault = kind()
    for info in fault._GetPropertyList():
        if info.name in fields:
            setattr(fault, info.name, fields[info.name])
        elif not info.flags & support.F_OPTIONAL and getattr(fault, info.name) is None:
            default = _required(info.type)
            if default is not None:
                setattr(fault, info.name, default)
    fault.msg = message or support.GetWsdlName(kind)
    return fault


def invalid_argument(name: str) -> Any:
    """The fault for a parameter that makes no sense."""
    return make_fault(
        "vmodl.fault.InvalidArgument", f"A specified parameter was not correct: {name}", invalidProperty=name
    )


def _required(kind: Any) -> Any:
    if kind in (str, bool, int, long):
        return kind()
    if issubclass(kind, str):  # an enumeration: its first value
        return next(iter(getattr(kind, "values", None) or ()), None)
    if issubclass(kind, ManagedObject):
        return kind("unknown")
    if issubclass(kind, MethodFault):
        return vmodl.fault.NotSupported(msg="The operation is not supported.")
    if issubclass(kind, dt.datetime):
        return dt.datetime.now(dt.UTC)
    return None
