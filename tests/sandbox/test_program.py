"""Untrusted programs: what they may do, and that none of what they try gets through."""

import contextlib
import itertools
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE

import pydantic
import pytest

from slingshot.base.errors import SlingshotError
from slingshot.sandbox import bubblewrap, program
from slingshot.sandbox.program import Isolation, Program, ProgramLimits, isolation, require_isolation, run_program
from tests.sandbox.escapes import CONTROL, REFUSED, attempts
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.skipif(bool(isolation().missing), reason="this machine cannot contain programs")
USUAL, QUICK = ProgramLimits(), ProgramLimits(seconds=0.5)
EXEC_32_BIT = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, getpid; int 0x80; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""
THREADS = """
import threading, time
try:
    while True:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
except (RuntimeError, MemoryError):
    print("no more")
"""
USEFUL = """
import asyncio, collections, decimal, heapq, itertools, json, math, random, re, sqlite3, sys, threading
from dataclasses import dataclass
from zoneinfo import ZoneInfo

@dataclass
class Point:
    x: int

async def double(x):
    await asyncio.sleep(0)
    return 2 * x

found = []
thread = threading.Thread(target=lambda: found.append(Point(3).x))
thread.start()
thread.join()
print(asyncio.run(double(4)), found, ZoneInfo("Asia/Tokyo").key, len(sys.argv), __name__, sqlite3.connect(":memory:"))
print(sum(map(int, sys.stdin)), "日本", file=sys.stderr)
"""


@pytest.fixture
def surroundings(tmp_path):
    """A file, an open port, and sockets of others; what the programs' codes name."""
    secret = tmp_path / "secret"
    secret.write_text("told to nobody")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract, datagrams = (stack.enter_context(socket.socket(socket.AF_UNIX, kind)) for kind in (1, 2))
        abstract.bind(f"\0slingshot-{os.getpid()}")
        abstract.listen()
        path = os.path.relpath(tmp_path / "datagrams")
        datagrams.bind(path)
        yield {
            "secret": str(secret), "folder": str(tmp_path), "pid": os.getpid(), "port": server.getsockname()[1],
            "datagrams": os.path.abspath(path), "package": pydantic.__file__,
        }  # fmt: skip
    assert secret.read_text() == "told to nobody"
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "datagrams"}


def tried(codes):
    """Those whose numbers of system calls are this processor's."""
    return {name: code for name, code in codes.items() if platform.machine() == "x86_64" or "call(" not in code}


BUBBLEWRAP = pytest.mark.skipif(not bubblewrap.installed(), reason="bubblewrap is not installed")


@pytest.mark.parametrize("namespaces", ["own", "none", pytest.param("bubblewrap", marks=BUBBLEWRAP)])
def test_nothing_gets_through(surroundings, namespaces):
    outcome = run_program(attempts(tried(REFUSED), **surroundings), namespaces=namespaces)
    assert outcome.stdout == "all tried\n", outcome.stderr


@BUBBLEWRAP
def test_nothing_gets_through_bubblewrap_where_there_is_no_landlock(surroundings, monkeypatch):
    monkeypatch.setattr("slingshot.sandbox.landlock.version", lambda: 0)
    seen = {"list the temporary files", "go up"}  # nothing of others is there
    codes = {name: code for name, code in tried(REFUSED).items() if name not in seen}
    outcome = run_program(attempts(codes, **surroundings))
    assert outcome.stdout == "all tried\n", outcome.stderr
    with tempfile.NamedTemporaryFile() as beside:
        up, name = os.path.split(os.path.realpath(beside.name))
        look = f"import os; print(os.path.dirname(os.getcwd()) == {up!r}, {name!r} in os.listdir({up!r}))"
        assert run_program(look).stdout == "True False\n"
    assert run_program(USEFUL, "1\n").stdout.startswith("8 [3] Asia/Tokyo 1 __main__")


@BUBBLEWRAP
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print(1)", "ok"), ("import sys; sys.exit(3)", "exit"), ("import os; os.abort()", "killed"),
        ("while True: pass", "timeout"), ("bytearray(1 << 30)", "memory"), ("open('made', 'w').write('x')", "exit"),
        ("import os; assert os.path.exists('/home') or os.path.exists('/proc')", "exit"),
    ],
)  # fmt: skip
def test_how_a_program_in_bubblewrap_ended_is_told(source, reason):
    limits = ProgramLimits(seconds=1.0 if reason == "timeout" else 10.0)
    assert run_program(source, limits=limits, namespaces="bubblewrap").reason == reason


def test_bubblewrap_shows_a_package_within_folders_that_it_hides():
    readable, hidden, shown = ["/lib64", "/dev/null"], ["/lib64/a", "/b"], ["/lib64/a/own"]
    command = bubblewrap.wrapped("/usr/bin/bwrap", "/tmp/home", readable, hidden, shown)
    text = " ".join(command)
    assert "--dev-bind-try /dev/null /dev/null --tmpfs /lib64/a --ro-bind /lib64/a/own /lib64/a/own --ro-bind" in text
    assert "/b" not in command and text.endswith(
        "--ro-bind /tmp/home /tmp/home --remount-ro /lib64/a --remount-ro / --"
    )
    assert command[0] == "/usr/bin/bwrap" and {"--unshare-net", "--unshare-pid", "--unshare-user"} <= set(command)


def test_bubblewrap_is_chosen_where_landlock_or_namespaces_are_missing():
    for kernel, makes, wraps in itertools.product((True, False), repeat=3):
        own = "own" if makes else "none"
        chosen = program.best_namespaces(kernel, lambda makes=makes: makes, lambda wraps=wraps: wraps)
        assert chosen == (own if (kernel and makes) or not wraps else "bubblewrap")


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_each_is_refused_by_itself(surroundings, name):
    codes = tried({name: REFUSED[name]})
    assert run_program(attempts(codes, **surroundings)).stdout == "all tried\n"


@pytest.mark.slow
def test_a_bare_interpreter_lets_them_through(tmp_path_factory, surroundings):
    """So that the attempts are what they are said to be."""
    place = tmp_path_factory.mktemp("bare")
    (place / "secret").write_text("told to everybody" * 10)
    code = attempts(CONTROL, **surroundings | {"secret": str(place / "secret"), "folder": str(place)})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place)
    assert done.stdout.splitlines() == [*CONTROL, "all tried"], done.stderr


def test_programs_do_what_programs_do():
    outcome = run_program(USEFUL, "1\n2\n39\n")
    assert outcome.stdout.startswith("8 [3] Asia/Tokyo 1 __main__ <sqlite3.Connection"), outcome.stderr
    assert (outcome.stderr, outcome.status, outcome.reason) == ("42 日本\n", 0, "ok")
    assert 0 < outcome.seconds < 30


@pytest.mark.parametrize(
    ("source", "limits", "reason", "status"),
    [
        ("import sys; sys.exit(3)", USUAL, "exit", 3), ("import os; os._exit(0)", USUAL, "ok", 0),
        ("1 / 0", USUAL, "exit", 1), ("def", USUAL, "exit", 1), ("bytearray(1 << 30)", USUAL, "memory", 1),
        ("import os; os.abort()", USUAL, "killed", None),
        ("import ctypes; ctypes.string_at(0)", USUAL, "killed", None),
        ("while True: pass", QUICK, "timeout", None), ("import time; time.sleep(600)", QUICK, "timeout", None),
        ("while True: print('x' * 1000)", ProgramLimits(output=10_000), "output", None),
        ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", ProgramLimits(output=10_000), "output", None),
        ("import os, time; os.close(0); os.close(1); os.close(2); time.sleep(600)", QUICK, "timeout", None),
        ("import signal as s\nfor n in (1, 14, 15): s.signal(n, s.SIG_IGN)\nwhile True: pass", QUICK, "timeout", None),
        ("import atexit, time; atexit.register(time.sleep, 600)", QUICK, "timeout", None),
        ("import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()", QUICK, "timeout", None),
        ("import os\nfor _ in range(100): os.dup(0)", USUAL, "exit", 1),
        ("open('f', 'w').write('x' * 10_000)", USUAL, "exit", 1),
    ],
)  # fmt: skip
def test_how_a_program_ended_is_told(source, limits, reason, status):
    began = time.monotonic()
    outcome = run_program(source, limits=limits)
    assert outcome.reason == reason and (status is None or outcome.status == status), outcome
    assert len(outcome.stdout) <= limits.output and len(outcome.stderr) <= limits.output
    assert time.monotonic() - began < PATIENCE


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86 processors")
def test_system_calls_of_32_bits_end_a_program():
    assert run_program(EXEC_32_BIT).reason == "killed"


@pytest.mark.slow
def test_threads_are_bounded_by_memory():
    outcome = run_program(THREADS, limits=ProgramLimits(seconds=20))
    assert outcome.stdout == "no more\n" or outcome.reason in ("memory", "killed"), outcome


def test_nothing_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Program("import time\nprint(1, flush=True)\ntime.sleep(600)") as program:
        assert program.exchange("") == "1"
        (home,) = tmp_path.iterdir()
        until(lambda: running(home))
    assert not list(tmp_path.iterdir())
    until(lambda: not running(home))


def test_it_ends_with_the_process_that_started_it(tmp_path):
    program = "from slingshot.sandbox.program import Program; p = Program('import time; time.sleep(600)')"
    start = f"{program}; print(flush=True); input()"
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {start}"]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, env={"TMPDIR": str(tmp_path)}) as parent:
        parent.stdout.readline()
        (home,) = tmp_path.iterdir()
        until(lambda: running(home))
        parent.kill()
    until(lambda: not running(home))


def running(home):
    """Whether a process with this folder in its command line is there."""
    found = False
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found = found or home.name.encode() in entry.read_bytes()
    return found


def test_a_program_sees_an_empty_environment_and_one_file(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    source = "import os, sys; print(sorted(os.environ), os.listdir('.'), [m for m in sys.modules if 'sling' in m])"
    assert run_program(source).stdout == "['HOME', 'TMPDIR'] ['program.py'] []\n"


def test_a_program_may_be_spoken_with():
    with Program("for line in iter(input, 'end'): print(line[::-1], flush=True)\nprint('bye')") as program:
        assert [program.exchange(line) for line in ("abc", "日本", "x" * 200_000)] == ["cba", "本日", "x" * 200_000]
        outcome = program.finish("end\n")
    assert outcome.reason == "ok" and outcome.stdout.endswith("\nbye\n")


@pytest.mark.parametrize("source", ["pass", "import os; os.close(1); input()", "import time; time.sleep(600)"])
def test_a_program_that_says_nothing_more_holds_nobody_up(source):
    with Program(source, QUICK) as program:
        assert program.exchange("x" * 1_000_000) is None
        assert program.exchange("again") is None
        assert program.finish().reason in ("ok", "timeout", "exit")


def test_a_machine_that_cannot_contain_programs_is_told_of(monkeypatch):
    assert isolation().landlock and isolation().seccomp
    lacks = {Isolation(0, True, "own"): "landlock", Isolation(0, False, "own"): "landlock and seccomp"}
    lacks |= {Isolation(0, True, "bubblewrap"): "", Isolation(3, True, "none"): ""}
    assert {machine: machine.missing for machine in lacks} == lacks
    assert str(isolation()).startswith("contained by Landlock ")
    assert str(Isolation(0, True, "own")) == "untrusted ones are refused: no landlock"
    assert str(Isolation(3, True, "own")) == "contained by Landlock 3, seccomp and namespaces"
    assert str(Isolation(0, True, "bubblewrap")) == "contained by seccomp and bubblewrap"
    monkeypatch.setattr("slingshot.sandbox.bubblewrap.installed", lambda: None)
    monkeypatch.setattr("slingshot.sandbox.landlock.version", lambda: 0)
    with pytest.raises(SlingshotError, match=r"cannot contain untrusted programs, for it has no landlock: .*trusted"):
        run_program("print(1)")
    require_isolation(trusted=True)
    assert run_program("print(1)", trusted=True).stdout == "1\n"
