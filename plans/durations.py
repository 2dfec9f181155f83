"""Durations as people write them. Inside Farshore a duration is a float in seconds."""

from __future__ import annotations

import math
import re

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NUMBER = r"\d+(?:\.\d+)?"
_SHORT = re.compile(rf"(?:{_NUMBER}(?:ms|s|m|h|d|w))+")
_PART = re.compile(rf"({_NUMBER})(ms|s|m|h|d|w)")
_ISO = re.compile(
    rf"P(?=[\dT])(?:(?P<w>{_NUMBER})W)?(?:(?P<d>{_NUMBER})D)?"
    rf"(?:T(?=\d)(?:(?P<h>{_NUMBER})H)?(?:(?P<m>{_NUMBER})M)?(?:(?P<s>{_NUMBER})S)?)?"
)
HINT = "write 30s, 5m, 8h, 1d, 1h30m, PT5M or a number of seconds"


def parse_duration(value: object) -> float:
    """Seconds of `"30s"`, `"1h30m"`, `"PT5M"`, `"P1D"` or a number of seconds.

    Months and years are refused: they have no fixed length. Raises ValueError with words for a person.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a duration; {HINT}")
    if isinstance(value, str):
        seconds = _parse_text(value)
    else:
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
    if seconds is None or not math.isfinite(seconds):
        raise ValueError(f"{value!r} is not a duration; {HINT}")
    if seconds < 0:
        raise ValueError(f"{value!r} is negative; a duration cannot be")
    return seconds


def _parse_text(text: str) -> float | None:
    compact = "".join(text.split())
    if _SHORT.fullmatch(compact.lower()):
        return math.fsum(float(n) * _UNITS[unit] for n, unit in _PART.findall(compact.lower()))
    iso = _ISO.fullmatch(compact.upper())
    if iso:
        return math.fsum(float(n) * _UNITS[unit] for unit, n in iso.groupdict().items() if n is not None)
    try:
        return float(compact) if re.fullmatch(rf"-?{_NUMBER}", compact) else None
    except ValueError:
        return None


def format_duration(seconds: float) -> str:
    """The short form, to the second: `90` gives `1m30s`. Under a second it is shown in milliseconds."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms" if seconds > 0 else "0s"
    rest = round(seconds)
    parts: list[str] = []
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(rest, int(_UNITS[unit]))
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)
