"""The worker process: answers, errors in words, kills, and the limits that keep an accident small."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slingshot.sandbox.isolate import take
from slingshot.sandbox.pool import WorkerPool
from slingshot.sandbox.worker import SandboxError, Target, Worker

TARGET = """
import os, signal, sys, time

class Target:
    def __init__(self, start=0):
        if start == "hang":
            time.sleep(60)
        if start == "die":
            os._exit(3)
        self.count = start
    def add(self, number):
        self.count += number
        return self.count
    def echo(self, value):
        return value
    def pid(self):
        return os.getpid()
    def sleep(self, seconds):
        time.sleep(seconds)
    def spin(self):
        while True:
            pass
    def fail(self):
        raise ValueError("not " * 200 + "\\n this way")
    def leave(self):
        sys.exit(1)
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)
    def flood(self):
        for _ in range(2000):
            print("x" * 10_000)
            print("y" * 10_000, file=sys.stderr)
        os.write(1, b"z" * 100_000)
        return sys.stdin.read()
    def scribble(self):
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"nonsense\\n")
            except OSError:
                pass
        time.sleep(60)
    def huge(self):
        return "x" * (17 << 20)
    def eat(self):
        return len(bytearray(1 << 30))
    def odd(self):
        return {1, 2}
    def nan(self):
        return float("nan")
    def deep(self):
        value = []
        for _ in range(100_000):
            value = [value]
        return value
    def mute(self):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError
        raise Mute
    def child(self):
        import subprocess
        return subprocess.Popen(["sleep", "60"]).pid
    def seen(self):
        return [dict(os.environ), os.path.isdir(os.environ["HOME"])]
    def order(self):
        return list({"one", "two", "three", "four", "five"})
"""


def running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def gone(pid):
    deadline = time.monotonic() + 5
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(pid)


class Made:
    """A worker with one target."""

    def __init__(self, *args, **limits):
        self.worker, self.target = Worker(), Target("sandbox_target:Target", args, **limits)

    def call(self, method, *args):
        return self.worker.call(self.target, method, *args)


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


def test_an_object_keeps_its_state_between_calls(make):
    sandbox = make(5)
    assert [sandbox.call("add", 1), sandbox.call("add", 2)] == [6, 8]


def test_values_come_back_as_json_brings_them(make):
    sandbox = make()
    for value in (None, True, 1.5, "日本 \ud800 \x00 \n \u2028", [1, {"a": []}], "x" * 300_000):
        assert sandbox.call("echo", value) == value


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fail", r"^raised ValueError: (not )+not \(sandbox_target\.py line 24\)$"),
        ("leave", "^raised SystemExit: 1 "),
        ("mute", "^raised Mute: without words"),
        ("missing", "^raised AttributeError: .*missing"),
        ("odd", "^returned something that is not JSON: .*set"),
        ("nan", "^returned something that is not JSON"),
        ("deep", "^returned something that is not JSON"),
    ],
)
def test_errors_are_one_line_and_the_worker_lives_on(make, method, message):
    sandbox = make()
    pid = sandbox.call("pid")
    with pytest.raises(SandboxError, match=message) as caught:
        sandbox.call(method)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert sandbox.call("pid") == pid


def test_memory_is_limited(make):
    sandbox = make(memory=512 << 20)
    with pytest.raises(SandboxError, match="raised MemoryError"):
        sandbox.call("eat")
    assert sandbox.call("echo", 1) == 1


@pytest.mark.parametrize("method", ["sleep", "spin"])
def test_a_call_that_hangs_is_killed_in_time_and_the_next_starts_anew(make, method):
    sandbox = make(0, timeout=0.3)
    pid = sandbox.call("pid")
    sandbox.call("add", 1)
    began = time.monotonic()
    with pytest.raises(SandboxError, match=r"took longer than 0\.3 s"):
        sandbox.call(method, *([60] if method == "sleep" else []))
    assert time.monotonic() - began < 5
    assert gone(pid)
    assert sandbox.call("add", 1) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("die", "ended its process.*SIGKILL"),
        ("huge", "returned more than 16 MiB"),
        ("scribble", "wrote over the worker's pipe"),
    ],
)
def test_a_worker_that_breaks_the_protocol_is_replaced(make, method, message):
    sandbox = make()
    with pytest.raises(SandboxError, match=message):
        sandbox.call(method)
    assert sandbox.call("echo", 1) == 1


def test_output_goes_nowhere_and_input_is_empty(make, capfd):
    assert make().call("flood") == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "message"), [("hang", "took longer than 0.5 s"), ("die", "ended its process.*exit status 3")]
)
def test_an_object_that_cannot_be_built(make, how, message):
    with pytest.raises(SandboxError, match=message):
        make(how, start_timeout=0.5 if how == "hang" else 60).call("pid")


def test_what_the_worker_started_dies_with_it(make):
    sandbox = make()
    child = sandbox.call("child")
    assert running(child)
    sandbox.worker.close()
    assert gone(child)


def test_a_forgotten_sandbox_ends_its_worker(make, tmp_path):
    worker = Worker()
    pid = worker.call(Target("sandbox_target:Target"), "pid")
    del worker
    gc.collect()
    assert gone(pid)


def test_the_worker_ends_with_a_killed_parent(make, tmp_path):
    script = (
        "import os; from slingshot.sandbox.worker import Target, Worker;"
        "print(Worker().call(Target('sandbox_target:Target'), 'pid'), flush=True); os.kill(os.getpid(), 9)"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(sys.modules["slingshot.sandbox.worker"].__file__).parents[2])])
    parent = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, check=False
    )
    assert parent.returncode == -9
    assert gone(int(parent.stdout))


def test_iteration_over_sets_repeats_from_worker_to_worker(make):
    assert len({tuple(make().call("order")) for _ in range(4)}) == 1


def test_a_worker_sees_nothing_of_its_parents_environment(make, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    sandbox = make()
    seen, has_home = sandbox.call("seen")
    ours = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED"}
    assert set(seen) - ours <= {"PATH", "HOME", "TMPDIR", "LANG", "LC_CTYPE"}
    assert has_home and seen["HOME"] != os.environ.get("HOME") and os.listdir(seen["HOME"]) == []
    sandbox.worker.close()
    assert not os.path.exists(seen["HOME"])


def test_a_worker_holds_several_objects_each_built_once(make):
    sandbox, other = make(5), Target("sandbox_target:Target", (7,))
    assert sandbox.call("add", 1) == 6 and sandbox.worker.call(other, "add", 1) == 8 and sandbox.call("add", 1) == 7
    assert sandbox.worker.call(other, "pid") == sandbox.call("pid")


def test_a_pool_replaces_the_worker_that_hangs_and_ends_all_when_forgotten(make, tmp_path):
    target = make(0, timeout=0.5).target
    pool = WorkerPool(2, [target])
    futures = [pool.submit(Worker.call, target, *call) for call in [("sleep", 60), ("pid",), ("pid",), ("fail",)]]
    for failed, message in [(futures[0], "took longer than"), (futures[3], "raised ValueError")]:
        with pytest.raises(SandboxError, match=message):
            failed.result()
    pids = {future.result() for future in [*futures[1:3], *(pool.submit(Worker.call, target, "pid") for _ in range(9))]}
    assert 1 <= len(pids) <= 3
    del pool
    gc.collect()
    assert all(map(gone, pids))


def test_take_stops_at_the_count_the_end_or_the_time():
    def slow():
        for number in range(5):
            time.sleep(0.05)
            yield number

    assert take(iter(range(10)), 3) == [0, 1, 2]
    assert take(iter(range(2)), 3) == [0, 1]
    assert take(iter(()), 3) == []
    assert take(slow(), 5, seconds=0.0) == [0]
