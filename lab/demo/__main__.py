"""`make demo`: protect a three-tier application, rehearse, clean up, fail over, prove it byte for byte.

Everything is done through Farshore's command line, as a user would; this program only starts the laboratory, narrates
and checks. Exit code 0 if every proof held.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from farshore.lab.demo.application import MACHINES, NAMES, Proof, prove
from farshore.lab.stack import Stack, StackError, wait_until

PLAN = "crm"
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


class DemoFailed(Exception):
    """A step of the demo did not do what it must."""


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument(
        "--exit", action="store_true", help="end when done instead of staying up until Ctrl-C"
    )
    parser.add_argument(
        "--root", type=Path, help="folder of all state (default: a temporary one, removed at the end)"
    )
    parser.add_argument(
        "--approve-after", type=float, default=None, metavar="SECONDS",
        help="the demo approves the manual action itself after this time (default: 60; at once with --exit)",
    )  # fmt: skip
    options = parser.parse_args()
    patience = options.approve_after if options.approve_after is not None else (0.0 if options.exit else 60.0)
    root = options.root or Path(tempfile.mkdtemp(prefix="farshore-demo-"))
    stack = Stack(root, machines=MACHINES)
    begun = time.monotonic()
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # also where the shell had it ignored, as for background jobs
        signal.signal(number, _interrupt)
    code = 1
    try:
        code = _story(stack, patience)
        console.print(f"\nThe whole demo took {time.monotonic() - begun:.0f} s.")
        if not options.exit and code == 0:
            console.print(f"Everything stays up: [bold]{stack.ui}[/] — Ctrl-C ends it.")
            while True:
                signal.pause()  # until a signal raises KeyboardInterrupt
        return code
    except KeyboardInterrupt:
        console.print("\nEnding.")
        return code if code == 0 else 130
    except (DemoFailed, StackError) as error:
        console.print(f"\n[bold red]The demo failed:[/] {escape(str(error))}")
        console.print(f"Logs: {root / 'logs'}")
        return 1
    finally:
        stack.stop()
        if options.root is None and code == 0:
            stack.remove()


def _interrupt(_number: int, _frame: object) -> None:
    # Once: a second one would interrupt the ending, and leave servers behind that nobody ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _story(stack: Stack, patience: float) -> int:
    _title("A laboratory: Temporal, a data centre, an Azure, three workers")
    stack.start()
    console.print(f"Temporal's web UI: [bold]{stack.ui}[/]")
    console.print(f"Settings for your own commands: export FARSHORE_SETTINGS={stack.settings}")
    console.print(
        f"In the data centre: {', '.join(NAMES)}, writing numbered records to their disks all the time."
    )

    _title("Protect: initial replication, then a recovery point every 5 s")
    _farshore(stack, "protect", PLAN, "--reason", "demo")
    counts = {name: _points(stack, name) for name in NAMES}
    wait_until(
        "three more recovery points", lambda: all(_points(stack, n) >= counts[n] + 3 for n in NAMES), 90
    )
    _farshore(stack, "status", PLAN)

    proofs: list[tuple[str, Proof]] = []
    _title("Test failover: into an isolated network, replication goes on")
    before = {e.id for e in stack.azure.history()}
    counts = {name: _points(stack, name) for name in NAMES}
    _farshore(stack, "test", PLAN, "--reason", "does it come up?")
    proofs += [("test", prove(stack, name, "test", against_live=False)) for name in NAMES]
    wait_until("replication during the test", lambda: all(_points(stack, n) > counts[n] for n in NAMES), 60)
    console.print("Replication went on during the test: every machine has newer points.")

    _title("Clean-up: nothing is left")
    _farshore(stack, "cleanup", PLAN, "--notes", "came up, data intact")
    _created_is_deleted(stack, before)

    _title("Planned failover: nothing may be lost")
    run = _start_planned(stack)
    rto = _approve_and_finish(stack, run, patience)
    proofs += [("planned", prove(stack, name, "failover", against_live=True)) for name in NAMES]

    _title("Proof")
    good = _show(proofs)
    planned = [p for kind, p in proofs if kind == "planned"]
    lost = sum(p.lost for p in planned)
    console.print(
        f"RTO of the planned failover, measured: [bold]{rto:.1f} s[/] (with the wait for the approval)."
    )
    console.print(f"RPO of the planned failover, measured by the ledgers: [bold]{lost} records lost[/].")
    console.print(f"The runs in the web UI: {_link(stack, run)}")
    return 0 if good and lost == 0 else 1


def _start_planned(stack: Stack) -> str:
    done = stack.run("failover", PLAN, "--kind", "planned", "--reason", "demo: the site moves", "--no-wait")
    if done.returncode != 0:
        raise DemoFailed(done.stdout + done.stderr)
    run = done.stdout.split()[1]
    console.print(f"Started {run}: {_link(stack, run)}")
    return run


def _approve_and_finish(stack: Stack, run: str, patience: float) -> float:
    """Follow the run; approve its manual action unless a person does so in the web UI first."""
    begun = time.monotonic()
    watcher = subprocess.Popen(
        stack.farshore("watch", run),
        env=stack.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert watcher.stdout is not None
    asked = False
    for line in watcher.stdout:
        console.print(escape(line.rstrip()))
        if "WAITING FOR A PERSON" in line and not asked:
            asked = True
            if patience:
                console.print(
                    f"Approve it in the web UI: {_link(stack, run)} (Update: decide), or by the command below."
                )
                console.print(f"In {patience:.0f} s the demo does it.")
            threading.Thread(target=_approve_later, args=(stack, run, patience, watcher), daemon=True).start()
    if watcher.wait() != 0:
        raise DemoFailed(f"the planned failover ended with {watcher.returncode}")
    return time.monotonic() - begun


def _approve_later(stack: Stack, run: str, patience: float, watcher: subprocess.Popen[str]) -> None:
    try:
        watcher.wait(patience)
    except subprocess.TimeoutExpired:
        done = stack.run("approve", run, "--by", "demo", "--observation", "the demo's own approval")
        if done.returncode == 0:
            console.print("The demo approved the manual action.")
        # else a person was faster: the action is no longer pending


def _farshore(stack: Stack, *arguments: str) -> None:
    console.print(f"[dim]$ farshore {' '.join(arguments)}[/]")
    process = subprocess.Popen(
        stack.farshore(*arguments),
        env=stack.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        console.print(escape(line.rstrip()))
    if process.wait() != 0:
        raise DemoFailed(f"`farshore {' '.join(arguments)}` ended with {process.returncode}")


def _points(stack: Stack, machine: str) -> int:
    """Snapshots that replication has taken of a machine so far, as the data centre counts them."""
    return len({entry["snapshot"] for entry in stack.vcenter.digests(machine)})


def _created_is_deleted(stack: Stack, before: set[str]) -> None:
    events = [
        e for e in stack.azure.history() if e.tags.get("farshore-purpose") == "test" and e.id not in before
    ]
    created = sorted(e.id for e in events if e.event == "created")
    deleted = sorted(e.id for e in events if e.event == "deleted")
    left = [r.id for r in stack.azure.resources() if r.tags.get("farshore-purpose") == "test"]
    for id in created:
        console.print(f"  created and deleted: {escape(id.split('/providers/')[-1])}")
    if created != deleted or left or not created:
        raise DemoFailed(
            f"clean-up left something: created {len(created)}, deleted {len(deleted)}, left {left}"
        )
    console.print(f"[green]created = deleted = {len(created)} resources[/]")


def _show(proofs: list[tuple[str, Proof]]) -> bool:
    table = Table(box=box.SIMPLE)
    for title in (
        "failover",
        "machine",
        "disks",
        "bytes equal",
        "ledger",
        "survived up to",
        "written",
        "lost",
        "seconds lost",
    ):
        table.add_column(title)
    good = True
    for kind, p in proofs:
        good = good and p.equal and p.intact
        table.add_row(
            kind,
            p.machine,
            str(p.disks),
            "[green]yes, sha256[/]" if p.equal else "[bold red]NO[/]",
            "[green]unbroken[/]" if p.intact else f"[bold red]{escape('; '.join(p.problems))}[/]",
            str(p.recovered),
            "while it ran on" if kind == "test" else str(p.acknowledged),
            "-" if kind == "test" else str(p.lost),
            "-" if kind == "test" else f"{p.lost_seconds:.2f}",
        )
    console.print(table)
    return good


def _title(text: str) -> None:
    console.print()
    console.rule(f"[bold]{escape(text)}[/]", align="left")


def _link(stack: Stack, run: str) -> str:
    return f"{stack.ui}/namespaces/default/workflows/{quote(run, safe='')}"


if __name__ == "__main__":
    sys.exit(main())
