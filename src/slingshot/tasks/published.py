"""Published data sets by name: where each lies on the hub, and how its rows are read.

A row's columns, its splits and its verifier stand here as tasks/dataset.py's parameters; whoever names the set may give
others. "repo" is the repository. `PROGRAMS` are sets whose answers are programs: the task `code` judges those.
"""

from __future__ import annotations

from typing import Any

_CHOICE = "{Question}\n\n{choices}\n\nAnswer with the letter alone."
_WRONG = [f"Incorrect Answer {number}" for number in (1, 2, 3)]
_ONLY_TEST = {"test": "test"}

PUBLISHED: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "repo": "openai/gsm8k", "subset": "main", "prompt": "question", "answer": "answer",
        "pattern": r"####\s*(.+)", "verifier": "number", "splits": {"train": "train", "test": "test"},
    },
    "math-500": {
        "repo": "HuggingFaceH4/MATH-500", "prompt": "problem", "answer": "answer", "verifier": "math",
        "splits": _ONLY_TEST,
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
}  # fmt: skip

PROGRAMS = ("humaneval", "mbpp", "livecodebench")
