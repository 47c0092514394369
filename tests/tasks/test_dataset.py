"""The task `dataset`: files of the shapes that published sets have, their splits, and one line for each bad input."""

import json
from decimal import Decimal

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import load_task
from slingshot.tasks.mixture import distinct
from slingshot.tasks.rows import hub_rows
from slingshot.tasks.task import Reward, split_of
from slingshot.tasks.verification import VerificationPool

SUMS = [{"question": f"{n} + 1?", "answer": f"one more than {n}\n#### {n + 1}", "level": n % 3} for n in range(200)]
TRIVIA = [
    {
        "Question": f"What follows {n}?", "Correct Answer": f"number {n + 1}", "Incorrect Answer 1": f"number {n + 2}",
        "Incorrect Answer 2": f"number {n - 1}", "Incorrect Answer 3": "nothing",
    }
    for n in range(60)
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        if name.endswith(".parquet"):
            from pyarrow import Table, parquet

            parquet.write_table(Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_in_the_shape_of_a_published_set_is_split_by_key(file, name):
    task = load_task(f"dataset:{file(SUMS, name)}", like="gsm8k")
    train, test = list(task.problems("train", 0)), list(task.problems("test", 0))
    assert task.is_given and len(train) + len(test) == 200
    assert {split_of(problem.key) for problem in train} == {"train"} and len(test) > 5
    assert train != list(task.problems("train", 1)) and train == list(task.problems("train", 0))
    problem = next(problem for problem in train if problem.prompt == "40 + 1?")
    assert problem.answer == "41"
    assert task.verify(problem, "41.0") == Reward(1.0, "41.0")
    assert task.verify(problem, "It is 41.") == Reward(0.0, None)
    assert task.verify(problem, "It is 41, no, 42.", lenient=True) == Reward(0.0, "42")
    assert task.verify(problem, "4" * 10_000_000) == Reward(0.0, None)


def test_published_splits_are_kept_and_what_is_in_both_is_for_testing(file):
    params = {"source": file(SUMS), "test": file(SUMS[:30], "test.jsonl"), "like": "gsm8k"}
    task = load_task("dataset", **params)
    assert len(list(task.problems("train", 0))) == 170 and len(list(task.problems("test", 0))) == 30
    few = load_task("dataset", **params, where={"level": [1, 2]}, limit=10)
    assert len(distinct(few, "train", "x", 99)) == 10
    assert all(int(problem.prompt.split()[0]) % 3 for problem in few.problems("test", 0))
    only = load_task("dataset", source=file(TRIVIA), like="gpqa-diamond")
    assert len(list(only.problems("test", 0))) == 60
    with pytest.raises(SlingshotError, match=r"rows\.jsonl: no train problem; 60 are for test"):
        next(only.problems("train", 0))


def test_a_number_in_where_is_the_number_in_a_column_however_it_is_written(file):
    rows = [{"prompt": f"{n}?", "answer": n, "level": float(n % 3)} for n in range(60)]
    for level in (1, 1.0, "1.0", [1]):
        task = load_task(f"dataset:{file(rows)}", where={"level": level})
        assert sum(len(list(task.problems(split, 0))) for split in ("train", "test")) == 20


def test_decimals_of_a_table_are_numbers(file):
    rows = [{"prompt": f"{n}?", "answer": Decimal("1.50")} for n in range(20)]
    task = load_task(f"dataset:{file(rows, 'rows.parquet')}", verifier="number")
    assert {problem.answer for problem in task.problems("train", 0)} == {"1.50"}


def test_choices_are_shuffled_the_same_every_time_and_the_letter_is_right(file):
    source = file(TRIVIA)
    problems = list(load_task("dataset", source=source, like="gpqa-diamond").problems("test", 0))
    for problem in problems:
        asked = int(problem.prompt.split("?")[0].split()[-1])
        assert f"{problem.answer}. number {asked + 1}\n" in problem.prompt
    assert {problem.answer for problem in problems} == set("ABCD")
    other = load_task("dataset", source=source, like="gpqa-diamond", choice_seed=1)
    assert [problem.key for problem in other.problems("test", 0)] == [problem.key for problem in problems]
    assert list(other.problems("test", 0)) != problems


def test_prompts_are_made_of_columns_and_of_nothing_else(file):
    rows = [{"question": "Which {x}?", "choices": ["one", "two"], "key": 1, "why": "so", "n": n} for n in range(50)]
    form = "{n}. {question}\nOptions:\n{choices}"
    task = load_task("dataset", source=file(rows), prompt=form, answer="key", worked="why", verifier="choice")
    problem = min(task.problems("train", 0), key=lambda problem: int(problem.prompt.partition(".")[0]))
    assert (problem.prompt, problem.answer) == ("0. Which {x}?\nOptions:\nA. one\nB. two", "B")
    assert task.has_solutions and task.reasoning(problem, "steps", None) == "so"
    for form in ("{question.__class__}", "{question[0]}", "{question!r}", "{question:>99}", "{}", "{question", "quest"):
        with pytest.raises(SlingshotError, match="column"):
            load_task("dataset", source=file(rows), prompt=form, answer="key", verifier="choice")


@pytest.mark.parametrize(
    ("rows", "params", "message"),
    [
        (SUMS, {}, r"rows\.jsonl row 1 has no column 'prompt'; there are: question, answer, level"),
        (SUMS, {"prompt": "qestion"}, r"no column 'qestion'; did you mean question\?"),
        (SUMS, {"prompt": "question", "verifier": "number"}, "row 1: the answer .* is nothing for the verifier number"),
        (SUMS, {"like": "gsm8k", "pattern": "@(.*)"}, "row 1: the pattern '@.*' finds no answer in"),
        (SUMS, {"like": "gsm8k", "pattern": "("}, "is no regular expression"),
        (SUMS, {"like": "gsm8k", "where": {"level": 7}}, "no row is left of 200; look at where"),
        (SUMS, {"like": "gsm8k", "where": {"levle": 1}}, r"no column 'levle'; did you mean level\?"),
        (SUMS, {"like": "gsm8"}, r"published set 'gsm8' is unknown; did you mean gsm8k\?"),
        (SUMS, {"prompt": "question", "verifier": "maths"}, r"verifier 'maths' is unknown; did you mean math\?"),
        (SUMS, {"like": "gsm8k", "options": {"tolerence": 1}}, r"options\.tolerence: unknown key; did you mean toler"),
        ([{"prompt": "?", "answer": "x" * 10_000_000}], {}, "row 1: the answer has 10,000,000 characters; at most 100"),
        ([{"prompt": "?", "answer": None}], {}, "row 1: column answer holds None, which is no text and no number"),
        ([{"prompt": "?", "answer": "("}], {"verifier": "regex"}, "nothing for the verifier regex"),
        ([{"prompt": "?", "answer": float("nan")}], {}, "row 1: column answer holds nan, which is no text and no num"),
        ([{"prompt": "?", "answer": ["a", "b"]}], {}, "row 1: column answer holds a list, .*; an answer is one text"),
        ([{"prompt": ["x", "y"], "answer": 2}], {"verifier": "choice"}, "row 1: column answer holds 2 of 2 choices"),
        (TRIVIA, {"prompt": "Question", "wrong": ["Question"]}, "prompt 'Question' shows no choices; put {choices} w"),
        ([{"prompt": " ", "answer": "1"}], {}, "row 1: the prompt has 1 characters"),
        ([], {}, r"rows\.jsonl holds no rows"),
        ([1], {}, "row 1 is no object"),
        (SUMS, {"source": "gsm8k", "test": "x.jsonl"}, "test is a file beside a source that is one"),
        (SUMS, {"like": "mbpp"}, "row 1 has no column 'test_setup_code'"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_said_in_one_line_as_it_is_loaded(file, rows, params, message):
    with pytest.raises(SlingshotError, match=message) as caught:
        load_task("dataset", **{"source": file(rows)} | params)
    assert "\n" not in str(caught.value)


def test_sources_that_are_none_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "bad.jsonl").write_text("{")
    for source, message in {
        "gsm8": r"did you mean gsm8k\?", "missing.jsonl": r"missing\.jsonl: no such file",
        str(tmp_path / "bad.parquet"): "not a readable Parquet file", str(tmp_path / "bad.jsonl"): "line 1 is not",
    }.items():  # fmt: skip
        with pytest.raises(SlingshotError, match=message):
            load_task(f"dataset:{source}")


def test_a_pattern_that_hangs_costs_its_own_answer(file):
    rows = [{"prompt": f"{n}?", "answer": "(a+)+b"} for n in range(50)]
    task = load_task("dataset", source=file(rows), verifier="regex", timeout=2.0)
    problem = next(task.problems("train", 0))
    with VerificationPool([task], workers=1) as pool:
        hanging, quick = pool.submit(task, problem, "a" * 40), pool.submit(task, problem, "aab")
        assert hanging.result().value == 0.0 and "took longer than 2 s" in hanging.result().error
        assert quick.result() == Reward(1.0, "aab")


@pytest.mark.slow
def test_a_repository_keeps_its_splits_as_they_are_published(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repo = tmp_path / "sums"
    repo.mkdir()
    rows = [json.dumps(row) for row in SUMS]
    for split, some in {"train": rows[:150], "test": rows[150:]}.items():
        (repo / f"{split}.jsonl").write_text("\n".join(some) + "\n")
    published = hub_rows(str(repo), "", {})
    assert {split: len(some) for split, some in published.items()} == {"train": 150, "test": 50}
    assert dict(published["test"][0]) == SUMS[150]
    named = hub_rows(str(repo), "", {"test": "train"})
    assert {split: len(some) for split, some in named.items()} == {"test": 150}
    with pytest.raises(SlingshotError, match=r'cannot be read from the hub: .*Unknown split "dev"'):
        hub_rows(str(repo), "", {"train": "dev"})
    (repo / "train.jsonl").rename(repo / "validation.jsonl")
    with pytest.raises(SlingshotError, match=r"has the splits .*; say splits = \{ train = "):
        hub_rows(str(repo), "", {})
    (repo / "validation.jsonl").unlink()
    assert {split: len(some) for split, some in hub_rows(str(repo), "", {}).items()} == {"all": 50}
