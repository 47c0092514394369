"""Drawing problems: every one once before any twice, shares over steps, and draws that a resumed run repeats."""

from collections import Counter
from itertools import chain, count, islice
from typing import ClassVar

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import TaskConfig, load_task
from slingshot.tasks.mixture import TaskMix, distinct, passes
from slingshot.tasks.task import Problem, Task, split_of

SUMS = TaskConfig(name="arithmetic", params={"min_terms": 2, "max_terms": 2, "operators": "+", "languages": ["en"]})
TRAIN = [str(n) for n in range(6000) if split_of(str(n)) == "train"]


@pytest.fixture
def file(load):
    """file(body) names a task file whose problems(split, seed) has this body."""
    verify = "def verify(problem, text): return True\n"
    head = "import itertools, random\ndef problems(split, seed): "
    return lambda body: TaskConfig(name=load(f"{verify}{head}{body}").name)


def steps(mix, size, number):
    return [mix.draw(step * size, size) for step in range(number)]


def keys(items):
    return [item.problem.key for item in items]


@pytest.mark.parametrize("length", [60, pytest.param(6000, marks=pytest.mark.slow)])
def test_every_problem_of_a_file_comes_once_before_any_twice(file, length):
    """Also of one that takes no notice of its seed, drawn in steps of four; every pass has an order of its own."""
    config = file(f"return [{{'prompt': str(n)}} for n in range({length})]")
    train = [key for key in TRAIN if int(key) < length]
    drawn = keys(chain(*steps(TaskMix([config], "train", "0"), 4, (len(train) + 99) // 4 + 1)))
    first, second = drawn[: len(train)], drawn[len(train) :]
    assert sorted(first) == sorted(train)
    assert len(set(second[: len(train)])) == min(len(second), len(train)) > 40 and first[:40] != second[:40]
    other = keys(TaskMix([config], "train", "1").draw(0, 40))
    assert other != first[:40] and first[:40] == keys(TaskMix([config], "train", "0").draw(0, 40))


@pytest.mark.parametrize(
    "body",
    [
        "return ({'prompt': str(random.Random(seed + n).randrange(50))} for n in itertools.count())",
        "return ({'prompt': str(n)} for n in random.Random(seed).sample(range(50), 50))",
    ],
    ids=["endless", "shuffled"],
)
def test_a_file_that_goes_by_its_seed_brings_all_before_any_twice(file, body):
    train = [key for key in TRAIN if int(key) < 50]
    drawn = keys(TaskMix([file(body)], "train", "0").draw(0, 2 * len(train)))
    assert sorted(drawn[: len(train)]) == sorted(drawn[len(train) :]) == sorted(train)


@pytest.mark.slow
def test_a_file_without_end_that_ignores_its_seed_is_drawn_in_an_order_by_seed(file):
    config = file("return ({'prompt': str(n)} for n in itertools.count())")
    first, other = (keys(TaskMix([config], "train", seed).draw(0, 400)) for seed in "01")
    assert len(set(first)) == len(set(other)) == 400 and len(set(first) & set(other)) < 40


def test_seeds_are_small_enough_for_every_generator(file):
    task = load_task(file("return [{'prompt': str(seed)}, {'prompt': str(seed) + 'b'}]").name)
    seeds = [int(distinct(task, "train", f"{n:0100}", 1)[0].key.rstrip("b")) for n in range(20)]
    assert len(set(seeds)) == 20 and max(seeds) < 2**32  # numpy.random.seed takes no more


@pytest.mark.parametrize(
    ("weights", "size", "number"), [([1, 1, 1, 1], 2, 6), ([30, 1], 8, 40), ([3, 1, 0.5], 5, 20), ([1], 3, 4)]
)
def test_shares_are_met_over_steps(weights, size, number):
    """However few problems a step has, at every step every task has had its share to within two problems."""
    configs = [TaskConfig(name=("arithmetic", "countdown")[n % 2], weight=w) for n, w in enumerate(weights)]
    mix, had = TaskMix(configs, "train", "0"), Counter()
    for step, items in enumerate(steps(mix, size, number), start=1):
        assert len(items) == size
        had.update(id(item.task) for item in items)
        shares = [size * step * weight / sum(weights) for weight in weights]
        assert all(abs(had[id(task)] - share) < 2 for task, share in zip(mix.tasks, shares, strict=True))
    assert len(had) == len(weights)


def test_a_resumed_run_draws_what_the_first_would_have_drawn():
    configs = [SUMS, TaskConfig(name="countdown", weight=0.3)]
    whole, resumed = steps(TaskMix(configs, "train", "0"), 8, 30), TaskMix(configs, "train", "0")
    assert all(keys(resumed.draw(8 * step, 8)) == keys(whole[step]) for step in (20, 21, 3, 29))
    noise = [item.key for items in whole for item in items]
    assert len(set(noise)) == len(noise)  # a problem that comes again is sampled anew


def test_seed_strings_do_not_collide():
    """As numbers modulo 2**61 these two were one."""
    texts = [(int(b"abc".hex(), 16) + n * 2**61).to_bytes(8, "big").decode("latin-1") for n in (0, 1)]
    first, second = ([p.key for p in distinct(load_task("arithmetic"), "train", text, 20)] for text in texts)
    assert first != second


def test_a_task_that_runs_out_gives_what_it_has():
    found = distinct(load_task(SUMS.name, **SUMS.params), "test", "seed", 500)
    assert 0 < len(found) < 45 and len({p.key for p in found}) == len(found)  # a tenth of 45 unordered pairs of 1 to 9
    mix = TaskMix([SUMS, TaskConfig(name="countdown")], "test", "0", repeat=False)
    names = Counter(item.task.name for item in mix.draw(0, 200))
    assert names["countdown"] == 100 and names["arithmetic"] < 45


class Round(Task):
    """Numbers, of which every `length` begins anew."""

    length: int
    ends: bool = False
    name: ClassVar[str] = "round"

    def problems(self, split, seed):
        return (Problem("", str(n % self.length)) for n in (range(self.length) if self.ends else count()))


def test_passes_go_on_for_ever_without_a_memory():
    drawn = [problem.key for problem in islice(passes(Round(length=30, ends=True), "train", "0"), 90)]
    assert Counter(drawn) == dict.fromkeys(map(str, range(30)), 3)


@pytest.mark.slow
def test_a_task_of_more_problems_than_are_remembered_is_drawn_to_its_end():
    found = distinct(Round(length=150_000), "train", "0", 10**9)
    assert len(found) == len({problem.key for problem in found}) == 150_000


def test_a_mix_of_nothing_is_refused():
    with pytest.raises(SlingshotError, match=r'^tasks: at least one task is needed, for example \{name = "arithme'):
        TaskMix([], "train", "0")
