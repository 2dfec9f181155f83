"""Values of any message type, built from its annotations: the smallest one, and one with every field filled."""

from __future__ import annotations

import dataclasses
import types
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from farshore.plans.model import MachinePlan, Plan

PLAN = Plan.model_validate(
    {
        "farshore": 1,
        "plan": "crm",
        "sites": {"source": "east", "target": "west"},
        "network": {"failover": "dr"},
        "machines": {"db": {"target": {"size": "Standard_D2s_v5", "address": "10.1.2.3"}}},
        "boot": [
            {
                "group": "data",
                "machines": ["db"],
                "before": [{"manual": "Look", "instructions": "closely"}],
                "after": [{"script": "smoke.sh", "where": "guest", "machine": "db", "on_failure": "stop"}],
            }
        ],
    }
)
AT = datetime(2026, 11, 22, 19, 0, 0, 123456, tzinfo=UTC)


def sample(kind: Any, *, full: bool) -> Any:
    """A value of a type."""
    if kind is Plan:
        return PLAN
    if kind is MachinePlan:
        return PLAN.machines["db"]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return sample(args[0], full=full)
    if origin is Literal:
        return args[-1 if full else 0]
    if origin in (Union, types.UnionType):
        if type(None) in args and not full:
            return None
        return sample(next(a for a in args if a is not type(None)), full=full)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return (sample(args[0], full=full),) if full else ()
        return tuple(sample(a, full=full) for a in args)
    if origin is list:
        return [sample(args[0], full=full)] if full else []
    if origin is dict:
        return {sample(args[0], full=full): sample(args[1], full=full)} if full else {}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return list(kind)[-1 if full else 0]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return message(kind, full=full)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{f.name: sample(hints[f.name], full=full) for f in dataclasses.fields(kind)})  # type: ignore[operator]
    simple = {str: "text ünï", int: 7, float: 1.5, bool: full, datetime: AT, Any: {"a": [1, None, "x"]}}
    return simple[kind]


def message(kind: type[BaseModel], *, full: bool) -> BaseModel:
    """A message; `full` fills optional fields as well."""
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for name, field in kind.model_fields.items():
        if field.is_required() or full:
            values[name] = sample(hints[name], full=full)
    if "points" in values and "machines" in values and isinstance(values["points"], dict):
        values["machines"] = tuple(values["points"])  # FailoverInput: points only of machines of the run
    if kind.__name__ == "FailoverInput" and full:  # its fields depend on each other
        values["kind"] = "unplanned"
        values["point"] = "latest"
        values["points"] = dict.fromkeys(values["points"], "p-0000000001-00000000")
    return kind(**values)
