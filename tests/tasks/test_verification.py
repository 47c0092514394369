"""The pool that verifies beside sampling, and what an answer that breaks a verifier costs."""

import random
import time

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import Problem, Reward
from slingshot.tasks.verification import VerificationPool

SOURCE = """
import os, sys, time
def problems(split, seed): yield {"prompt": "p"}
def verify(problem, text):
    if text == "hang": time.sleep(600)
    if text == "die": os._exit(3)
    if text == "raise": raise ValueError("no such answer")
    if text == "token": return "HF_TOKEN" in os.environ
    if text == "light": return not {"torch", "reasoning_gym", "pydantic"} & set(sys.modules)
    return float(text)
def step(problem, messages):
    if messages[-1]["content"] == "raise": raise ValueError("no such move")
    return None if len(messages) > 2 else f"{messages[-1]['content']}, and then?"
"""
PROBLEM = Problem("p", "p", "0.5")
ERRORS = {"hang": "took longer than 3 s", "raise": "raised ValueError: no such answer", "die": "exit status 3"}


@pytest.fixture
def task(load, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    return load(SOURCE, timeout=3.0)


def test_rewards_come_as_the_tasks_give_them_and_a_bad_answer_costs_its_own(task):
    """In a worker without torch and without its parent's environment."""
    sums = load_task("arithmetic")
    with VerificationPool([task, sums], workers=2) as pool:
        futures = {text: pool.submit(task, PROBLEM, text) for text in ("0.5", *ERRORS, "1", "token", "light")}
        right = pool.submit(sums, Problem("", "", "14", "en", {}), "14")
        assert right.done() and right.result() == Reward(1.0, "14")
        rewards = {text: future.result() for text, future in futures.items()}
    for text, value in {"0.5": 0.5, "1": 1.0, "token": 0.0, "light": 1.0}.items():
        assert rewards[text] == Reward(value, text)
    for text, reason in ERRORS.items():
        error = rewards[text].error
        assert rewards[text].value == 0.0 and "mine.py: verify() " in error and reason in error


def test_verification_goes_on_beside_its_caller(task):
    with VerificationPool([task], workers=1) as pool:
        futures = [pool.submit(task, PROBLEM, text) for text in ("hang", "1")]
        assert not futures[1].done()
        assert futures[1].result().value == 1.0


def test_environments_reply_in_the_pool(task):
    with VerificationPool([task]) as pool:
        said = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "first"}]
        assert pool.step(task, PROBLEM, said).result() == [{"role": "user", "content": "first, and then?"}]
        assert pool.step(task, PROBLEM, [*said, *said]).result() is None
        with pytest.raises(SlingshotError, match=r"mine\.py: step\(\) raised ValueError: no such move"):
            pool.step(task, PROBLEM, [{"role": "assistant", "content": "raise"}]).result()
        assert pool.step(load_task("arithmetic"), PROBLEM, said).result() is None


def test_a_closed_pool_leaves_nobody_waiting(load):
    task = load(SOURCE, timeout=600)
    with VerificationPool([task], workers=1) as pool:
        futures = [pool.submit(task, PROBLEM, "hang") for _ in range(3)]
        began = time.monotonic()
    assert all(future.cancelled() or future.result().error for future in futures) and time.monotonic() - began < 60


def test_as_many_answers_of_each_batch_may_wait_up_to_a_limit():
    assert [VerificationPool([], batches=batches).most for batches in (1, 2, 9)] == [16, 32, 64]


@pytest.mark.parametrize("name", ["arithmetic", "countdown", "knights", "multiplication", "needle"])
def test_of_ten_megabytes_the_end_is_read_leniently(name):
    task, flood = load_task(name), "(1,2) " * 1_700_000
    problem = next(task.problems("train", 0))
    right = task.solution(problem, "answer", random.Random(0)).answer
    with VerificationPool([task]) as pool:
        assert pool.submit(task, problem, f"{flood}\n{right}", lenient=True).result().value == 1.0
        assert pool.submit(task, problem, f"{right}\n{flood}", lenient=True).result().value == 0.0
        assert pool.submit(task, problem, f"{flood}\n{right}").result() == Reward(0.0, None)
