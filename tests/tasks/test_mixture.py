"""Drawing problems: every one once before any twice, shares over steps, and draws that a resumed run repeats."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from pathlib import Path

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import TaskConfig, load_task
from slingshot.tasks.mixture import Item, TaskMix, distinct, passes
from slingshot.tasks.task import Problem, Split, Task, split_of

SUMS = TaskConfig(name="arithmetic", params={"min_terms": 2, "max_terms": 2, "operators": "+", "languages": ["en"]})
VERIFY = "\ndef verify(problem, text): return True\n"


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., TaskConfig]:
    """file(body) is a task file whose problems(split, seed) has this body."""

    def write(body: str, name: str = "mine.py", weight: float = 1.0) -> TaskConfig:
        (tmp_path / name).write_text(f"import itertools, random\ndef problems(split, seed):\n    {body}\n{VERIFY}")
        return TaskConfig(name=str(tmp_path / name), weight=weight)

    return write


def steps(mix: TaskMix, size: int, number: int) -> list[list[Item]]:
    return [mix.draw(step * size, size) for step in range(number)]


def keys(items: list[Item]) -> list[str]:
    return [item.problem.key for item in items]


@pytest.mark.parametrize("length", [60, 6000])
def test_every_problem_of_a_file_comes_once_before_any_twice(file: Callable[..., TaskConfig], length: int) -> None:
    """Also of one that takes no notice of its seed, drawn in steps of four; every pass has an order of its own."""
    config = file(f"return [{{'prompt': str(n)}} for n in range({length})]")
    train = [str(n) for n in range(length) if split_of(str(n)) == "train"]
    drawn = keys(list(chain(*steps(TaskMix([config], "train", "0"), 4, (len(train) + 99) // 4 + 1))))
    first, second = drawn[: len(train)], drawn[len(train) :]
    assert sorted(first) == sorted(train)
    assert len(set(second[: len(train)])) == min(len(second), len(train)) > 40 and first[:40] != second[:40]
    other = keys(TaskMix([config], "train", "1").draw(0, 40))
    assert other != first[:40] and first[:40] == keys(TaskMix([config], "train", "0").draw(0, 40))


@pytest.mark.parametrize(
    "body",
    [
        "rng = random.Random(seed); yield from ({'prompt': str(rng.randrange(50))} for _ in itertools.count())",
        "yield from ({'prompt': str(n)} for n in random.Random(seed).sample(range(50), 50))",
    ],
    ids=["endless", "shuffled"],
)
def test_a_file_that_goes_by_its_seed_brings_all_before_any_twice(file: Callable[..., TaskConfig], body: str) -> None:
    train = [str(n) for n in range(50) if split_of(str(n)) == "train"]
    drawn = keys(TaskMix([file(body)], "train", "0").draw(0, 2 * len(train)))
    assert sorted(drawn[: len(train)]) == sorted(drawn[len(train) :]) == sorted(train)


def test_a_file_without_end_that_ignores_its_seed_is_drawn_in_an_order_by_seed(file: Callable[..., TaskConfig]) -> None:
    config = file("yield from ({'prompt': str(n)} for n in itertools.count())")
    first, other = (keys(TaskMix([config], "train", seed).draw(0, 400)) for seed in "01")
    assert len(set(first)) == len(set(other)) == 400 and len(set(first) & set(other)) < 40


def test_seeds_are_small_enough_for_every_generator(file: Callable[..., TaskConfig]) -> None:
    task = load_task(file("random.seed(seed); yield {'prompt': str(seed)}; yield {'prompt': str(seed) + 'b'}").name)
    seeds = [int(distinct(task, "train", f"{n:0100}", 1)[0].key.rstrip("b")) for n in range(20)]
    assert len(set(seeds)) == 20 and max(seeds) < 2**32  # numpy.random.seed takes no more


@pytest.mark.parametrize(
    ("weights", "size", "number"), [([1, 1, 1, 1], 2, 6), ([30, 1], 8, 40), ([3, 1, 0.5], 5, 20), ([1], 3, 4)]
)
def test_shares_are_met_over_steps(weights: list[float], size: int, number: int) -> None:
    """However few problems a step has, at every step every task has had its share to within two problems."""
    configs = [TaskConfig(name=("arithmetic", "countdown")[n % 2], weight=w) for n, w in enumerate(weights)]
    mix = TaskMix(configs, "train", "0")
    had: Counter[int] = Counter()
    for step, items in enumerate(steps(mix, size, number), start=1):
        assert len(items) == size
        had.update(mix.tasks.index(item.task) if len(weights) == 2 else id(item.task) for item in items)
        names = list(range(len(weights))) if len(weights) == 2 else [id(task) for task in mix.tasks]
        assert all(
            abs(had[name] - size * step * weight / sum(weights)) < 2
            for name, weight in zip(names, weights, strict=True)
        )
    assert len(had) == len(weights)


def test_a_resumed_run_draws_what_the_first_would_have_drawn() -> None:
    configs = [SUMS, TaskConfig(name="countdown", weight=0.3)]
    whole = steps(TaskMix(configs, "train", "0"), 8, 30)
    resumed = TaskMix(configs, "train", "0")
    assert [keys(resumed.draw(8 * step, 8)) for step in (20, 21, 3, 29)] == [
        keys(whole[step]) for step in (20, 21, 3, 29)
    ]
    noise = [item.key for items in whole for item in items]
    assert len(set(noise)) == len(noise)  # a problem that comes again is sampled anew


def test_seed_strings_do_not_collide() -> None:
    """As numbers modulo 2**61 these two were one."""
    first, second = (int(b"abc".hex(), 16) + n * 2**61 for n in (0, 1))
    texts = [number.to_bytes(8, "big").decode("latin-1") for number in (first, second)]
    drawn = [[p.key for p in distinct(load_task("arithmetic"), "train", text, 20)] for text in texts]
    assert drawn[0] != drawn[1]


def test_a_task_that_runs_out_gives_what_it_has() -> None:
    found = distinct(load_task(SUMS.name, **SUMS.params), "test", "seed", 500)
    assert 0 < len(found) < 45 and len({p.key for p in found}) == len(found)  # a tenth of 45 unordered pairs of 1 to 9
    mix = TaskMix([SUMS, TaskConfig(name="countdown")], "test", "0", repeat=False)
    names = Counter(item.task.name for item in mix.draw(0, 200))
    assert names["countdown"] == 100 and names["arithmetic"] < 45


def test_passes_go_on_for_ever_without_a_memory(file: Callable[..., TaskConfig]) -> None:
    config = file("yield from ({'prompt': str(n)} for n in range(30))")
    train = {str(n) for n in range(30) if split_of(str(n)) == "train"}
    drawn = [p.key for p in islice(passes(load_task(config.name), "train", "0"), 3 * len(train))]
    assert Counter(drawn) == dict.fromkeys(train, 3)


def test_a_task_of_more_problems_than_are_remembered_is_drawn_to_its_end() -> None:
    class Round(Task):
        @property
        def name(self) -> str:
            return "round"

        def problems(self, split: Split, seed: int) -> Iterator[Problem]:
            return (Problem(prompt="", key=str(n % 150_000)) for n in count())

    found = distinct(Round(), "train", "0", 10**9)
    assert len(found) == len({problem.key for problem in found}) == 150_000


def test_a_mix_of_nothing_is_refused() -> None:
    with pytest.raises(
        SlingshotError, match=r'tasks: at least one task is needed, for example \{name = "arithmetic"\}'
    ):
        TaskMix([], "train", "0")
