"""Names and tags of what Farshore makes in Azure: functions of plan, run and machine, so that a repeat finds them.

Lengths and characters follow Azure's naming rules for resources: 1 to 80 characters (machines 64) of letters, digits,
`-` and `_`, first and last a letter or digit. Where a name had to be shortened or changed, a digest keeps it unique.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.ports import Owner, Purpose, TargetSpec

PLAN, RUN, MACHINE, PURPOSE = "farshore-plan", "farshore-run", "farshore-machine", "farshore-purpose"
POINT = "farshore-point"
STAGING = "staging/"

_MAX_NAME, _MAX_MACHINE, _MAX_TAG = 80, 64, 256
_MACHINE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?")


def short(text: str, digits: int = 6) -> str:
    """The first hex digits of a SHA-256: what stands for a run inside a name."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def clean(text: str) -> str:
    """`text` with only characters that every resource name may have; equal texts stay equal, different ones differ."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", text).strip("-_") or "x"
    return safe if safe == text else f"{safe}-{short(text)}"


def _join(base: str, tail: str, limit: int = _MAX_NAME) -> str:
    base = clean(base)
    if len(base) + len(tail) > limit:
        room = limit - len(tail) - 7
        base = f"{base[:room].rstrip('-_')}-{short(base)}"
    return base + tail


def machine(spec: TargetSpec, purpose: Purpose) -> str:
    """Name of the VM. Raises InvalidInput where Azure would refuse the plan's name."""
    if not _MACHINE_NAME.fullmatch(spec.name):
        raise FarshoreError(
            Code.INVALID_INPUT,
            f"{spec.name!r} can't be the name of a virtual machine in Azure: up to 64 letters, digits and hyphens, "
            "beginning and ending with a letter or digit.",
            subject=spec.machine,
        )
    return spec.name if purpose is Purpose.FAILOVER else _join(spec.name, "-test", _MAX_MACHINE)


def disk(owner: Owner, index: int) -> str:
    # A test and a failover are different runs, so the run's digest keeps their disks apart.
    return _join(owner.machine, f"-disk{index}-{short(owner.run)}")


def nic(owner: Owner, spec: TargetSpec, index: int) -> str:
    return _join(machine(spec, owner.purpose), f"-nic{index}-{short(owner.run)}")


def public_address(owner: Owner, spec: TargetSpec, index: int) -> str:
    return _join(machine(spec, owner.purpose), f"-ip{index}-{short(owner.run)}")


def test_network(owner: Owner) -> str:
    return f"farshore-test-{short(owner.run)}"


def staging_blob(owner: Owner, index: int) -> str:
    return f"{STAGING}{disk(owner, index)}.vhd"


def tag_value(text: str) -> str:
    """`text` as a tag's value: at most 256 characters, long ones end in a digest."""
    return text if len(text) <= _MAX_TAG else f"{text[: _MAX_TAG - 17]}~{short(text, 16)}"


def tags(owner: Owner, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Tags of a resource; the plan's own can't replace Farshore's."""
    own = {
        PLAN: tag_value(owner.plan),
        RUN: tag_value(owner.run),
        MACHINE: tag_value(owner.machine),
        PURPOSE: owner.purpose.value,
    }
    others = {k: tag_value(v) for k, v in (extra or {}).items() if not k.lower().startswith("farshore-")}
    return {**others, **own}


def _folded(found: Mapping[str, str] | None) -> dict[str, str]:
    # Names of tags are case-insensitive in Azure, values are not.
    return {k.lower(): v for k, v in (found or {}).items()}


def read_tag(found: Mapping[str, str] | None, name: str) -> str:
    return _folded(found).get(name, "")


def is_of(owner: Owner, found: Mapping[str, str] | None) -> bool:
    """True when a resource was made for this machine by this run, with this purpose."""
    seen = _folded(found)
    return all(seen.get(name, "") == value for name, value in tags(owner).items())


def matches(
    found: Mapping[str, str] | None,
    *,
    purpose: Purpose,
    plan: str = "",
    run: str = "",
    machine: str = "",
    except_run: str = "",
    run_level: bool = False,
) -> bool:
    """True when Farshore made it, with this purpose, and every argument that isn't empty agrees. `run_level`: only what
    belongs to a run as a whole and to no machine."""
    seen = _folded(found)
    if seen.get(PURPOSE) != purpose.value or not seen.get(RUN) or not seen.get(PLAN):
        return False
    if except_run and seen[RUN] == tag_value(except_run):
        return False
    if run_level and seen.get(MACHINE):
        return False
    wanted = {PLAN: plan, RUN: run, MACHINE: machine}
    return all(seen.get(name, "") == tag_value(value) for name, value in wanted.items() if value)


def describe(found: Mapping[str, str] | None) -> str:
    """Who made a resource, for a person."""
    seen = _folded(found)
    if not seen.get(RUN):
        return "it was not made by Farshore"
    return f"it was made by run {seen[RUN]} of plan {seen.get(PLAN, '?')} (purpose {seen.get(PURPOSE, '?')})"


def metadata(owner: Owner, point: str) -> dict[str, str]:
    """The tags as metadata of a blob: names are identifiers, values are percent-encoded (headers are ASCII)."""
    values = {**tags(owner), POINT: tag_value(point)}
    return {name.replace("-", "_"): quote(value, safe="") for name, value in values.items()}


def from_metadata(found: Mapping[str, str] | None) -> dict[str, str]:
    """The tags that `metadata` wrote."""
    return {
        name.lower().replace("_", "-"): unquote(value)
        for name, value in (found or {}).items()
        if name.lower().startswith("farshore_")
    }
