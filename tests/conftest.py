"""For all tests: a failure is told, whatever its traceback looks like, and soon."""

from __future__ import annotations

import os

from _pytest._code.code import TracebackEntry

# Under CI pytest spells out every difference, with an algorithm that takes minutes for the bytes of a disk.
for _variable in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_variable, None)

_line = TracebackEntry.lineno.fget
assert _line is not None


def _known_line(entry: TracebackEntry) -> int:
    """CPython 3.11 knows no line of a frame that a signal (the alarm of a timeout) interrupted between two lines; pytest
    would end the whole session over it, with neither the test's name nor the other failures."""
    raw = entry._rawentry
    return _line(entry) if raw.tb_lineno is not None else raw.tb_frame.f_code.co_firstlineno - 1


TracebackEntry.lineno = property(_known_line)  # type: ignore[assignment]  # on purpose, see above
