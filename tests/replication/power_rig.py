"""A real file system on a real loop device on a disk that loses what was not flushed when its power is cut.

From below: an image (the platters), our NBD server with a volatile cache, nbdfuse, which makes a file of it, losetup,
ext4 or another. Needs root, /dev/fuse and loop devices. Everything that is started here is ended by `close`, after whatever failed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .power_server import RECORD

MIB = 1 << 20
SECTOR = 512
SERVER = Path(__file__).with_name("power_server.py")

Writes = list[tuple[int, bytes]]


@dataclass(frozen=True)
class FileSystem:
    """How one is made, mounted and examined."""

    make: tuple[str, ...]
    options: str
    examine: tuple[str, ...]


FILE_SYSTEMS = {
    # A small journal, nothing left to be made lazily; mounted without ext4's own remedy for those who rename without a
    # sync, which other file systems do not have.
    "ext4": FileSystem(
        (
            *("mkfs.ext4", "-q", "-F", "-N", "8192", "-J", "size=4"),
            *("-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"),
        ),
        "noauto_da_alloc",
        ("e2fsck", "-fn"),
    ),
    "xfs": FileSystem(("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"), "nouuid", ("xfs_repair", "-n")),
    "btrfs": FileSystem(("mkfs.btrfs", "-q", "-f", "-K"), "nodiscard", ("btrfs", "check", "--readonly")),
}


def missing(system: str = "ext4") -> str:
    """Why power cannot be cut here; "" when it can."""
    if os.geteuid() != 0:
        return "needs root: loop devices and mounts"
    tools = [
        t for t in ("nbdfuse", "losetup", "mkfs.ext4", "e2fsck", "mount", "umount") if not shutil.which(t)
    ]
    if tools:
        return f"needs {', '.join(tools)}"
    if not knows(system):
        return f"the kernel has no {system}"
    effective = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    if effective is None or not int(effective[1], 16) >> 21 & 1:
        return "needs CAP_SYS_ADMIN: mounts"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"needs /dev/fuse: {error.strerror}"
    done = subprocess.run(["losetup", "-f"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "no loop device can be had"


def knows(system: str) -> bool:
    """Whether the kernel has this file system, or has it now that it was asked for."""
    if system in Path("/proc/filesystems").read_text().split():
        return True
    if not shutil.which("modprobe"):
        return False
    return subprocess.run(["modprobe", system], capture_output=True, check=False).returncode == 0


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def unmount(folder: Path) -> None:
    """If it is mounted, which a dead file system cannot be asked."""
    for words in (["umount"], ["umount", "-l"]):
        if subprocess.run([*words, str(folder)], capture_output=True, check=False).returncode == 0:
            return


# what of an unflushed cache reaches the platters all the same -----------------------------------------------------------


def nothing(_: Writes, __: random.Random) -> Writes:
    return []


def everything(writes: Writes, _: random.Random) -> Writes:
    return writes


def a_beginning(writes: Writes, dice: random.Random) -> Writes:
    return writes[: dice.randint(0, len(writes))]


def some_writes(writes: Writes, dice: random.Random) -> Writes:
    """In any order: an older version of a sector may be the one that stays."""
    share = dice.random()
    return shuffled([write for write in writes if dice.random() < share], dice)


def some_sectors(writes: Writes, dice: random.Random) -> Writes:
    """Torn: a write of many sectors may arrive in parts."""
    share = dice.random()
    return shuffled(
        [
            (offset + at, data[at : at + SECTOR])
            for offset, data in writes
            for at in range(0, len(data), SECTOR)
            if dice.random() < share
        ],
        dice,
    )


def shuffled(writes: Writes, dice: random.Random) -> Writes:
    dice.shuffle(writes)
    return writes


Survival = Callable[[Writes, random.Random], Writes]
MODELS: Sequence[Survival] = (nothing, some_writes, some_sectors, a_beginning)


class PowerDisk:
    """See the module. `start`, then `mount` is a folder; `cut`, then `start` again."""

    def __init__(self, folder: Path, *, mib: int = 512, system: str = "ext4") -> None:
        self.folder = folder
        self.system = FILE_SYSTEMS[system]
        self._type = system
        self.image = folder / "platters"
        self.mount = folder / "mnt"
        self.server: subprocess.Popen[str] | None = None
        self._cache = folder / "cache"
        self._fuse = folder / "nbd"
        self._nbdfuse: subprocess.Popen[str] | None = None
        self._loop = ""
        self._starts = 0
        self._sockets = tempfile.TemporaryDirectory(prefix="power-")  # the name of a socket has to be short
        for new in (folder, self.mount, self._fuse):
            new.mkdir(exist_ok=True)
        with self.image.open("wb") as file:
            file.truncate(mib * MIB)

    @property
    def file(self) -> Path:
        """The disk as a file, once attached."""
        return self._fuse / "nbd"

    def format(self) -> None:
        """Make the file system."""
        run(*self.system.make, self.image)

    def attach(self) -> None:
        """Power on."""
        self._starts += 1
        path = Path(self._sockets.name, str(self._starts))
        words = [sys.executable, str(SERVER), str(path), str(self.image), str(self._cache)]
        self.server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"
        self._nbdfuse = subprocess.Popen(["nbdfuse", str(self.file), "--unix", str(path)], text=True)
        deadline = time.monotonic() + 30
        while not self.file.exists():
            assert self._nbdfuse.poll() is None and time.monotonic() < deadline, "nbdfuse does not get going"
            time.sleep(0.003)  # nbdfuse tells nobody when it is ready

    def start(self, *, examine: bool = False) -> Path:
        """Power on and mount; the file system replays its journal. `examine`: then its checker has to find nothing."""
        self.attach()
        self._loop = run("losetup", "-f", "--show", self.file)
        self._mount()
        if examine:
            run("umount", self.mount)
            run(*self.system.examine, self._loop)
            self._mount()
        return self.mount

    def _mount(self) -> None:
        run("mount", "-t", self._type, "-o", self.system.options, self._loop, self.mount)

    def darken(self, after: int) -> None:
        """After so many more requests the disk answers no more: `wait_for_the_dark`, then kill and `cut`."""
        assert self.server is not None
        Path(f"{self._cache}.dark").write_text(str(after))
        self.server.send_signal(signal.SIGUSR1)

    def wait_for_the_dark(self) -> None:
        assert self.server is not None and self.server.stdout is not None
        assert self.server.stdout.readline() == "dark\n"

    def cut(
        self, survival: Survival, dice: random.Random, *, gone: Callable[[], object] = lambda: None
    ) -> int:
        """The disk's power is cut, now; what of its cache survives is written. Whoever works on it has been killed already
        with a signal that none of its threads outlives; `gone` waits until it has no open file. Returns how many bytes
        had not been flushed."""
        self.power_off()
        gone()
        self._detach()
        writes = self._unflushed()
        with self.image.open("r+b") as file:
            for offset, data in survival(list(writes), dice):
                file.seek(offset)
                file.write(data)
        return sum(len(data) for _, data in writes)

    def power_off(self) -> None:
        """Nothing gets an answer from the disk any more, whoever waits for one gets an error."""
        for process in (self.server, self._nbdfuse):
            if process is not None:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()

    def _unflushed(self) -> Writes:
        """Complete records of the cache; the last one may have been cut off."""
        found: Writes = []
        data = self._cache.read_bytes()
        at = 0
        while at + RECORD.size <= len(data):
            offset, length = RECORD.unpack_from(data, at)
            at += RECORD.size
            if at + length <= len(data):
                found.append((offset, data[at : at + length]))
            at += length
        return found

    def _detach(self) -> None:
        unmount(self.mount)
        if self._loop:
            subprocess.run(["losetup", "-d", self._loop], capture_output=True, check=False)
            self._loop = ""
        unmount(self._fuse)

    def close(self) -> None:
        """End whatever is left; nobody needs what is on the disk."""
        self.power_off()
        self._detach()
        self._sockets.cleanup()
