"""What goes into Run Command and what comes out: the wrapper really runs here, in a shell."""

from __future__ import annotations

import subprocess

import pytest

from farshore.providers.azure.scripts import UNKNOWN_EXIT, Call, parse, wrap
from farshore.providers.ports import ScriptResult

HEAD = "Enable succeeded: \n[stdout]\n"


def run(script: str) -> ScriptResult:
    """As Azure's agent does it: the lines become a file, the shell runs it, the streams become one text."""
    call = wrap(script, windows=False)
    done = subprocess.run(
        ["/bin/sh", "-c", "\n".join(call.lines)], capture_output=True, text=True, timeout=20, check=False
    )
    return parse(
        [("ProvisioningState/succeeded", f"{HEAD}{done.stdout[-4096:]}\n[stderr]\n{done.stderr[-4096:]}")],
        call,
    )


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_the_exit_code_comes_through(code: int) -> None:
    assert run(f"exit {code}").exit_code == code


def test_both_streams_come_through() -> None:
    assert run("echo out\necho err >&2") == ScriptResult(0, "out\n", "err\n")


def test_output_without_a_last_line_break_stays_without() -> None:
    assert run("printf abc").stdout == "abc"


def test_a_script_may_say_anything() -> None:
    script = "cat <<'EOF'\n[stderr]\nFARSHORE_SCRIPT\nfarshore-exit-x:9\n$HOME `id` \"'\nEOF\nexit 4"
    result = run(script)
    assert result.exit_code == 4
    assert result.stdout == "[stderr]\nFARSHORE_SCRIPT\nfarshore-exit-x:9\n$HOME `id` \"'\n"


def test_a_shebang_is_honoured() -> None:
    assert (
        run("#!/usr/bin/env python3\nimport sys\nprint(sys.version_info.major)\nsys.exit(7)").exit_code == 7
    )


def test_the_exit_code_survives_when_azure_cuts_the_output() -> None:
    result = run("i=0; while [ $i -lt 2000 ]; do echo 0123456789; i=$((i+1)); done; exit 5")
    assert result.exit_code == 5
    assert len(result.stdout) <= 4096


def test_a_long_script_comes_through() -> None:
    assert run("\n".join(f": {n}" for n in range(5000)) + "\necho end").stdout == "end\n"


def test_without_the_last_line_azures_own_words_count() -> None:
    call = wrap("x", windows=False)
    told = "Enable failed: failed to execute command: command terminated with exit status=137\n[stdout]\n\n[stderr]\nKilled"
    assert parse([("ProvisioningState/failed/0", told)], call) == ScriptResult(137, "", "Killed")
    assert parse([("ProvisioningState/succeeded", HEAD + "\n[stderr]\n")], call).exit_code == UNKNOWN_EXIT
    assert parse([], call) == ScriptResult(UNKNOWN_EXIT, "", "")


def test_windows_answers_one_entry_a_stream() -> None:
    call = wrap("Get-Date", windows=True)
    assert call.command == "RunPowerShellScript"
    entries = [
        ("ComponentStatus/StdOut/succeeded", f"today\n\n{call.marker}3\n"),
        ("ComponentStatus/StdErr/succeeded", "oops"),
    ]
    assert parse(entries, call) == ScriptResult(3, "today\n", "oops")


def test_every_call_has_its_own_marker() -> None:
    assert wrap("x", windows=False).marker != wrap("x", windows=False).marker
    assert isinstance(wrap("", windows=False), Call)
