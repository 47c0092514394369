"""docs/task.md: its task files and its recipes' lines are what they are said to be."""

import itertools
import json
import random
import re
import tomllib
from pathlib import Path

from slingshot.base.config import Strict
from slingshot.tasks.loader import TaskConfig, load_task, task_keys

PAGE, CODE = (
    (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8") for name in ("task.md", "code.md")
)


class Asked(Strict):
    tasks: list[TaskConfig]


def test_every_task_file_of_the_page_runs(tmp_path):
    files = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL)
    for name, source in files:
        (tmp_path / name).write_text(source)
    assert [name for name, _ in files] == ["capitals.py", "hidden.py"]
    capitals, hidden = (load_task(str(tmp_path / name)) for name, _ in files)
    problem = next(capitals.problems("train", 0))
    written = capitals.solution(problem, "steps", random.Random(0))
    assert capitals.verify(problem, written.answer).value == 1.0 and problem.answer in written.reasoning
    assert capitals.verify(problem, "Tokyo, Paris, Nairobi, Lima").value == 0.0

    assert hidden.has_turns
    for problem in itertools.islice(hidden.problems("train", 0), 3):
        low, high, messages = 1, 100, [{"role": "user", "content": problem.prompt}]
        while messages[-1]["role"] == "user":
            guess = (low + high) // 2
            messages.append({"role": "assistant", "content": str(guess)})
            messages += hidden.step(problem, messages) or []
            low, high = (guess + 1, high) if messages[-1]["content"] == "higher" else (low, guess - 1)
        assert hidden.verify(problem, messages[-1]["content"]).value == 1.0


def test_every_line_of_a_recipe_on_the_page_names_tasks():
    lines = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    named = [[task.name for task in Asked.parse(tomllib.loads(line)).tasks] for line in lines]
    sets = [["dataset:gsm8k"], ["dataset:sums.jsonl"], ["dataset:essays.jsonl"]]
    assert named == [["capitals.py"], ["arithmetic", "capitals.py"], *sets]


def test_every_data_set_of_the_page_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n} + 1?", "sum": n + 1, "prompt": f"Write about {n}.", "answer": ""} for n in range(50)]
    for file in ("sums.jsonl", "essays.jsonl"):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    own = [task for line in lines for task in Asked.parse(tomllib.loads(line)).tasks if task.name.endswith(".jsonl")]
    sums, essays = (load_task(task.name, **task.params) for task in own)
    problem = next(sums.problems("train", 0))
    assert (
        problem.prompt.endswith("? Answer with the number alone.") and sums.verify(problem, problem.answer).value == 1.0
    )
    assert next(essays.problems("train", 0)).prompt.startswith("Write about")


def test_problems_of_the_page_on_code_are_taken(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text("".join(re.findall(r"```jsonl\n(.*?)```", CODE, re.DOTALL)))
    load_task("code", source=str(tmp_path / "mine.jsonl"), trusted=True)
    lines = re.findall(r"```toml\n(.*?)```", CODE, re.DOTALL)
    generated, columns = (task for line in lines for task in Asked.parse(tomllib.loads(line)).tasks)
    assert load_task(generated.name, trusted=True, **generated.params).level == 2
    row = {"task": "Write f.", "checks": ["assert f(1) == 1"], "more": [], "code": "f = abs", "imports": "import math"}
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row | {"task": f"{n}"}) for n in range(50)))
    monkeypatch.chdir(tmp_path)
    problem = next(load_task(columns.name, trusted=True, **columns.params).problems("train", 0))
    assert problem.answer == "f = abs" and problem.prompt.endswith("\n\nassert f(1) == 1")
    known = {key.name for name in ("code", "code:mine.jsonl") for key in task_keys(name)}
    assert set(re.findall(r"`(\w+) = ", CODE)) <= known
