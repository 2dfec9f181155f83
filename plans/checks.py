"""Checks that look at the whole plan: one table of functions, each over the parsed data and yielding issues.

They work on plain data and not on the model, so that one wrong field does not hide everything else: whatever has a
wrong type is passed over here, since the model's own check names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

from farshore.plans.durations import format_duration, parse_duration
from farshore.plans.source import Path

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True)
class Issue:
    """Something wrong at a place of the plan. `key` points at the key rather than at the value."""

    path: Path
    severity: str  # "error": the plan is refused; "warning": it runs, probably not as meant
    code: str
    message: str
    fix: str
    key: bool = False


Data = Mapping[str, Any]


def check(data: Data) -> list[Issue]:
    """All issues of a plan's data."""
    return [issue for function in CHECKS for issue in function(data)]


# ---- reaching into data of any shape ----------------------------------------------------------------------------------


def _map(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _seconds(value: Any) -> float | None:
    try:
        return parse_duration(value)
    except ValueError:
        return None


def _groups(data: Data) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, group in enumerate(_list(data.get("boot"))):
        if isinstance(group, dict):
            yield i, _map(group)


def _members(data: Data) -> Iterator[tuple[Path, str]]:
    for i, group in _groups(data):
        for k, name in enumerate(_list(group.get("machines"))):
            if isinstance(name, str):
                yield ("boot", i, "machines", k), name


def _targets(data: Data) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, machine in _map(data.get("machines")).items():
        yield name, _map(_map(machine).get("target"))


def _actions(data: Data) -> Iterator[tuple[Path, dict[str, Any]]]:
    places: list[tuple[Path, dict[str, Any]]] = [(("shutdown",), _map(data.get("shutdown")))]
    places += [(("boot", i), group) for i, group in _groups(data)]
    for path, place in places:
        for side in ("before", "after"):
            for k, action in enumerate(_list(place.get(side))):
                if isinstance(action, dict):
                    yield (*path, side, k), _map(action)


def _suggest(word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _names(known: list[str]) -> str:
    shown = ", ".join(known[:8])
    return f"{shown} and {len(known) - 8} more" if len(known) > 8 else shown or "none"


# ---- the checks -------------------------------------------------------------------------------------------------------


def _unknown_machines(data: Data) -> Iterator[Issue]:
    machines = _map(data.get("machines"))
    known = list(machines)
    for path, name in _members(data):
        if name not in machines:
            yield Issue(
                path,
                ERROR,
                "unknown-machine",
                f"{name!r} is not a machine of this plan.{_suggest(name, known)}",
                f"Name one of the plan's machines ({_names(known)}), or describe {name} under `machines`.",
            )


def _grouped_twice(data: Data) -> Iterator[Issue]:
    seen: dict[str, Path] = {}
    for path, name in _members(data):
        first = seen.setdefault(name, path)
        if first is path:
            continue
        where = "in this group" if first[1] == path[1] else f"in boot[{first[1]}]"
        yield Issue(
            path, ERROR, "machine-twice", f"{name!r} stands {where} already", "Keep it in one group, once."
        )


def _grouped_nowhere(data: Data) -> Iterator[Issue]:
    if "boot" not in data or any(not isinstance(g.get("machines", []), list) for _, g in _groups(data)):
        return  # the groups themselves are wrong: the model says so
    grouped = {name for _, name in _members(data)}
    for name in _map(data.get("machines")):
        if name not in grouped:
            yield Issue(
                ("machines", name),
                ERROR,
                "machine-in-no-group",
                f"{name!r} is in no boot group, so nothing would ever start it",
                "Add it to the `machines` of a group under `boot`, or remove it from the plan.",
                key=True,
            )


def _groups_themselves(data: Data) -> Iterator[Issue]:
    seen: dict[str, int] = {}
    for i, group in _groups(data):
        name = group.get("group")
        if isinstance(name, str) and seen.setdefault(name, i) != i:
            yield Issue(
                ("boot", i, "group"),
                ERROR,
                "group-twice",
                f"the name {name!r} is taken by boot[{seen[name]}]",
                "Give each group a name of its own.",
            )
        if not any(group.get(key) for key in ("machines", "before", "after")):
            yield Issue(
                ("boot", i),
                WARNING,
                "empty-group",
                "this group has neither machines nor actions",
                "Add machines, or remove the group.",
            )


def _taken_twice(data: Data) -> Iterator[Issue]:
    """Addresses and names at the target, machines at the source: each belongs to one machine."""
    machines = _map(data.get("machines"))
    addresses: dict[str, str] = {}
    names: dict[str, str] = {}
    sources: dict[str, str] = {}
    for key, target in _targets(data):
        for table, value, path, code, what in (
            (
                addresses,
                target.get("address"),
                ("machines", key, "target", "address"),
                "address-twice",
                "address",
            ),
            (
                names,
                target.get("name") or key,
                ("machines", key, "target", "name"),
                "name-twice",
                "target name",
            ),
            (
                sources,
                _map(machines[key]).get("source") or key,
                ("machines", key, "source"),
                "source-twice",
                "source machine",
            ),
        ):
            if not isinstance(value, str):
                continue
            owner = table.setdefault(value if table is sources else value.lower(), key)
            if owner != key:
                yield Issue(
                    path,
                    ERROR,
                    code,
                    f"the {what} {value} belongs to {owner} already",
                    f"Give {key} another one.",
                )


def _networks(data: Data) -> Iterator[Issue]:
    network = _map(data.get("network"))
    failover, test = network.get("failover"), network.get("test")
    if isinstance(failover, str) and failover.lower() == "isolated":
        yield Issue(
            ("network", "failover"),
            ERROR,
            "failover-isolated",
            "`isolated` is made and removed by a test; a real failover needs a network that stays",
            "Name a network of the target site.",
        )
    elif isinstance(test, str) and isinstance(failover, str) and test.lower() == failover.lower():
        yield Issue(
            ("network", "test"),
            ERROR,
            "test-in-production",
            f"tests would run in {failover!r}, the network of the real failover",
            "Write `isolated`, or name a network that has no way into production.",
        )


def _sites(data: Data) -> Iterator[Issue]:
    sites = _map(data.get("sites"))
    if sites.get("source") is not None and sites.get("source") == sites.get("target"):
        yield Issue(
            ("sites", "target"),
            ERROR,
            "same-site",
            f"source and target are the same site ({sites['source']})",
            "Name the site that takes over.",
        )


def _replication(data: Data) -> Iterator[Issue]:
    replication = _map(data.get("replication"))
    interval = _seconds(replication.get("interval", 30)) or 30.0
    every = format_duration(interval)
    for key in ("rpo_threshold", "app_consistent_every"):
        seconds = _seconds(replication.get(key))
        if seconds is not None and 0 < seconds < interval:
            what = "alerts would never end" if key == "rpo_threshold" else "points come no more often"
            yield Issue(
                ("replication", key),
                WARNING,
                key.replace("_", "-"),
                f"{format_duration(seconds)} is shorter than the interval of {every}: {what}",
                f"Write at least {every}.",
            )
    earlier = 0.0
    rules = _list(replication.get("retention"))
    for i, rule in enumerate(rules):
        path: Path = ("replication", "retention", i)
        within, keep = _seconds(_map(rule).get("within")), _seconds(_map(rule).get("keep"))
        if within is None:
            continue
        if 0 < within <= earlier:
            yield Issue(
                (*path, "within"),
                ERROR,
                "retention-order",
                f"{format_duration(within)} does not come after the {format_duration(earlier)} of the rule before",
                "Order the rules by age, shortest first.",
            )
        if keep is not None and keep > within:
            yield Issue(
                (*path, "keep"),
                WARNING,
                "retention-keep",
                f"one point per {format_duration(keep)} within {format_duration(within)} keeps at most one",
                "Keep points more often, or for longer.",
            )
        earlier = max(earlier, within)
    if rules and 0 < earlier < interval:
        yield Issue(
            ("replication", "retention"),
            ERROR,
            "retention-short",
            f"points are kept for {format_duration(earlier)}, shorter than the interval of {every}",
            "Keep points for several intervals at least.",
            key=True,
        )


def _scripts(data: Data) -> Iterator[Issue]:
    for path, action in _actions(data):
        script = action.get("script")
        if not isinstance(script, str):
            continue
        parts = script.replace("\\", "/").split("/")
        if script.startswith(("/", "\\", "~")) or script[1:2] == ":" or ".." in parts:
            yield Issue(
                (*path, "script"),
                ERROR,
                "script-path",
                f"{script!r} leads out of the plans folder's scripts/",
                "Put the file into scripts/ and name it from there, such as `smoke.sh`.",
            )


def _guest_scripts(data: Data) -> Iterator[Issue]:
    known = list(_map(data.get("machines")))
    starts: dict[str, int] = {name: cast(int, path[1]) for path, name in reversed(list(_members(data)))}
    for path, action in _actions(data):
        if "script" not in action:
            continue
        machine = action.get("machine")
        if action.get("where") != "guest":
            if machine is not None:
                yield Issue(
                    (*path, "machine"),
                    WARNING,
                    "machine-unused",
                    "`machine` means nothing for a script on a worker",
                    "Add `where: guest` to run it in the machine, or remove `machine`.",
                    key=True,
                )
            continue
        if machine is None:
            yield Issue(
                path,
                ERROR,
                "machine-missing",
                "a script in a guest needs its `machine`",
                f"Add `machine: <one of {_names(known)}>`.",
            )
        elif isinstance(machine, str) and machine not in known:
            yield Issue(
                (*path, "machine"),
                ERROR,
                "unknown-machine",
                f"{machine!r} is not a machine of this plan.{_suggest(machine, known)}",
                f"Name one of the plan's machines: {_names(known)}.",
            )
        elif isinstance(machine, str) and _too_early(path, starts.get(machine)):
            yield Issue(
                (*path, "machine"),
                ERROR,
                "guest-too-early",
                f"{machine!r} has not been recovered yet when this script runs",
                "Move the script behind the group that starts the machine, or run it on a worker.",
            )


def _too_early(path: Path, start: int | None) -> bool:
    if path[0] == "shutdown":
        return True
    here, side = cast(int, path[1]), path[2]
    return start is not None and (start > here or (start == here and side == "before"))


def _action_words(data: Data) -> Iterator[Issue]:
    for path, action in _actions(data):
        if "manual" in action and not action.get("instructions"):
            yield Issue(
                path,
                WARNING,
                "no-instructions",
                "the person on call would read nothing but the title",
                "Add `instructions`: what to do and what a good outcome looks like.",
            )
        kinds = action.get("on")
        if isinstance(kinds, list) and not kinds:
            yield Issue(
                (*path, "on"),
                WARNING,
                "never-runs",
                "`on: []` never runs",
                "Name the kinds of run, or remove the action.",
            )
        if path[0] == "shutdown" and kinds == ["test"]:
            yield Issue(
                (*path, "on"),
                WARNING,
                "never-runs",
                "a test does not shut anything down, so this never runs",
                "Move the action to a boot group.",
            )


CHECKS: tuple[Callable[[Data], Iterator[Issue]], ...] = (
    _sites,
    _networks,
    _replication,
    _taken_twice,
    _unknown_machines,
    _grouped_twice,
    _grouped_nowhere,
    _groups_themselves,
    _scripts,
    _guest_scripts,
    _action_words,
)
