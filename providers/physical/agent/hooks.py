"""Scripts of the machine's owner around a point: quiesce applications before, let them go after.

Every hook has a time limit; a hook that is late is killed with all its children. The scripts after the point always run,
in reverse order, also when a script before it failed. Scripts get FARSHORE_CUT and FARSHORE_PHASE (before, after).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hook:
    """Programs with arguments, run without a shell; an empty one is skipped. Seconds for each of the two."""

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class HookResult:
    """`error` is for a person, "" when it went well."""

    name: str
    phase: str
    error: str


def run(hook: Hook, phase: str, cut: str) -> HookResult:
    """Run one side of a hook. Never raises for what the script does."""
    command = hook.before if phase == "before" else hook.after
    if not command:
        return HookResult(hook.name, phase, "")
    environment = {**os.environ, "FARSHORE_CUT": cut, "FARSHORE_PHASE": phase}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return HookResult(hook.name, phase, f"{command[0]} cannot be run: {error.strerror}")
    try:
        output, _ = process.communicate(timeout=hook.timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        return HookResult(hook.name, phase, f"not done after {hook.timeout:g} s, killed")
    if process.returncode:
        text = output.decode(errors="replace").strip()[-500:]
        return HookResult(hook.name, phase, f"ended with {process.returncode}: {text}")
    return HookResult(hook.name, phase, "")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # Its output may be held open by a grandchild that left the group: do not wait for that.
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def before(hooks: Sequence[Hook], cut: str) -> tuple[list[Hook], list[HookResult]]:
    """Run until one fails. Returns the hooks that were begun, which `after` has to end, and all results."""
    begun: list[Hook] = []
    results: list[HookResult] = []
    for hook in hooks:
        begun.append(hook)
        results.append(run(hook, "before", cut))
        if results[-1].error:
            break
    return begun, results


def after(begun: Sequence[Hook], cut: str) -> list[HookResult]:
    """Run all, in reverse, whatever happens."""
    return [run(hook, "after", cut) for hook in reversed(begun)]
