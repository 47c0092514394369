"""gym:NAME: worked sums, the split by key, scoring that is right or wrong, and refusals."""

import itertools
import random
import re

import pytest
from reasoning_gym.factory import DATASETS

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.worker import SandboxError, Worker
from slingshot.tasks.loader import load_task
from slingshot.tasks.reasoning_gym import Dataset, Gym
from slingshot.tasks.task import Problem


@pytest.fixture(scope="module")
def chain_sum():
    return load_task("gym:chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=3)


@pytest.fixture(scope="module")
def sorting():
    return load_task("gym:word_sorting", min_words=3, max_words=4)


def sums(expression, answer):
    return Problem(f"{expression} =", "", answer, "en", {"expression": expression, "seed": 0, "index": 0})


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
    problem = sums(expression, answer)
    assert chain_sum.solution(problem, "steps", random.Random(0)).reasoning == reasoning
    assert chain_sum.solution(problem, "steps", random.Random(0)).answer == answer
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


def test_parameters_reach_reasoning_gym(chain_sum):
    lengths, terms = set(), set()
    for problem in itertools.islice(chain_sum.problems("train", 0), 300):
        numbers = problem.data["expression"].split()[::2]
        lengths.update(map(len, numbers))
        terms.add(len(numbers))
    assert terms == {2, 3} and lengths == {1, 2, 3}


def test_commuting_sums_share_a_split_and_splits_do_not_overlap(chain_sum):
    train = {problem.key for problem in itertools.islice(chain_sum.problems("train", 0), 3000)}
    test = {problem.key for problem in itertools.islice(chain_sum.problems("test", 1), 300)}
    assert test and not train & test
    problem = next(problem for problem in chain_sum.problems("train", 0) if problem.data["expression"].count(" ") == 4)
    first, *rest = re.findall(r"[+-]?\d+", problem.data["expression"].replace(" ", ""))
    assert problem.key == "".join(sorted([f"+{first}", *rest]))


def test_problems_repeat_by_seed_and_seeds_share_nothing_in_order(chain_sum):
    first, again, other = (
        [problem.prompt for problem in itertools.islice(task.problems("train", seed), 1500)]
        for task, seed in (
            (chain_sum, 3),
            (load_task("gym:chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=3), 3),
            (chain_sum, 4),
        )
    )
    assert first == again
    assert not any(first[at : at + 20] == other[:20] or other[at : at + 20] == first[:20] for at in range(1400))


def test_a_sum_must_be_answered_with_its_number(chain_sum):
    problem = next(chain_sum.problems("train", 5))
    wrong = str(int(problem.answer) + 1)
    assert chain_sum.verify(problem, f" {problem.answer}. ").value == 1.0
    assert chain_sum.verify(problem, wrong).value == 0.0
    for text in (f"{wrong} {problem.answer}", f"It is {problem.answer}", f"{problem.answer} {wrong}", "", "x" * 20_000):
        assert chain_sum.verify(problem, text).value == 0.0
    assert chain_sum.verify(problem, f"{wrong}, or rather {problem.answer}!", lenient=True).value == 1.0
    assert chain_sum.verify(problem, f"{problem.answer}, or rather {wrong}", lenient=True).value == 0.0
    assert chain_sum.verify(problem, "none", lenient=True).answer is None


def test_other_datasets_are_scored_in_the_worker_without_partial_credit(sorting):
    assert not sorting.has_solutions
    with pytest.raises(SlingshotError, match="writes no worked solutions"):
        sorting.solution(next(sorting.problems("train", 0)), "steps", random.Random(0))
    for problem in itertools.islice(sorting.problems("test", 0), 5):
        assert problem.key == problem.prompt
        assert sorting.verify(problem, problem.answer).value == 1.0
        assert sorting.verify(problem, f"Sorted:\n{problem.answer}\n", lenient=True).value == 1.0
        assert sorting.verify(problem, problem.answer.partition(", ")[0]).value == 0.0
        assert sorting.verify(problem, ", ".join(reversed(problem.answer.split(", ")))).value == 0.0
        assert sorting.verify(problem, problem.answer * 2000).value == 0.0


def test_a_word_must_be_answered_with_a_word():
    task = load_task("gym:game_of_life_halting")  # its scorer takes anything for right
    problem = next(task.problems("train", 0))
    wrong = "False" if problem.answer == "True" else "True"
    assert task.verify(problem, f" {problem.answer}.\n").value == 1.0
    for text in (wrong, f"{wrong} {problem.answer}", f"{problem.answer} {wrong}", f"{problem.answer},{wrong}", ""):
        assert task.verify(problem, text).value == 0.0
    assert task.verify(problem, f"not {wrong} but {problem.answer}.", lenient=True).value == 1.0
    assert task.verify(problem, f"{problem.answer}, no, {wrong}", lenient=True).value == 0.0
    assert task.verify(problem, "?", lenient=True).answer is None


def test_a_tolerant_scorer_decides_on_numbers_that_are_near():
    task = load_task("gym:coin_flip")  # its scorer tolerates 0.0001, and pays in full for "0" as a prefix of 0.75
    problem = next(problem for problem in task.problems("train", 0) if 0.1 < float(problem.answer) < 0.9)
    assert task.verify(problem, f"{problem.answer}000").value == 1.0
    assert task.verify(problem, f"{float(problem.answer) + 0.00005:.7f}").value == 1.0
    assert task.verify(problem, f"{float(problem.answer) + 0.0005:.7f}").value == 0.0
    assert task.verify(problem, "0").value == 0.0


def test_a_scorer_that_cannot_answer_means_wrong_and_does_not_end_the_task(sorting):
    problem = next(sorting.problems("train", 0))
    nowhere = Problem(problem.prompt, problem.key, problem.answer, "en", {"seed": 0, "index": "nowhere"})
    assert sorting.verify(nowhere, problem.answer).value == 0.0
    assert sorting.verify(problem, problem.answer).value == 1.0


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("chain_sums", {}, "gym:chain_sums: dataset 'chain_sums' is unknown; did you mean chain_sum?"),
        ("chain_sum", {"max_term": 3}, "gym:chain_sum: parameter 'max_term' is unknown; did you mean max_terms?"),
        (
            "chain_sum",
            {"min_terms": 9, "max_terms": 3},
            "gym:chain_sum: reasoning-gym refuses these parameters: max_terms",
        ),
        ("chain_sum", {"min_terms": "many"}, "gym:chain_sum: reasoning-gym refuses these parameters: .*str"),
        ("chain_sum", {"min_terms": {1}}, "gym:chain_sum.params.min_terms: .*JSON"),
    ],
)
def test_refusals_name_the_way_out(name, params, message):
    with pytest.raises(SlingshotError, match=message):
        Gym.load(name, params)


def test_reasoning_gym_stays_out_of_this_process(chain_sum):
    import subprocess
    import sys
    from pathlib import Path

    root = str(Path(sys.modules["slingshot.tasks.reasoning_gym"].__file__).parents[2])
    script = (
        f"import sys; sys.path.insert(0, {root!r}); from slingshot.tasks.loader import load_task; task = load_task('gym:chain_sum');"
        "next(task.problems('train', 0)); assert not {'reasoning_gym', 'torch'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class Here(Worker):
    """Builds and calls targets in this process: a hundred families load the library once."""

    def call(self, target, method, *args, timeout=None):
        self.dataset = getattr(self, "dataset", None) or Dataset(*target.args)
        try:
            return getattr(self.dataset, method)(*args)
        except Exception as error:
            raise SandboxError(str(error)) from error


CONSTANTS = [
    "?",
    "0",
    "1",
    "-1",
    "nan",
    "inf",
    "True",
    "no",
    "[]",
    "{}",
    "[[]]",
    "None",
    ".",
    "x",
    "(P ∨ ¬P)",
    "6 + 6 + 10 + 2",
    "R",
    '""',
]
FAMILIES = sorted(DATASETS.keys() - {"composite"})
SOME = ["gsm_symbolic", "puzzle24", "complex_arithmetic", "game_of_life_halting", "coin_flip", "chain_sum"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_no_family_pays_for_a_constant_answer(name):
    """Every family loads and pays for its known answers; what is right for one problem, or for none, is not right for all."""
    task, worker = Gym(dataset=name), Here()
    items = [worker.call(task.target, "take", 11, index, 1)[0] for index in range(4)]
    problems = [
        Problem(item["question"], str(n), item["answer"], "en", {"seed": 11, "index": n})
        for n, item in enumerate(items)
    ]
    known = [problem for problem in problems if problem.answer]
    assert all(task.verify_in(worker, problem, problem.answer).value == 1.0 for problem in known)
    for answer in {*CONSTANTS, *(problem.answer for problem in known)}:
        others = [problem for problem in problems if problem.answer.casefold() != answer.casefold()]
        right = [task.verify_in(worker, problem, answer).value for problem in others]
        assert len(right) < 2 or sum(right) < len(right), answer
