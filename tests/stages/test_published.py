"""The published sets by name: a few rows of each, in the files, columns and configurations that its repository has.

No row is a published one; the shapes are those of the hub, read from its cache or from a folder.
"""

import json
from pathlib import Path

import pytest

from slingshot.base.files import read_json
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.rollout.sampler import ScriptedSampler
from slingshot.sandbox.program import isolation
from slingshot.stages import evaluate
from slingshot.tasks.loader import load_task
from slingshot.tasks.published import PUBLISHED
from slingshot.tasks.task import Solution
from tests.tasks.test_code_data_sets import CONTEST, HUMAN_EVAL, MBPP, SANITIZED

pytestmark = pytest.mark.slow
ASKED = [
    {"id": n, "problem": f"What is {n}?", "solution": "so", "answer": f"{n:03}", "url": "", "year": "2024"}
    for n in range(9)
]
SUMS = [{"question": f"{n} and 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(20)]
FORMULAS = [
    {
        "problem": f"Half of ${n}$?", "solution": "so", "answer": f"\\frac{{{n}}}{{2}}", "subject": "Algebra",
        "level": n % 5 + 1, "unique_id": f"test/{n}",
    }
    for n in range(9)
]  # fmt: skip
ANGLES = [
    {"problem": f"What is {n} degrees?", "answer": f"{n}^\\circ" if n % 2 else f"{n}", "id": f"{n}"} for n in range(9)
]
TRIVIA = [
    {
        "Record ID": f"rec{n}", "Question": f"What follows {n}?\n", "Correct Answer": f"{n + 1}\n",
        "Incorrect Answer 1": f"{n + 2}\n", "Incorrect Answer 2": f"{n + 3}", "Incorrect Answer 3": "no, \"nothing\"\n",
        "Explanation": "so",
    }
    for n in range(9)
]  # fmt: skip
PART = "-00000-of-00001.parquet"

# Each set's repository: its configurations, with the rows and the file of each split.
REPOSITORIES = {
    "gsm8k": (
        "openai/gsm8k",
        {
            "main": {"train": (SUMS[:15], f"main/train{PART}"), "test": (SUMS[15:], f"main/test{PART}")},
            "socratic": {"train": (SUMS, f"socratic/train{PART}"), "test": (SUMS, f"socratic/test{PART}")},
        },
    ),
    "math-500": ("HuggingFaceH4/MATH-500", {"default": {"test": (FORMULAS, "test.jsonl")}}),
    "aime24": ("HuggingFaceH4/aime_2024", {"default": {"train": (ASKED, f"data/train{PART}")}}),
    "aime25": ("math-ai/aime25", {"default": {"test": (ANGLES, "test.jsonl")}}),
    "gpqa-diamond": (
        "Idavidrein/gpqa",
        {
            "gpqa_diamond": {"train": (TRIVIA, "gpqa_diamond.csv")},
            "gpqa_main": {"train": (TRIVIA[:1], "gpqa_main.csv")},
        },
    ),
    "humaneval": (
        "openai/openai_humaneval", {"openai_humaneval": {"test": (HUMAN_EVAL, f"openai_humaneval/test{PART}")}},
    ),
    "mbpp": (
        "google-research-datasets/mbpp",
        {
            "full": {
                split: (MBPP[6 * start : 6 * start + 6], f"full/{split}{PART}")
                for start, split in enumerate(("train", "test", "validation", "prompt"))
            },
            "sanitized": {
                "train": (SANITIZED[6:9], f"sanitized/train{PART}"), "test": (SANITIZED[:6], f"sanitized/test{PART}"),
            },
        },
    ),
    "livecodebench": (
        "lighteval/code_generation_lite",
        {"v6": {"test": (CONTEST, f"v6/test{PART}")}, "v5": {"test": (CONTEST[:1], f"v5/test{PART}")}},
    ),
}  # fmt: skip
REPOSITORIES["mbpp-sanitized"] = REPOSITORIES["mbpp"]
SIZES = {"gsm8k": (15, 5), "humaneval": (0, 2), "mbpp": (6, 6), "mbpp-sanitized": (3, 6), "livecodebench": (0, 2)}


def repository(folder: Path, configurations: dict) -> None:
    """Files as they lie in a repository, and the head of its README that says which is which."""
    head = ["configs:"]
    for name, splits in configurations.items():
        head += [f"- config_name: {name}", "  data_files:"]
        for split, (rows, file) in splits.items():
            head += [f"  - split: {split}", f"    path: {file}"]
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            elif path.suffix == ".csv":
                import pandas

                pandas.DataFrame(rows).to_csv(path, index=False)
            else:
                from pyarrow import Table, parquet

                parquet.write_table(Table.from_pylist(rows), path)
    (folder / "README.md").write_text("\n".join(["---", *head, "---", "# A data set"]))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache of the hub's in tmp_path/hub, and no connection."""
    datasets, constants = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # humaneval's package is not installed
    return tmp_path / "hub"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_set_is_read_by_name_from_the_hubs_cache_and_from_a_folder(offline, base, tmp_path, name):
    repo, configurations = REPOSITORIES[name]
    cached = offline / f"datasets--{repo.replace('/', '--')}"
    repository(cached / "snapshots" / ("0" * 40), configurations)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    repository(tmp_path / "copy", configurations)
    roomy = load_model(base).config.model_copy(update={"max_position_embeddings": 8192})
    values = {"model": str(base), "dtype": "float32", "threads": 1, "samples": 2}
    for number, task in enumerate(
        ({"name": f"dataset:{name}"}, {"name": "dataset", "params": {"source": str(tmp_path / "copy"), "like": name}})
    ):
        if PUBLISHED[name]["verifier"] == "code" and isolation().missing:
            pytest.skip("this machine cannot contain programs")
        loaded, (train, test) = load_task(task["name"], **task.get("params", {})), SIZES.get(name, (0, 9))
        assert not train or len(list(loaded.problems("train", 0))) == train
        config = evaluate.EvaluateConfig.parse({**values, "tasks": [task], "sampling": {"max_tokens": 2000}})
        (items,), _ = config.draw()[0].values(), config.draw()[1]
        answers = {item.key: right(item.problem) for item in items}
        sampler = ScriptedSampler(
            lambda key, index, right=answers: Solution("so", right[key] if index else "no"), load_tokenizer(base), roomy
        )
        evaluate.run(config, tmp_path / f"evaluation{number}", sampler)
        (found,) = read_json(tmp_path / f"evaluation{number}" / "evaluation.json")["tasks"].values()
        assert (found["pass@1"], found["n"]) == (0.5, test)


def right(problem):
    """A right answer; contests come without one."""
    method = "class Solution:\n    def addUp(self, a, b): return a + b"
    return problem.answer or (method if "addUp" in problem.prompt else "print(sum(map(int, input().split())))")
