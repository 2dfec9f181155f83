"""What the model's validation says, in plain words, with what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from farshore.plans.checks import ERROR, Issue
from farshore.plans.model import (
    ACTION_TAGS,
    NAME_HINT,
    BootGroup,
    MachinePlan,
    Network,
    Plan,
    Replication,
    RetentionRule,
    Shutdown,
    Sites,
    Target,
)
from farshore.plans.source import Path

# Which model stands where; "*" is any key or index.
_SECTIONS: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): Plan,
    ("sites",): Sites,
    ("replication",): Replication,
    ("replication", "retention", "*"): RetentionRule,
    ("network",): Network,
    ("machines", "*"): MachinePlan,
    ("machines", "*", "target"): Target,
    ("shutdown",): Shutdown,
    ("boot", "*"): BootGroup,
}
_WANTED = {
    "string": "text",
    "bool": "true or false",
    "int": "a whole number",
    "tuple": "a list",
    "dict": "a map of `key: value`",
    "model": "a map of `key: value`",
}
_SHOWN = 60


def issues_of(error: ValidationError) -> list[Issue]:
    """The issues in a validation error of `Plan`, each at its place in the file."""
    found: list[Issue] = []
    for item in error.errors(include_url=False):
        path, model, of_key = _place(tuple(item["loc"]))
        if item["type"] == "too_short" and item.get("input"):
            continue  # it is not empty: its items are wrong, and each of them is named
        code, message, fix = _words(item, path, model)
        found.append(Issue(path, ERROR, code, message, fix, key=of_key or code == "unknown-field"))
    return found


def _place(loc: Path) -> tuple[Path, type[BaseModel] | None, bool]:
    """The path in the file without what pydantic adds to it, the model that has its last part as a field, and whether
    a key itself is meant."""
    path: list[str | int] = []
    key_itself = False
    tag: type[BaseModel] | None = None
    for i, part in enumerate(loc):
        if part == "[key]":
            key_itself = True
        elif (
            i >= 2
            and isinstance(loc[i - 1], int)
            and loc[i - 2] in ("before", "after")
            and part in ACTION_TAGS
        ):
            tag = ACTION_TAGS[str(part)]
        elif isinstance(part, str) and (part.startswith("function-") or part in ("float", "literal['all']")):
            continue  # the branch of a union
        else:
            path.append(part)
    if key_itself:
        return tuple(path), None, True
    parents = tuple(path[:-1])
    return tuple(path), tag or _model_at(parents), False


def _model_at(parents: Path) -> type[BaseModel] | None:
    for pattern, model in _SECTIONS.items():
        if len(pattern) == len(parents) and all(
            p in ("*", part) for p, part in zip(pattern, parents, strict=True)
        ):
            return model
    return None


def _field(model: type[BaseModel] | None, path: Path) -> FieldInfo | None:
    return model.model_fields.get(str(path[-1])) if model is not None and path else None


def _words(item: ErrorDetails, path: Path, model: type[BaseModel] | None) -> tuple[str, str, str]:
    """Code, message and fix."""
    kind, text, given = item["type"], item["msg"], item["input"]
    context: Mapping[str, Any] = item.get("ctx") or {}
    field = _field(model, path)
    name = str(path[-1]) if path else "the plan"
    if kind == "missing":
        about = f" ({field.description})" if field is not None and field.description else ""
        return "missing", f"`{name}` is missing{about}", f"Add {_example(name, field)}."
    if kind == "extra_forbidden":
        known = list(model.model_fields) if model is not None else []
        near = get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        return (
            "unknown-field",
            f"`{name}` is not a field of a plan here",
            f"{hint}Fields here: {', '.join(known)}." if known else "Remove it.",
        )
    if kind == "literal_error":
        expected = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
        near = get_close_matches(str(given), expected.split(", "), n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        if path == ("farshore",):
            return "version", f"{_show(given)} is not a known version of the format", "Write `farshore: 1`."
        return "value", f"{_show(given)} is not possible here", f"{hint}Possible: {expected}."
    if kind == "string_pattern_mismatch":
        return "name", f"{_show(given)} cannot be a name", f"Use {NAME_HINT}."
    if kind in ("too_short", "string_too_short"):
        return "empty", f"`{name}` is empty", f"Add {_example(name, field)}."
    if kind == "string_too_long":
        return "too-long", f"`{name}` is too long", f"Use at most {context.get('max_length')} characters."
    if kind == "action_kind":
        return "action-kind", text, "Begin the action with `- manual: …` or `- script: …`."
    if kind == "value_error":
        return "value", text.removeprefix("Value error, "), f"Example: {_example(name, field)}."
    for word, wanted in _WANTED.items():
        if kind.startswith(word):
            return (
                "type",
                f"{_show(given)} stands where {wanted} is wanted",
                f"Write {_example(name, field)}.",
            )
    return "value", f"{text} (got {_show(given)})", f"Write {_example(name, field)}."


def _example(name: str, field: FieldInfo | None) -> str:
    if field is not None and field.examples:
        return f"`{name}: {field.examples[0]}`"
    if field is not None and field.description:
        return f"`{name}`: {field.description}"
    return f"`{name}: …`"


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a map"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "a list"
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
