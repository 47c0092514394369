"""Workers and their pool: answers, errors in words, kills, and the limits that keep an accident small."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import slingshot
from slingshot.sandbox.isolate import take
from slingshot.sandbox.worker import SandboxError, Target, Worker, WorkerPool
from tests.waiting import PATIENCE, until

TARGET = """
import os, signal, subprocess, sys, time

class Thing:
    def __init__(self, start=0):
        if start == "hang": time.sleep(600)
        if start == "die": os._exit(3)
        self.count = start
    def add(self, number):
        self.count += number
        return self.count
    def echo(self, value):
        return value
    def run(self, code):
        scope = {}
        exec(code, globals(), scope)
        return scope.get("value")
"""
PID = "value = os.getpid()"
DEEP = "value = []\nfor _ in range(100_000): value = [value]"
MUTE = "class Mute(Exception):\n def __str__(self): raise RuntimeError\nraise Mute"
SCRIBBLE = """
for descriptor in range(3, 64):
    try: os.write(descriptor, b"nonsense\\n")
    except OSError: pass
time.sleep(600)
"""
FLOOD = """
for _ in range(2000):
    print("x" * 10_000)
    print("y" * 10_000, file=sys.stderr)
os.write(1, b"z" * 100_000)
value = sys.stdin.read()
"""


def running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def asks(target, code):
    return lambda worker: worker.call(target, "run", code)


class Made:
    """A worker with one target."""

    def __init__(self, *args, **limits):
        self.worker, self.target = Worker(), Target("sandbox_target:Thing", args, **limits)

    def call(self, method, *args):
        return self.worker.call(self.target, method, *args)

    def run(self, code):
        return self.call("run", code)


@pytest.fixture
def make(tmp_path, monkeypatch):
    (tmp_path / "sandbox_target.py").write_text(TARGET)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def build(*args, **limits):
        made.append(Made(*args, **limits))
        return made[-1]

    yield build
    for each in made:
        each.worker.close()


def test_objects_keep_their_state_and_share_a_worker(make):
    sandbox, other = make(5), Target("sandbox_target:Thing", (7,))
    assert [sandbox.call("add", 1), sandbox.call("add", 2)] == [6, 8]
    assert sandbox.worker.call(other, "add", 1) == 8 and sandbox.call("add", 1) == 9
    assert sandbox.worker.call(other, "run", PID) == sandbox.run(PID)


def test_values_come_back_as_json_brings_them(make):
    sandbox = make()
    for value in (None, True, 1.5, "日本 \ud800 \x00 \n \u2028", [1, {"a": []}], "x" * 300_000):
        assert sandbox.call("echo", value) == value


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('not ' * 200 + '\\n this way')", r"^raised ValueError: (not )+not \(<string> line 1\)$"),
        ("sys.exit(1)", "^raised SystemExit: 1 "), (MUTE, "^raised Mute: without words"),
        ("self.missing", "^raised NameError: .*self"),
        ("value = {1, 2}", "^returned something that is not JSON: .*set"),
        ("value = float('nan')", "^returned something that is not JSON"),
        (DEEP, "^returned something that is not JSON"), ("value = len(bytearray(1 << 30))", "^raised MemoryError"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_the_worker_lives_on(make, code, message):
    sandbox = make(memory=512 << 20)
    pid = sandbox.run(PID)
    with pytest.raises(SandboxError, match=message) as caught:
        sandbox.run(code)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert sandbox.run(PID) == pid


@pytest.mark.parametrize("code", ["time.sleep(600)", "while True: pass"])
def test_a_call_that_hangs_is_killed_in_time_and_the_next_starts_anew(make, code):
    sandbox, began = make(0, timeout=2.0), time.monotonic()
    pid = sandbox.run(PID)
    sandbox.call("add", 1)
    with pytest.raises(SandboxError, match=r"took longer than 2 s"):
        sandbox.run(code)
    assert time.monotonic() - began < PATIENCE
    until(lambda: not running(pid))
    assert sandbox.call("add", 1) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended its process.*SIGKILL"),
        ("value = 'x' * (17 << 20)", "returned more than 16 MiB"), (SCRIBBLE, "wrote over the worker's pipe"),
    ],
)  # fmt: skip
def test_a_worker_that_breaks_the_protocol_is_replaced(make, code, message):
    sandbox = make()
    with pytest.raises(SandboxError, match=message):
        sandbox.run(code)
    assert sandbox.call("echo", 1) == 1


def test_output_goes_nowhere_and_input_is_empty(make, capfd):
    assert make().run(FLOOD) == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "message"), [("hang", "took longer than 0.5 s"), ("die", "ended its process.*exit status 3")]
)
def test_an_object_that_cannot_be_built(make, how, message):
    with pytest.raises(SandboxError, match=message):
        make(how, start_timeout=0.5 if how == "hang" else 60).run(PID)


def test_what_the_worker_started_dies_with_it(make):
    sandbox = make()
    child = sandbox.run("value = subprocess.Popen(['sleep', '600']).pid")
    assert running(child)
    sandbox.worker.close()
    until(lambda: not running(child))


def test_a_forked_child_that_comes_back_answers_nothing(make):
    sandbox = make()
    sandbox.run("os.fork()")
    assert [sandbox.call("echo", number) for number in range(5)] == list(range(5))
    with pytest.raises(SandboxError, match="odd"):
        sandbox.run("os.fork()\nraise ValueError('odd')")
    assert sandbox.call("echo", "in step") == "in step"


@pytest.mark.slow
def test_a_forgotten_worker_ends(make):
    pid = Worker().call(make().target, "run", PID)
    gc.collect()
    until(lambda: not running(pid))


def test_the_worker_ends_with_a_killed_parent(make, tmp_path):
    script = (
        "import os; from slingshot.sandbox.worker import Target, Worker;"
        f"print(Worker().call(Target('sandbox_target:Thing'), 'run', {PID!r}), flush=True); os.kill(os.getpid(), 9)"
    )
    paths = os.pathsep.join([str(tmp_path), *(str(Path(folder).parent) for folder in slingshot.__path__)])
    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": paths}
    parent = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    assert parent.returncode == -9
    until(lambda: not running(int(parent.stdout)))


def test_a_worker_sees_nothing_of_its_parents_environment(make, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    sandbox = make()
    seen = sandbox.run("value = dict(os.environ)")
    ours = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED"}
    assert set(seen) - ours <= {"PATH", "HOME", "TMPDIR", "LANG", "LC_CTYPE"}
    assert seen["HOME"] != os.environ.get("HOME") and os.listdir(seen["HOME"]) == []
    sandbox.worker.close()
    assert not os.path.exists(seen["HOME"])


def test_iteration_over_sets_repeats_from_worker_to_worker(make):
    assert len({tuple(make().run("value = list({'one', 'two', 'three', 'four', 'five'})")) for _ in range(4)}) == 1


@pytest.mark.parametrize(
    ("took", "computed", "cores", "grows"),
    [(10.0, 0.1, 1, True), (10.0, 5.0, 1, False), (0.3, 0.0, 1, False), (10.0, 9.9, 2, True), (0.3, 0.3, 2, False)],
)
def test_a_pool_has_more_workers_where_calls_wait_or_cores_are_idle(took, computed, cores, grows):
    pool = WorkerPool(1, most=4, cores=cores)

    def spent(worker):
        worker.calls, worker.took, worker.computed = 10, took, computed

    pool.submit(spent).result()
    together = threading.Barrier(2 if grows else 1)
    for future in [pool.submit(lambda _: together.wait(60)) for _ in range(4)]:
        future.result()
    assert (pool.n_workers > 1) is grows and pool.n_workers <= 4
    pool.close()


def test_a_pool_replaces_the_worker_that_hangs_and_ends_all_when_forgotten(make):
    target = make(0, timeout=2.0).target
    pool = WorkerPool(2, [target])
    futures = [pool.submit(asks(target, code)) for code in ("time.sleep(600)", PID, PID, "1 / 0")]
    for failed, message in [(futures[0], "took longer than"), (futures[3], "raised ZeroDivisionError")]:
        with pytest.raises(SandboxError, match=message):
            failed.result()
    more = [pool.submit(asks(target, PID)) for _ in range(9)]
    pids = {future.result() for future in [*futures[1:3], *more]}
    assert 1 <= len(pids) <= 3
    del pool
    gc.collect()
    until(lambda: not any(map(running, pids)))


def test_take_stops_at_the_count_the_end_or_the_time():
    slow = (time.sleep(0.05) or number for number in range(5))
    assert [take(iter(range(10)), 3), take(iter(range(2)), 3), take(iter(()), 3)] == [[0, 1, 2], [0, 1], []]
    assert take(slow, 5, seconds=0.0) == [0]
