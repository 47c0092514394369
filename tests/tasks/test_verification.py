"""The pool that verifies beside sampling, and what an answer that breaks a verifier costs."""

import time

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import Problem, Reward
from slingshot.tasks.verification import VerificationPool

SOURCE = """
import os, time
def problems(split, seed): yield {"prompt": "p"}
def verify(problem, text):
    if text == "hang": time.sleep(600)
    if text == "die": os._exit(3)
    if text == "raise": raise ValueError("no such answer")
    if text == "token": return "HF_TOKEN" in os.environ
    return float(text)
def step(problem, messages):
    if messages[-1]["content"] == "raise": raise ValueError("no such move")
    return None if len(messages) > 2 else f"{messages[-1]['content']}, and then?"
"""
PROBLEM = Problem("p", "p", "0.5")


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "mine.py").write_text(SOURCE)
    return load_task(str(tmp_path / "mine.py"), timeout=1.0)


def test_rewards_come_as_the_tasks_give_them_and_a_bad_answer_costs_its_own(task):
    sums = load_task("arithmetic")
    with VerificationPool([task, sums], workers=2) as pool:
        answers = ["0.5", "hang", "1", "raise", "die", "token"]
        futures = [pool.submit(task, PROBLEM, text) for text in answers]
        right = pool.submit(sums, Problem("", "", "14", "en", {}), "14")
        assert right.done() and right.result() == Reward(1.0, "14")
        rewards = dict(zip(answers, (future.result() for future in futures), strict=True))
    assert rewards["0.5"] == Reward(0.5, "0.5") and rewards["1"] == Reward(1.0, "1")
    assert rewards["token"] == Reward(0.0, "token")  # the worker has no environment
    for text, reason in {
        "hang": "took longer than 1 s",
        "raise": "ValueError: no such answer",
        "die": "exit status 3",
    }.items():
        assert (
            rewards[text].value == 0.0 and "mine.py: verify() " in rewards[text].error and reason in rewards[text].error
        )


def test_verification_goes_on_beside_its_caller(task):
    with VerificationPool([task], workers=1) as pool:
        began = time.monotonic()
        futures = [pool.submit(task, PROBLEM, text) for text in ("hang", "1")]
        assert time.monotonic() - began < 0.5 and not futures[1].done()
        assert futures[1].result().value == 1.0


def test_environments_reply_in_the_pool(task):
    with VerificationPool([task]) as pool:
        said = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "first"}]
        assert pool.step(task, PROBLEM, said).result() == [{"role": "user", "content": "first, and then?"}]
        assert pool.step(task, PROBLEM, [*said, *said]).result() is None
        with pytest.raises(SlingshotError, match=r"mine\.py: step\(\) raised ValueError: no such move"):
            pool.step(task, PROBLEM, [{"role": "assistant", "content": "raise"}]).result()
        assert pool.step(load_task("arithmetic"), PROBLEM, said).result() is None


def test_a_closed_pool_leaves_nobody_waiting(task):
    with VerificationPool([task], workers=1) as pool:
        futures = [pool.submit(task, PROBLEM, "hang") for _ in range(3)]
        began = time.monotonic()
    assert all(future.cancelled() or future.result().error for future in futures) and time.monotonic() - began < 5


def test_no_worker_imports_torch(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import sys\ndef problems(split, seed): yield {'prompt': 'p'}\n"
        "def verify(problem, text): return not {'torch', 'reasoning_gym'} & set(sys.modules)\n"
    )
    task = load_task(str(tmp_path / "mine.py"))
    with VerificationPool([task]) as pool:
        assert pool.submit(task, PROBLEM, "x").result() == Reward(1.0, "x")
