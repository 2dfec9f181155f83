"""Run Command: how a script goes in, and how exit code, output and errors come out.

Azure's Run Command tells output as text, cut to its last 4 KiB, and says nothing dependable about the exit code. So the
script is carried inside a small wrapper that prints the code last, on a line of its own that only this call knows.
"""

from __future__ import annotations

import base64
import re
import secrets
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from farshore.providers.ports import ScriptResult

UNKNOWN_EXIT = 255  # the wrapper's last line is missing: the script's shell was killed or never started


@dataclass(frozen=True, slots=True)
class Call:
    """One script, ready for Run Command."""

    command: str  # Azure's command id
    lines: tuple[str, ...]
    marker: str  # what precedes the exit code


def wrap(script: str, *, windows: bool) -> Call:
    """A call for `script`; a shebang is honoured on Linux, Windows scripts are PowerShell."""
    marker = f"farshore-exit-{secrets.token_hex(8)}:"
    if windows:
        # A file, because a command line is short; with a mark of its encoding, which old PowerShell needs.
        text = base64.b64encode(b"\xef\xbb\xbf" + script.encode()).decode()
        lines = (
            '$file = Join-Path ([IO.Path]::GetTempPath()) ("farshore-" + [guid]::NewGuid() + ".ps1")',
            "[IO.File]::WriteAllBytes($file, [Convert]::FromBase64String(@'",
            *textwrap.wrap(text, 1000),
            "'@))",
            "powershell.exe -NoProfile -NonInteractive -ExecutionPolicy Bypass -File $file",
            "$code = $LASTEXITCODE",
            "Remove-Item -Force $file",
            f'Write-Output ""; Write-Output "{marker}$code"',
        )
        return Call("RunPowerShellScript", lines, marker)
    body = script if script.endswith("\n") else script + "\n"
    first = script.splitlines()[0] if script else ""
    shell = first[2:].strip() if first.startswith("#!") else "/bin/sh"
    folded = textwrap.wrap(base64.b64encode(body.encode()).decode(), 1000)
    lines = (
        'file="$(mktemp)" || exit 1',
        "base64 -d > \"$file\" <<'FARSHORE_SCRIPT'",
        *folded,
        "FARSHORE_SCRIPT",
        f'{shell} "$file"',
        "code=$?",
        'rm -f "$file"',
        f"printf '\\n{marker}%s\\n' \"$code\"",
    )
    return Call("RunShellScript", lines, marker)


def parse(entries: Sequence[tuple[str, str]], call: Call) -> ScriptResult:
    """Read Run Command's answer: (code, message) pairs, Linux in one, Windows one a stream."""
    out, err = "", ""
    for code, message in entries:
        lowered = code.lower()
        if lowered.startswith("componentstatus/stdout"):
            out += message
        elif lowered.startswith("componentstatus/stderr"):
            err += message
        else:
            found_out, found_err = _streams(message)
            out, err = out + found_out, err + found_err
    found = re.search(re.escape(call.marker) + r"(-?\d+)\s*$", out.rstrip())
    if found:
        rest = out[: out.rfind(call.marker)]
        # The wrapper put one line break before its marker.
        return ScriptResult(int(found[1]), rest[:-1] if rest.endswith("\n") else rest, err)
    told = re.search(r"exit status[ =:]*(-?\d+)", "\n".join(message for _, message in entries))
    return ScriptResult(int(told[1]) if told else UNKNOWN_EXIT, out, err)


def _streams(message: str) -> tuple[str, str]:
    """`Enable succeeded: \\n[stdout]\\n…\\n[stderr]\\n…` as Linux tells it."""
    _, mark, rest = message.partition("[stdout]\n")
    if not mark:
        return message, ""
    # The last mark: a script may print such a line itself.
    out, _, err = rest.rpartition("\n[stderr]")
    return out, err.removeprefix("\n")
