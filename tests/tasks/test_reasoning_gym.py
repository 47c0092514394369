"""gym:NAME: worked sums, the split by key, scoring that is right or wrong, and refusals."""

import dataclasses
import itertools
import random
import re
import subprocess
import sys

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.worker import SandboxError, Worker
from slingshot.tasks.loader import load_task
from slingshot.tasks.reasoning_gym import Dataset, Gym
from slingshot.tasks.task import Problem, Solution


@pytest.fixture(scope="module")
def chain_sum():
    return load_task("gym:chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=3)


@pytest.mark.parametrize(
    ("expression", "answer", "reasoning"),
    [
        ("45 + 38 - 7", "76", "Start with 45. Add 38: 45 + 30 = 75, 75 + 8 = 83. Subtract 7: 83 - 7 = 76."),
        ("12 - 45", "-33", "Start with 12. Subtract 45: 12 - 40 = -28, -28 - 5 = -33."),
        ("3 + 305", "308", "Start with 3. Add 305: 3 + 300 = 303, 303 + 5 = 308."),
        ("9 - 20 + 0", "-11", "Start with 9. Subtract 20: 9 - 20 = -11. Add 0: -11 + 0 = -11."),
        ("5 - -12", "17", "Start with 5. Subtract -12: 5 - -12 = 17."),
    ],
)
def test_sums_worked_by_hand(chain_sum, expression, answer, reasoning):
    problem = Problem(f"{expression} =", "", answer, data={"expression": expression, "seed": 0, "index": 0})
    assert chain_sum.solution(problem, "steps", random.Random(0)) == Solution(reasoning, answer)
    assert chain_sum.solution(problem, "answer", random.Random(0)).reasoning == ""
    for seed in range(10):
        slipped = chain_sum.solution(problem, "slips", random.Random(seed)).reasoning
        assert slipped != reasoning and re.sub(r"-?\d+, wait, ", "", slipped) == reasoning


def test_worked_sums_are_true_and_verify(chain_sum):
    for problem, solution in itertools.islice(chain_sum.documents("train", 0, "steps"), 200):
        *_, last = re.findall(r"(-?\d+) ([+-]) (-?\d+) = (-?\d+)", solution.reasoning)
        assert last[3] == solution.answer == problem.answer
        for left, operator, right, result in re.findall(r"(-?\d+) ([+-]) (\d+) = (-?\d+)", solution.reasoning):
            assert int(left) + (int(right) if operator == "+" else -int(right)) == int(result)
        assert chain_sum.verify(problem, solution.answer).value == 1.0
        assert chain_sum.verify(problem, solution.reasoning, lenient=True).value == 1.0


@pytest.fixture(scope="module")
def word_problems():
    return load_task("gym:gsm_symbolic")


def test_word_problems_bring_their_working(word_problems):
    for problem, solution in itertools.islice(word_problems.documents("train", 0, "steps"), 100):
        assert solution.reasoning and "####" not in solution.reasoning and solution.answer == problem.answer
        assert word_problems.verify(problem, solution.answer).value == 1.0
        slipped = word_problems.solution(problem, "slips", random.Random(0)).reasoning
        assert re.sub(r"\d+, wait, ", "", slipped) == solution.reasoning


@pytest.mark.parametrize(
    ("reasoning", "result"),
    [
        ("He has 7 and buys 3 = 10 more.", "10"),
        ("The fee is $400 x 6/100 = $24 in all.", "24"),
        ("So 2,000 + 4,000 = 6,000 and half is 6,000 / 2 = 3,000; 1 + 1 = 2.", "2"),
    ],
)
def test_a_word_problems_slip_is_in_a_result(word_problems, reasoning, result):
    problem = Problem("", "", result, data={"reasoning": reasoning})
    for seed in range(10):
        slipped = word_problems.solution(problem, "slips", random.Random(seed)).reasoning
        assert re.search(rf"= \$?(?!{result},)\d+, wait, {result}\b", slipped), slipped
    without = Problem("", "", "3", data={"reasoning": "Half of it is 1.5 = 1.5, so 3."})
    assert word_problems.solution(without, "slips", random.Random(0)).reasoning == without.data["reasoning"]


def test_parameters_reach_reasoning_gym(chain_sum):
    sums = [p.data["expression"].split()[::2] for p in itertools.islice(chain_sum.problems("train", 0), 300)]
    assert set(map(len, sums)) == {2, 3} and set(map(len, itertools.chain(*sums))) == {1, 2, 3}


def test_commuting_sums_share_a_split_and_splits_do_not_overlap(chain_sum):
    train = {problem.key for problem in itertools.islice(chain_sum.problems("train", 0), 3000)}
    test = {problem.key for problem in itertools.islice(chain_sum.problems("test", 1), 300)}
    assert test and not train & test
    problem = next(problem for problem in chain_sum.problems("train", 0) if problem.data["expression"].count(" ") == 4)
    first, *rest = re.findall(r"[+-]?\d+", problem.data["expression"].replace(" ", ""))
    assert problem.key == "".join(sorted([f"+{first}", *rest]))


@pytest.mark.slow
def test_problems_repeat_by_seed_and_seeds_share_nothing_in_order(chain_sum):
    again = load_task("gym:chain_sum", **chain_sum.params)
    first, same, other = (
        [problem.prompt for problem in itertools.islice(task.problems("train", seed), 1500)]
        for task, seed in ((chain_sum, 3), (again, 3), (chain_sum, 4))
    )
    assert first == same
    assert not any(first[at : at + 20] == other[:20] or other[at : at + 20] == first[:20] for at in range(1400))


def test_a_sum_must_be_answered_with_its_number(chain_sum):
    problem = next(chain_sum.problems("train", 5))
    right, wrong = problem.answer, str(int(problem.answer) + 1)
    assert chain_sum.verify(problem, f" {right}. ").value == 1.0
    for text in (wrong, f"{wrong} {right}", f"It is {right}", f"{right} {wrong}", "", "x" * 20_000):
        assert chain_sum.verify(problem, text).value == 0.0
    assert chain_sum.verify(problem, f"{wrong}, or rather {right}!", lenient=True).value == 1.0
    assert chain_sum.verify(problem, f"{right}, or rather {wrong}", lenient=True).value == 0.0
    assert chain_sum.verify(problem, "none", lenient=True).answer is None


def test_other_datasets_are_scored_in_the_worker_without_partial_credit():
    task = load_task("gym:word_sorting", min_words=3, max_words=4)
    with pytest.raises(SlingshotError, match="writes no worked solutions"):
        task.solution(next(task.problems("train", 0)), "steps", random.Random(0))
    for problem in itertools.islice(task.problems("test", 0), 5):
        right = problem.answer
        assert problem.key == problem.prompt and not task.has_solutions
        for text in (right.partition(", ")[0], ", ".join(reversed(right.split(", "))), right * 2000):
            assert task.verify(problem, text).value == 0.0
        nowhere = dataclasses.replace(problem, data={"seed": 0, "index": "nowhere"})  # the scorer itself fails
        assert task.verify(nowhere, right).value == 0.0
        assert task.verify(problem, right).value == 1.0
        assert task.verify(problem, f"Sorted:\n{right}\n", lenient=True).value == 1.0


@pytest.mark.slow
def test_a_composite_is_scored_by_the_family_of_each_item():
    datasets = [{"name": "gsm_symbolic"}, {"name": "chain_sum", "weight": 2, "config": {"max_terms": 3}}]
    task = load_task("gym:composite", datasets=datasets)
    problems = list(itertools.islice(task.problems("train", 0), 20))
    assert {problem.prompt.startswith("State the final answer") for problem in problems} == {True, False}
    assert all(task.verify(problem, problem.answer).value == 1.0 for problem in problems)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("chain_sum", {"max_term": 3}, r"parameter 'max_term' is unknown; did you mean max_terms\?"),
        ("chain_sum", {"min_terms": 9, "max_terms": 3}, "reasoning-gym refuses these parameters: max_terms"),
        ("chain_sum", {"min_terms": "many"}, "reasoning-gym refuses these parameters: .*str"),
        ("composite", {}, "reasoning-gym refuses these parameters: Must specify at least one dataset"),
    ],
)
def test_refusals_name_the_way_out(name, params, message):
    with pytest.raises(SlingshotError, match=message):
        Dataset(name, params)


@pytest.mark.slow
def test_reasoning_gym_stays_out_of_this_process():
    script = f"""
import sys; sys.path[:] = {sys.path!r}
from slingshot.tasks.loader import load_task
next(load_task("gym:chain_sum").problems("train", 0))
assert not {{"reasoning_gym", "torch"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", script], check=True)


class Here(Worker):
    """Builds and calls a target in this process: a hundred families load the library once."""

    def call(self, target, method, *args, timeout=None):
        self.dataset = getattr(self, "dataset", None) or Dataset(*target.args)
        try:
            return getattr(self.dataset, method)(*args)
        except Exception as error:
            raise SandboxError(str(error)) from error


def of_family(name, count):
    """Problems of a family, and what verifies answers to them."""
    task, worker = Gym(dataset=name), Here()
    problems = []
    for index in range(count):
        (item,) = worker.call(task.target, "take", 11, index, 1)
        problems.append(Problem(item["question"], str(index), item["answer"], data={"seed": 11, "index": index}))
    return problems, task.on(worker).verify


def test_a_word_must_be_answered_with_a_word():
    (problem,), verify = of_family("game_of_life_halting", 1)  # its scorer takes anything for right
    right, wrong = ("False", "True") if problem.answer == "False" else ("True", "False")
    assert verify(problem, f" {right}.\n").value == 1.0
    for text in (wrong, f"{wrong} {right}", f"{right} {wrong}", f"{right},{wrong}", ""):
        assert verify(problem, text).value == 0.0
    assert verify(problem, f"not {wrong} but {right}.", lenient=True).value == 1.0
    assert verify(problem, f"{right}, no, {wrong}", lenient=True).value == 0.0
    assert verify(problem, "?", lenient=True).answer is None


def test_a_tolerant_scorer_decides_on_numbers_that_are_near():
    problems, verify = of_family("coin_flip", 20)  # its scorer tolerates 0.0001, and takes "0" for a prefix of 0.75
    problem = next(problem for problem in problems if 0.1 < float(problem.answer) < 0.9)
    value = float(problem.answer)
    texts = [f"{problem.answer}000", f"{value + 0.00005:.7f}", f"{value + 0.0005:.7f}", "0"]
    assert [verify(problem, text).value for text in texts] == [1.0, 1.0, 0.0, 0.0]


def test_a_number_may_be_written_as_the_question_asks_for_it():
    problems, verify = of_family("power_function", 6)
    decimal = [problem for problem in problems if "e" not in problem.answer and float(problem.answer) > 1000]
    assert decimal and all("e.g., 1.23e+4" in problem.prompt for problem in decimal)
    for problem in decimal:
        right, wrong = f"{float(problem.answer):.2e}", f"{2 * float(problem.answer):.2e}"
        assert [verify(problem, f" {text}\n").value for text in (right, wrong, f"{right} {wrong}")] == [1.0, 0.0, 0.0]


CONSTANTS = [
    *["?", "0", "1", "-1", "nan", "inf", "True", "no", "[]", "{}", "[[]]", "None", ".", "x", "R"],
    "(P ∨ ¬P)",
    "6 + 6 + 10 + 2",
]
SOME = ["gsm_symbolic", "puzzle24", "complex_arithmetic", "game_of_life_halting", "coin_flip", "chain_sum"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOME)
def test_no_family_pays_for_a_constant_answer(name):
    """Every family pays for its known answers; what is right for one problem, or for none, is not right for all."""
    problems, verify = of_family(name, 3)
    known = [problem for problem in problems if problem.answer]
    assert all(verify(problem, problem.answer).value == 1.0 for problem in known)
    for answer in {*CONSTANTS, *(problem.answer for problem in known)}:
        others = [problem for problem in problems if problem.answer.casefold() != answer.casefold()]
        right = [verify(problem, answer).value for problem in others]
        assert len(right) < 2 or sum(right) < len(right), answer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_other_family_does():
    from reasoning_gym.factory import DATASETS  # here: it takes a second, and a slow test alone wants it

    for name in sorted(DATASETS.keys() - {"composite", *SOME}):
        test_no_family_pays_for_a_constant_answer(name)
