"""Where engine and tasks meet: problems in, verified and scored completions out. Used by rl, sample and evaluate.

items = TaskMix([TaskConfig(name="arithmetic")], "train", seed="0").draw(0, 16)
groups = roll_out(engine, items, SamplingParams(n=16), PromptForm())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slingshot.base.config import Strict
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.rollout.reward import format_reward, language_consistency
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem, Task
from slingshot.text.reasoning import ends_in_reasoning, parse
from slingshot.text.tokenizer import Tokenizer


class PromptForm(Strict):
    """How a problem is put to a model: in its chat template, or as plain text to be continued; `text` holds {prompt}.

    `lenient` takes the last answer-like thing anywhere in the response, for models that know no format.
    """

    name: str = "chat"
    chat: bool = True
    text: str = "{prompt}"
    lenient: bool = False

    def encode(self, tokenizer: Tokenizer, problem: Problem) -> list[int]:
        text = self.text.replace("{prompt}", problem.prompt)
        if self.chat:
            return tokenizer.encode_chat([{"role": "user", "content": text}])
        return tokenizer.encode_raw(text)


@dataclass
class Rollout:
    """One completion with what training needs of it per token, and its scores in [0, 1]."""

    task: Task
    problem: Problem
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]  # the sampler's, at the sampling temperature
    reasoning: str
    answer: str
    accuracy: float
    format: float
    language: float
    reward: float = 0.0
    advantage: float = 0.0


def roll_out(engine: Engine, items: Sequence[Item], params: SamplingParams, form: PromptForm) -> list[list[Rollout]]:
    """`params.n` verified completions of every problem, grouped by problem."""
    tokenizer = engine.tokenizer
    prompts = [form.encode(tokenizer, item.problem) for item in items]
    outputs = engine.generate(prompts, params, keys=[item.key for item in items])
    groups = []
    for item, output in zip(items, outputs, strict=True):
        opened = ends_in_reasoning(output.prompt_token_ids, tokenizer)
        group = []
        for completion in output.outputs:
            parsed = parse(completion.token_ids, opened, tokenizer)
            finished = completion.finish_reason == "stop"
            read = completion.text if form.lenient else parsed.answer
            accuracy = (
                item.task.verify(item.problem, read, lenient=form.lenient).value if finished or form.lenient else 0.0
            )
            group.append(
                Rollout(
                    task=item.task,
                    problem=item.problem,
                    prompt_ids=output.prompt_token_ids,
                    completion_ids=completion.token_ids,
                    logprobs=completion.logprobs,
                    reasoning=parsed.reasoning or "",
                    answer=parsed.answer,
                    accuracy=accuracy,
                    format=format_reward(parsed.closed, parsed.answer, finished),
                    language=language_consistency(parsed.reasoning or parsed.answer, item.problem.language),
                )
            )
        groups.append(group)
    return groups
