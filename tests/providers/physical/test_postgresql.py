"""PostgreSQL on a loop device: every point starts, and every row committed before the barrier is there and whole.

A file-system-consistent point is recovered by PostgreSQL's own log. An application-consistent one is cut while the server
is stopped for a moment by the hooks (the plain way that needs no recovery at all).
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from farshore.domain.points import Consistency
from farshore.providers.physical.agent.hooks import Hook

from .points import Bench

pytestmark = [pytest.mark.foreign, pytest.mark.slow, pytest.mark.timeout(600)]


def programs() -> Path:
    """The folder of initdb and its like; skips with the reason."""
    found = (
        sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if Path("/usr/lib/postgresql").is_dir()
        else []
    )
    if not found:
        pytest.skip("needs Debian's postgresql")
    if not any(entry.pw_name == "postgres" for entry in pwd.getpwall()):
        pytest.skip("needs the user postgres: the server does not run as root")
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv")
    return found[-1].parent


class Cluster:
    """A server over a folder, on a socket in the folder's parent; no network."""

    def __init__(self, bin_: Path, data: Path, sockets: Path) -> None:
        self.bin, self.data, self.sockets = bin_, data, sockets
        sockets.mkdir(exist_ok=True)
        shutil.chown(sockets, "postgres", "postgres")

    def command(self, *words: object) -> list[str]:
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        return [*user, str(self.bin / str(words[0])), *map(str, words[1:])]

    def run(self, *words: object) -> str:
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, check=False, cwd="/", timeout=120
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        log = self.sockets / "log"
        options = f"-c listen_addresses='' -c unix_socket_directories='{self.sockets}' -c fsync=on"
        self.run("pg_ctl", "-D", self.data, "-l", log, "-w", "-t", "60", "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "-t", "60", "-m", mode, "stop")

    def sql(self, text: str) -> str:
        return self.run(
            "psql", "-h", self.sockets, "-d", "postgres", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", text
        ).strip()


class Inserting:
    """Commits rows one by one, each with a hash of itself; `rows` are those that were acknowledged."""

    def __init__(self, cluster: Cluster) -> None:
        self.rows: list[int] = []
        self.stopped = threading.Event()
        self._cluster = cluster
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self.stopped.is_set():
            try:
                answer = self._cluster.sql(
                    "with n as (insert into t(body) select repeat(md5(random()::text), 200) returning id, body) "
                    "insert into h select id, md5(body) from n returning id"
                )
                self.rows.append(int(answer))
            except AssertionError:
                time.sleep(0.05)  # the server is stopped for a moment

    def wait(self, rows: int) -> None:
        goal, deadline = len(self.rows) + rows, time.monotonic() + 120
        while len(self.rows) < goal:
            assert time.monotonic() < deadline, "nothing is inserted"
            time.sleep(0.02)

    def close(self) -> None:
        self.stopped.set()
        self._thread.join(timeout=120)


def test_postgresql_is_whole_in_every_point(machine, start, tmp_path):
    bin_ = programs()
    os.chmod(tmp_path, 0o755)
    temporary = Path(tempfile.gettempdir())
    for parent in tmp_path.parents:  # the server runs as another user
        if temporary in parent.parents:
            os.chmod(parent, 0o755)
    machine.add("pg", 192)
    machine.mkfs("pg")
    folder = machine.mount("pg")
    shutil.chown(folder, "postgres", "postgres")
    cluster = Cluster(bin_, folder / "data", tmp_path / "sockets")
    cluster.run("initdb", "-D", cluster.data, "-A", "trust", "-N", "--wal-segsize=1")
    cluster.start()
    inserting: Inserting | None = None
    pg_ctl = cluster.command("pg_ctl", "-D", cluster.data, "-w", "-t", "60")
    options = f"-c listen_addresses='' -c unix_socket_directories='{cluster.sockets}'"
    hook = Hook(
        "postgresql",
        (*pg_ctl, "-m", "fast", "stop"),
        (*pg_ctl, "-l", str(cluster.sockets / "log"), "-o", options, "start"),
        timeout=90.0,
    )
    bench = Bench(machine, start(machine.loops, hooks=(hook,)), tmp_path)
    try:
        cluster.sql(
            "create table t(id serial primary key, body text); create table h(id int primary key, m text)"
        )
        inserting = Inserting(cluster)
        for number in range(6):
            inserting.wait(15)
            if number == 3:
                cluster.sql("delete from t where id < 20; delete from h where id < 20")
                cluster.sql("vacuum full t")
            want = Consistency.APPLICATION if number % 3 == 2 else Consistency.FILE_SYSTEM
            before = {row for row in list(inserting.rows) if number < 3 or row >= 20}
            made = bench.point(want)
            assert made.missed == {}
            assert made.cut.consistency is want, made.cut.evidence
            with bench.mounted(made, "pg") as mounted:
                again = Cluster(bin_, mounted / "data", tmp_path / "again")
                clean = "shut down\n" in again.run("pg_controldata", again.data)
                assert clean == (want is Consistency.APPLICATION)
                (again.data / "postmaster.pid").unlink(missing_ok=True)
                again.start()
                try:
                    bad = again.sql(
                        "select count(*) from t full join h using (id) where md5(body) is distinct from m"
                    )
                    assert bad == "0"
                    assert before <= {int(row) for row in again.sql("select id from t").split()}
                finally:
                    again.stop()
    finally:
        machine.thaw()
        if inserting is not None:
            inserting.close()
        subprocess.run([*pg_ctl, "-m", "immediate", "stop"], check=False, capture_output=True, cwd="/")
        bench.close()
