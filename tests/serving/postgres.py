"""A PostgreSQL server of its own, in a temporary folder, on a socket there."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path


def find():
    """The folder of its programs; None where it is not installed."""
    there = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    named = shutil.which("initdb")
    return there[0].parent if there else Path(named).resolve().parent if named else None


class PostgresServer:
    """As root it runs as another user: it refuses root."""

    def __init__(self, programs):
        self._programs, self._as = programs, {}
        # Not among pytest's folders, which are its user's alone.
        self._folder = Path(tempfile.mkdtemp(prefix="slingshot-postgres-"))
        self._data = self._folder / "data"
        if os.geteuid() == 0:
            names = {user.pw_name for user in pwd.getpwall()}
            user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._run("initdb", "-D", self._data, "-U", "slingshot", "-A", "trust", "--no-sync")
        self.start()

    @property
    def url(self):
        return f"postgresql+psycopg://slingshot@/postgres?host={self._folder}"

    def start(self):
        log, options = self._folder / "log", f"-k {self._folder} -h '' -F"
        self._run("pg_ctl", "-D", self._data, "-l", log, "-w", "-o", options, "start")

    def stop(self):
        """It ends, and its folder goes."""
        self._run("pg_ctl", "-D", self._data, "-m", "fast", "-w", "stop")
        shutil.rmtree(self._folder)

    def kill(self):
        """kill -9. Where nobody reaps the dead its number stays taken, so the files that name it go too."""
        named = self._data / "postmaster.pid"
        os.kill(int(named.read_text().split()[0]), 9)
        for left in (named, *self._folder.glob(".s.PGSQL.*")):
            left.unlink()

    def freeze(self):
        """It and all that it started stand still, as on a machine that has no time for them."""
        self._signal(signal.SIGSTOP)

    def thaw(self):
        self._signal(signal.SIGCONT)

    def _signal(self, number):
        first = int((self._data / "postmaster.pid").read_text().split()[0])
        os.kill(first, number)  # it starts no others meanwhile
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if f"\nPPid:\t{first}\n" in status.read_text():
                    os.kill(int(status.parent.name), number)

    def _run(self, program, *arguments):
        command = [str(self._programs / program), *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **self._as)
        assert done.returncode == 0, done.stdout
