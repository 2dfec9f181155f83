"""What runs inside the machines: a ledger writer and churn for each powered-on machine that has a workload.

A workload: `records_per_second`, `churn_bytes_per_second`, `area_size` (ledger bytes on each disk), `hot_size` (bytes
of each disk that most of the churn stays in, as that of applications does; 0: it goes everywhere). A record counts as
acknowledged once it stands in `acks/<vm>.log` (one line `number time_ns kind`), which is outside the disks and so
survives whatever happens to them.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

from farshore.lab.guest import ledger
from farshore.lab.vcenter.disks import Disk

if TYPE_CHECKING:
    from farshore.lab.vcenter.machine import Machine
    from farshore.lab.vcenter.service import LabVCenter

log = logging.getLogger(__name__)
CHURN_SIZE = 4096
COLD = 64  # one piece of churn in so many leaves the hot part
_DEFAULTS: dict[str, Any] = {
    "records_per_second": 20.0,
    "churn_bytes_per_second": 0,
    "area_size": 4 << 20,
    "hot_size": 0,
}


class GuestDisk:
    """A disk as the guest's ledger sees it."""

    def __init__(self, machine: Machine, disk: Disk) -> None:
        self._machine = machine
        self._disk = disk

    @property
    def capacity(self) -> int:
        return self._disk.capacity

    def read(self, offset: int, length: int, /) -> bytes:
        return self._machine.guest_read(self._disk, offset, length)

    def write(self, offset: int, data: bytes, /) -> None:
        self._machine.guest_write(self._disk, offset, data)


def check_workload(workload: dict[str, Any]) -> dict[str, Any]:
    """Fill in defaults. Raises `ValueError` for a field that does not exist."""
    unknown = set(workload) - set(_DEFAULTS)
    if unknown:
        raise ValueError(f"unknown workload fields: {', '.join(sorted(unknown))}")
    return {**_DEFAULTS, **workload}


class Writer(threading.Thread):
    """The application inside one machine."""

    def __init__(self, lab: LabVCenter, machine: Machine, *, booted: bool) -> None:
        super().__init__(name=f"guest {machine.name}", daemon=True)
        self._lab = lab
        self.machine = machine
        self._booted = booted
        self._disks = [
            GuestDisk(machine, d) for d in machine.disks.values() if not d.mode.startswith("independent")
        ]
        self._halt = threading.Event()
        self._final = False
        self.step = threading.Lock()
        """Held while a record or a piece of churn is being written."""
        self._random = random.Random(machine.moid)
        assert machine.workload is not None
        if not ledger.is_formatted(self._disks):
            ledger.format_ledger(self._disks, machine.name, area_size=machine.workload["area_size"])
        self.ledger = ledger.LedgerWriter(self._disks)
        lab.acks_path.mkdir(parents=True, exist_ok=True)
        self._acks = os.open(
            lab.acks_path / f"{machine.name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
        )

    def stop(self, *, final: bool = False) -> None:
        """End the writer; `final` writes the shutdown record first. Returns when it is at rest."""
        self._final = final
        self._halt.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        try:
            if self._booted:
                self._append(ledger.Kind.BOOT)
            self._loop()
            if self._final:
                self._append(ledger.Kind.SHUTDOWN)
        except Exception:  # a guest that crashes must be seen, and must not take the laboratory with it
            log.exception("guest %s crashed", self.machine.name)
        finally:
            os.close(self._acks)

    def _loop(self) -> None:
        now = time.monotonic()
        next_record = next_churn = now
        while not self._halt.is_set():
            self._lab.guests.gate.wait(0.2)
            if not self._lab.guests.gate.is_set():
                next_record = next_churn = time.monotonic()
                continue
            workload = self.machine.workload or {}
            rate = float(workload.get("records_per_second", 0))
            churn = float(workload.get("churn_bytes_per_second", 0))
            now = time.monotonic()
            if rate > 0 and now >= next_record:
                self._append(ledger.Kind.WORK)
                next_record = max(next_record + 1 / rate, now - 0.5)
            if churn > 0 and now >= next_churn:
                self._churn()
                next_churn = max(next_churn + CHURN_SIZE / churn, now - 0.5)
            due = [t for t, r in ((next_record, rate), (next_churn, churn)) if r > 0]
            pause = min(0.2, min(due, default=now + 0.2) - time.monotonic())
            if pause > 0:
                self._halt.wait(pause)

    def _append(self, kind: ledger.Kind) -> None:
        with self.step:
            if kind is ledger.Kind.WORK and not self._lab.guests.gate.is_set():
                return
            done = self.ledger.append(kind)
            os.write(self._acks, f"{done.number} {done.time_ns} {done.kind.name.lower()}\n".encode())

    def _churn(self) -> None:
        """Application data somewhere behind the ledger."""
        with self.step:
            if not self._lab.guests.gate.is_set():
                return
            disk = self._random.choice(self._disks)
            first, last = self.ledger.area_end // CHURN_SIZE + 1, disk.capacity // CHURN_SIZE - 1
            hot = int((self.machine.workload or {}).get("hot_size", 0)) // CHURN_SIZE
            if hot and self._random.randrange(COLD):
                last = min(last, first + hot)
            if last > first:
                disk.write(self._random.randint(first, last) * CHURN_SIZE, self._random.randbytes(CHURN_SIZE))


class Guests:
    """All writers of the laboratory."""

    def __init__(self, lab: LabVCenter) -> None:
        self._lab = lab
        self._lock = threading.Lock()
        self._writers: dict[str, Writer] = {}
        self._down: dict[str, threading.Timer] = {}
        self.gate = threading.Event()
        self.gate.set()

    def last_number(self, machine: Machine) -> int | None:
        """Number of the last record written, None if there never was a workload."""
        writer = self._writers.get(machine.moid)
        if writer is not None:
            return writer.ledger.last_number
        path = self._lab.acks_path / f"{machine.name}.log"
        if not path.exists():
            return None
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 200))
            lines = file.read().split(b"\n")
        return int(lines[-2].split()[0]) if len(lines) > 1 else None

    def power_on(self, machine: Machine, boot_seconds: float = 0.0, *, booted: bool = True) -> None:
        """The guest boots; its workload starts when it is up."""
        if boot_seconds > 0:
            timer = threading.Timer(boot_seconds, self._up, (machine, booted))
            timer.daemon = True
            timer.start()
        else:
            self._up(machine, booted)

    def _up(self, machine: Machine, booted: bool) -> None:
        with self._lock:
            if self._lab.stopping or not machine.powered_on or not machine.workload:
                machine.touch()
                return
            if machine.moid not in self._writers:
                writer = Writer(self._lab, machine, booted=booted)
                self._writers[machine.moid] = writer
                writer.start()
        machine.touch()

    def set_workload(self, machine: Machine, workload: dict[str, Any] | None) -> None:
        """Give, change (live) or take away a workload. Rates change at once; the area's size only before the first start."""
        if workload is not None:
            wanted = check_workload({**(machine.workload or {}), **workload})
            end = ledger.DEFAULT_AREA_OFFSET + int(wanted["area_size"])
            small = [d.label for d in machine.disks.values() if d.capacity < end]
            if small or not machine.disks:
                raise ValueError(
                    f"the ledger needs {end} bytes on each disk: {', '.join(small) or 'no disk'}"
                )
            machine.workload = wanted
        else:
            machine.workload = None
        machine.save()
        if workload is None:
            self.stop(machine)
        elif machine.powered_on:
            self._up(machine, False)

    def shut_down(self, machine: Machine, *, reboot: bool = False) -> None:
        """The guest begins to shut down; it is off after its time, or never if it hangs."""
        if machine.shutdown.get("hangs"):
            return
        seconds = machine.shutdown.get("seconds", self._lab.settings.shutdown_seconds)
        with self._lock:
            if machine.moid in self._down:
                return
            timer = threading.Timer(
                seconds * self._lab.settings.time_scale, self._went_down, (machine, reboot)
            )
            timer.daemon = True
            self._down[machine.moid] = timer
        timer.start()

    def _went_down(self, machine: Machine, reboot: bool) -> None:
        with self._lock:
            self._down.pop(machine.moid, None)
        if self._lab.stopping or not machine.powered_on:
            return
        self.stop(machine, final=True)
        with machine.io:
            machine.power = "poweredOff"
            machine.save()
        if reboot:
            machine.power_on()

    def stop(self, machine: Machine, *, final: bool = False) -> None:
        """End a machine's writer, cleanly (`final`) or as if the power went."""
        with self._lock:
            writer = self._writers.pop(machine.moid, None)
            timer = self._down.pop(machine.moid, None)
        if timer is not None:
            timer.cancel()
        if writer is not None:
            writer.stop(final=final)

    def pause(self) -> None:
        """Stop the world: no guest writes anything from the return of this until `resume`."""
        self.gate.clear()
        with self._lock:
            writers = list(self._writers.values())
        for writer in writers:
            with writer.step:
                pass

    def resume(self) -> None:
        self.gate.set()

    def stop_all(self) -> None:
        with self._lock:
            machines = [w.machine for w in self._writers.values()]
            timers = list(self._down.values())
            self._down.clear()
        for timer in timers:
            timer.cancel()
        for machine in machines:
            self.stop(machine)
