"""A live guest under QEMU's own processor (TCG): a Debian kernel, busybox, virtio disks, a writer.

Packages: qemu-system-x86, qemu-utils, linux-image-cloud-amd64 (its kernel is only read, never booted on the host),
busybox-static, e2fsprogs; qemu-guest-agent and sqlite3 for the tests with an agent.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
)
ROOTS = (
    Path("/"),
    Path(__file__).parents[3] / "build" / "foreign" / "kernel",
)  # installed, or unpacked by hand
PATIENCE = 90.0

INIT = r"""#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mkdir -p /tmp /run /var/run /mnt
for m in MODULES; do insmod /lib/modules/$m.ko; done
until [ -b /dev/vda ]; do usleep 20000; done
role=$(sed 's/.*role=\([a-zA-Z]*\).*/\1/' /proc/cmdline)
echo "UP $role $(cut -d' ' -f1 /proc/uptime)"
port=$(ls /dev/vport* 2>/dev/null | head -n1)
agent() { [ -z "$port" ] || LD_LIBRARY_PATH=/lib/foreign qemu-ga -m virtio-serial -p "$port" -t /run -l /run/qga.log -F/bin/hook -d; echo "AGENT $?"; }
raw() { printf '%-511s\n' "$1" | dd of="$2" bs=512 count=1 conv=notrunc,fsync 2>/dev/null; }
case $role in
count)
    mount -t ext4 /dev/vda /mnt || { echo MOUNT-FAILED; poweroff -f; }
    agent
    n=$(cat /mnt/counter 2>/dev/null || echo 0)
    while true; do
        n=$((n+1))
        echo $n > /mnt/new; sync /mnt/new; mv /mnt/new /mnt/counter; sync /mnt
        raw $n /dev/vdb
        [ $((n%3)) = 0 ] && dd if=/dev/urandom of=/mnt/junk$((n%8)) bs=64k count=2 conv=fsync 2>/dev/null
        echo "COUNT $n"
    done ;;
sql)
    mount -t ext4 /dev/vda /mnt || { echo MOUNT-FAILED; poweroff -f; }
    export LD_LIBRARY_PATH=/lib/foreign
    printf 'PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE IF NOT EXISTS t(n INTEGER PRIMARY KEY, body BLOB);' | sqlite3 /mnt/db
    agent
    n=0
    while true; do
        n=$((n+1))
        # The writer and the freeze hook take turns, so that the hook finds no open transaction.
        until mkdir /run/turn 2>/dev/null; do usleep 20000; done
        sqlite3 -cmd '.dbconfig no_ckpt_on_close on' /mnt/db "PRAGMA wal_autocheckpoint=0; PRAGMA synchronous=FULL; INSERT INTO t(body) VALUES(randomblob(3000));" >/dev/null
        rmdir /run/turn
        echo "COUNT $n"
    done ;;
A)
    stty -F /dev/ttyS1 115200 raw -echo; exec 3<>/dev/ttyS1
    n=0
    while true; do
        n=$((n+1)); raw $n /dev/vda; m=
        until [ "$m" = $n ]; do echo "M $n" >&3; read -t 2 -r a m <&3; done
        echo "COUNT $n"
    done ;;
B)
    stty -F /dev/ttyS1 115200 raw -echo; exec 3<>/dev/ttyS1
    # Nothing but a whole message with a greater number is believed: a line may begin in the middle.
    last=0
    while read -r m n; do
        case "$m$n" in M*[!0-9]*|M) continue ;; M*) ;; *) continue ;; esac
        [ "$n" -gt $last ] && { raw $n /dev/vda; last=$n; echo "COUNT $n"; }
        echo "A $n" >&3
    done <&3 ;;
verify)
    set -- $(ls /dev/vd?)
    while [ $# -ge 2 ]; do
        mount -t ext4 "$1" /mnt && state=mounted || state=unmountable
        echo "VERIFY $state $(cat /mnt/counter) $(dd if="$2" bs=512 count=1 2>/dev/null | tr -d '\0 ' | head -n1)"
        umount /mnt
        shift 2
    done
    poweroff -f ;;
verifysql)
    export LD_LIBRARY_PATH=/lib/foreign
    for disk in $(ls /dev/vd?); do
        mount -t ext4 "$disk" /mnt
        wal=$(stat -c %s /mnt/db-wal 2>/dev/null || echo 0)
        echo "SQL wal=$wal $(sqlite3 /mnt/db 'PRAGMA integrity_check; SELECT count(*) FROM t;' | tr '\n' ' ') unfinished=$(dmesg | grep -c 'recovery complete')"
        umount /mnt
    done
    poweroff -f ;;
esac
"""

HOOK = r"""#!/bin/sh
# qemu-ga calls it with "freeze" before the file systems freeze and with "thaw" after they are thawed.
export PATH=/bin LD_LIBRARY_PATH=/lib/foreign
echo "HOOK $1" > /dev/console
[ -e /mnt/db ] || exit 0
case $1 in
freeze) # Keeps the turn until thaw: everything is in the database's file, nothing in its log.
    until mkdir /run/turn 2>/dev/null; do usleep 20000; done
    sqlite3 -cmd '.dbconfig no_ckpt_on_close on' /mnt/db "PRAGMA wal_checkpoint(TRUNCATE);" >/dev/null ;;
thaw) rmdir /run/turn ;;
esac
exit 0
"""


def missing(*, agent: bool = False) -> str:
    """What these tests lack on this machine, as Debian packages; "" when nothing."""
    wanted = {
        "qemu-system-x86_64": "qemu-system-x86",
        "qemu-img": "qemu-utils",
        "busybox": "busybox-static",
        "mkfs.ext4": "e2fsprogs",
        "debugfs": "e2fsprogs",
    }
    if agent:
        wanted |= {"qemu-ga": "qemu-guest-agent", "sqlite3": "sqlite3", "ldd": "libc-bin"}
    absent = {package for tool, package in wanted.items() if _tool(tool) is None}
    if _kernel() is None:
        absent.add("linux-image-cloud-amd64")
    if "busybox-static" not in absent and _output("ldd", str(_tool("busybox"))).count("=>"):
        absent.add("busybox-static")  # the dynamic one of another package
    return ", ".join(sorted(absent))


def need(*, agent: bool = False) -> None:
    """Skip the test, with the reason, when something is not installed."""
    absent = missing(agent=agent)
    if absent:
        pytest.skip(f"not installed: {absent}")


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def _kernel() -> tuple[Path, Path] | None:
    """Kernel and its modules' folder."""
    for root in ROOTS:
        for kernel in sorted(root.glob("boot/vmlinuz-*-cloud-amd64"), reverse=True):
            modules = root / "lib" / "modules" / kernel.name.removeprefix("vmlinuz-")
            if modules.is_dir() and os.access(kernel, os.R_OK):
                return kernel, modules
    return None


def initramfs(path: Path, *, agent: bool = False) -> Path:
    """Write the guest's first file system."""
    found = _kernel()
    assert found is not None
    files: dict[str, tuple[int, bytes]] = {}

    def add(name: str, body: bytes, mode: int = 0o755) -> None:
        files[name] = (stat.S_IFREG | mode, body)

    busybox = Path(str(_tool("busybox")))
    add("bin/busybox", busybox.read_bytes())
    for applet in _output(str(busybox), "--list").split():
        if applet != "busybox":
            files.setdefault(f"bin/{applet}", (stat.S_IFLNK | 0o777, b"busybox"))
    present = []
    for module in MODULES:
        for file in found[1].rglob(f"{module}.ko*"):
            body = file.read_bytes()
            if file.suffix == ".xz":
                body = subprocess.run(["xz", "-dc", str(file)], capture_output=True, check=True).stdout
            add(f"lib/modules/{module}.ko", body)
            present.append(module)
    add("init", INIT.replace("MODULES", " ".join(present)).encode())
    if agent:
        add("bin/hook", HOOK.encode())
        for tool in ("qemu-ga", "sqlite3"):
            binary = str(_tool(tool))
            add(f"bin/{tool}", Path(binary).read_bytes())
            for library in re.findall(r"(/\S+)", _output("ldd", binary)):
                place = "lib64" if "ld-linux" in library else "lib/foreign"
                add(f"{place}/{Path(library).name}", Path(library).read_bytes())
    folders = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    for folder in sorted(folders | {"proc", "sys", "dev", "mnt", "run", "tmp"}):
        files[folder] = (stat.S_IFDIR | 0o755, b"")
    with gzip.open(path, "wb", compresslevel=1) as out:
        for number, (name, (mode, body)) in enumerate(sorted(files.items())):
            out.write(_cpio(name, mode, body, number + 1))
        out.write(_cpio("TRAILER!!!", 0, b"", 0))
    return path


def _cpio(name: str, mode: int, body: bytes, number: int) -> bytes:
    """One entry of a cpio archive ("newc": 13 hexadecimal fields, then name and body, each padded to 4 bytes)."""
    fields = (number, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    head += b"\0" * (-len(head) % 4)
    return head + body + b"\0" * (-len(body) % 4)


def make_disk(path: Path, size: str, *, ext4: bool = False) -> Path:
    """A qcow2 image, with an empty ext4 in it if wanted."""
    if ext4:
        plain = path.with_suffix(".raw")
        subprocess.run(["truncate", "-s", size, str(plain)], check=True)
        subprocess.run([str(_tool("mkfs.ext4")), "-q", "-F", str(plain)], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(plain), str(path)], check=True)
        plain.unlink()
    else:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), size], check=True)
    return path


class Guest:
    """A running QEMU and what its console said. Disks get the device ids `disk0`, `disk1`, …"""

    def __init__(
        self,
        folder: Path,
        initrd: Path,
        role: str,
        disks: Sequence[Path],
        *,
        extra: Iterable[str] = (),
        agent: bool = False,
        image: str = "qcow2",
        name: str = "guest",
    ) -> None:
        found = _kernel()
        assert found is not None
        self.folder = folder
        self.qmp = folder / f"{name}.qmp"
        self.agent = folder / f"{name}.qga"
        self.nbd = str(folder / f"{name}.nbd")
        self.disks = list(disks)
        self.lines: list[str] = []
        self._heard = threading.Condition()
        command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "192", "-smp", "1", "-nodefaults"]
        command += ["-display", "none", "-no-reboot", "-serial", "stdio"]
        command += ["-kernel", str(found[0]), "-initrd", str(initrd)]
        command += ["-append", f"console=ttyS0 quiet panic=-1 mitigations=off no_timer_check role={role}"]
        command += ["-qmp", f"unix:{self.qmp},server=on,wait=off"]
        if agent:
            command += ["-device", "virtio-serial-pci"]
            command += ["-chardev", f"socket,path={self.agent},server=on,wait=off,id=agent"]
            command += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        for index, disk in enumerate(disks):
            command += [
                "-blockdev",
                f"driver={image},node-name=node{index},file.driver=file,file.filename={disk}",
            ]
            command += ["-device", f"virtio-blk-pci,drive=node{index},id=disk{index}"]
        command += list(extra)
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.lines.append(line.decode("utf-8", "replace").strip())
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def wait(self, seen: Callable[[list[str]], bool], what: str, patience: float = PATIENCE) -> None:
        """Until the console has said it."""
        until = time.monotonic() + patience
        with self._heard:
            while not seen(self.lines):
                left = until - time.monotonic()
                assert left > 0 and self._reader.is_alive(), f"no {what}: {self.lines[-15:]}"
                self._heard.wait(min(left, 1.0))

    def count(self) -> int:
        """How far its writer has come."""
        for line in reversed(self.lines):
            if line.startswith("COUNT "):
                return int(line.split()[1])
        return 0

    def advance(self, steps: int = 3) -> None:
        """Let its writer make some steps."""
        target = self.count() + steps
        self.wait(lambda _: self.count() >= target, f"count {target}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        self._reader.join(20)


def counters(system: Path, data: Path) -> tuple[int, int]:
    """Both counters of a point, read without the guest: the journal is replayed into a copy by e2fsck."""
    copy = system.with_suffix(".checked")
    shutil.copyfile(system, copy)
    done = subprocess.run(
        [str(_tool("e2fsck")), "-fp", str(copy)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), f"e2fsck: {done.returncode} {done.stdout}{done.stderr}"
    first = _output(str(_tool("debugfs")), "-R", "cat /counter", str(copy))
    copy.unlink()
    numbers = [line for line in first.splitlines() if line.strip().isdecimal()]
    return int(numbers[0]) if numbers else 0, raw_counter(data)


def raw_counter(data: Path) -> int:
    with data.open("rb") as file:
        return int(file.read(512).strip(b"\0 \n") or b"0")
