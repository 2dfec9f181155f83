"""Checks JSON documents against the models of the installed azure-mgmt wheels: unknown names, wrong types, unknown enum values.

The models' annotations are the schema. Enumerations are open on the wire, but a stand-in that invents a value is wrong, so
unknown values are reported too.
"""

from __future__ import annotations

import datetime as dt
import enum
import importlib
import types
import typing
from functools import cache
from typing import Any, cast


@cache
def _models(package: str) -> Any:
    return importlib.import_module(f"azure.mgmt.{package}.models")


@cache
def fields_of(package: str, model: str) -> dict[str, tuple[Any, bool]]:
    """REST name → (annotation, read-only) of a model. Raises: AttributeError for an unknown model."""
    return _fields(package, getattr(_models(package), model))


@cache
def _fields(package: str, cls: Any) -> dict[str, tuple[Any, bool]]:
    models = _models(package)
    cls.__new__(cls)  # the generator's base class computes its fields on first use
    hints = typing.get_type_hints(cls, localns={"_models": models})
    out: dict[str, tuple[Any, bool]] = {}
    for attribute, rest in cls._attr_to_rest_field.items():
        if attribute not in hints:
            raise TypeError(f"{package}.{cls.__name__}.{attribute} has no annotation")
        out[rest._rest_name] = (hints[attribute], rest._visibility == ["read"])
    return out


def problems(package: str, model: str, document: Any) -> list[str]:
    """What is wrong with a document that should be `model`, one line each."""
    return list(_check(package, getattr(_models(package), model), document, model))


def unknown_names(package: str, model: str, document: Any) -> list[str]:
    """Only the names that the model does not have."""
    return [line for line in problems(package, model, document) if line.endswith(_UNKNOWN)]


_UNKNOWN = "is not a member"
_OPEN = frozenset({"VirtualMachineSizeTypes"})
"""Enumerations that the service itself keeps longer than the SDK: it lists no size newer than 2018."""
_SCALARS: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float), bool: (bool,)}


def _check(package: str, kind: Any, value: Any, path: str) -> list[str]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return []
    if origin in {typing.Union, types.UnionType}:
        return _check_union(package, arguments, value, path)
    if origin is list:
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        rows = cast(list[Any], value)
        return [
            line for i, row in enumerate(rows) for line in _check(package, arguments[0], row, f"{path}[{i}]")
        ]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{path}: not an object"]
        pairs = cast(dict[str, Any], value).items()
        return [
            line for name, item in pairs for line in _check(package, arguments[1], item, f"{path}.{name}")
        ]
    if origin is typing.Literal:
        allowed = [getattr(a, "value", a) for a in arguments]
        return [] if value in allowed else [f"{path}: {value!r} is none of {allowed}"]
    return _check_plain(package, kind, value, path)


def _check_union(package: str, arguments: tuple[Any, ...], value: Any, path: str) -> list[str]:
    if value is None:
        return [] if type(None) in arguments else [f"{path}: null"]
    kinds = [a for a in arguments if a is not type(None)]
    enums = [a for a in kinds if isinstance(a, type) and issubclass(a, enum.Enum)]
    if enums:
        return _check(package, enums[0], value, path)
    outcomes = [_check(package, kind, value, path) for kind in kinds]
    return min(outcomes, key=len) if outcomes else []


def _check_plain(package: str, kind: Any, value: Any, path: str) -> list[str]:
    if kind in _SCALARS:
        fits = isinstance(value, _SCALARS[kind]) and (kind is bool or not isinstance(value, bool))
        return [] if fits else [f"{path}: {value!r} is no {kind.__name__}"]
    if kind is dt.datetime:
        try:
            dt.datetime.fromisoformat(value)
        except (TypeError, ValueError):
            return [f"{path}: {value!r} is no date and time"]
        return []
    if kind is bytes:
        return [] if isinstance(value, str) else [f"{path}: {value!r} is no base64 text"]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if kind.__name__ in _OPEN:
            return _check_plain(package, str, value, path)
        allowed = [member.value for member in kind]
        return [] if value in allowed else [f"{path}: {value!r} is none of {allowed}"]
    if any(base.__name__ == "Model" for base in getattr(kind, "__mro__", ())):
        return _check_model(package, kind, value, path)
    raise TypeError(f"{path}: no rule for {kind!r}")


def _check_model(package: str, cls: Any, value: Any, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path}: not an object"]
    document = cast(dict[str, Any], value)
    fields = _fields(package, cls)
    for rest in cls._attr_to_rest_field.values():
        subtypes = getattr(cls, "__mapping__", {})
        if rest._is_discriminator and document.get(rest._rest_name) in subtypes:
            fields = _fields(package, subtypes[document[rest._rest_name]])
    out = [f"{path}.{name}: {_UNKNOWN}" for name in document if name not in fields]
    for name, (kind, _) in fields.items():
        if name in document:
            out += _check(package, kind, document[name], f"{path}.{name}")
        elif not _optional(kind):
            out.append(f"{path}.{name}: missing")
    return out


def _optional(kind: Any) -> bool:
    return kind is Any or type(None) in typing.get_args(kind)
