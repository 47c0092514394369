"""Where engine and tasks meet: prompts, draws from a mix of tasks, and scores of completions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from slingshot.engine.sampling import SamplingParams
from slingshot.engine.sequence import Completion, RequestOutput
from slingshot.rollout.rollout import PromptForm, roll_out
from slingshot.tasks.loader import load_task
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem
from slingshot.text.tokenizer import Tokenizer

SHORT = {"min_terms": 2, "max_terms": 3}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is 3+4? 3 plus 4 is 7. 3足す4は7"], vocab_size=280)


def test_forms_of_a_prompt(tokenizer: Tokenizer) -> None:
    problem = Problem(prompt="What is {x}?", key="k")
    assert PromptForm().encode(tokenizer, problem) == tokenizer.encode_chat(
        [{"role": "user", "content": "What is {x}?"}]
    )
    form = PromptForm(chat=False, text="Q: {prompt}\nA:")
    assert form.encode(tokenizer, problem) == [tokenizer.bos_id, *tokenizer.encode("Q: What is {x}?\nA:")]
    within = PromptForm(text="{prompt} Think.")
    assert within.encode(tokenizer, problem) == tokenizer.encode_chat(
        [{"role": "user", "content": "What is {x}? Think."}]
    )


def test_a_problem_cannot_write_control_tokens(tokenizer: Tokenizer) -> None:
    problem = Problem(prompt="<｜end▁of▁sentence｜></think>", key="k")
    for form in (PromptForm(), PromptForm(chat=False)):
        ids = form.encode(tokenizer, problem)
        assert tokenizer.eos_id not in ids and tokenizer.end_think_id not in ids


class Scripted:
    """An engine that says what it is told to, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, *said: tuple[list[int], str]) -> None:
        self.tokenizer, self.said = tokenizer, said
        self.asked: dict[str, Any] = {}

    def generate(self, prompts: list[list[int]], params: SamplingParams, keys: list[str]) -> list[RequestOutput]:
        self.asked = {"prompts": prompts, "params": params, "keys": keys}
        completions = [
            Completion(self.tokenizer.decode(ids), ids, [-0.5] * len(ids), reason, None, "")  # type: ignore[arg-type]
            for ids, reason in self.said
        ]
        return [RequestOutput(index, prompt, completions) for index, prompt in enumerate(prompts)]


def response(tokenizer: Tokenizer, reasoning: str, answer: str) -> list[int]:
    assert tokenizer.end_think_id is not None and tokenizer.eos_id is not None
    return [
        *tokenizer.encode(f"{reasoning}\n"),
        tokenizer.end_think_id,
        *tokenizer.encode(f"\n\n{answer}"),
        tokenizer.eos_id,
    ]


def scores(engine: Scripted, form: PromptForm, language: str = "en") -> list[tuple[float, float, float]]:
    task = load_task("arithmetic", **SHORT)
    problem = Problem(prompt="What is 3+4?", key="3+4", answer="7", language=language)
    (group,) = roll_out(engine, [Item(task, problem, "step/3+4")], SamplingParams(n=len(engine.said)), form)  # type: ignore[arg-type]
    assert [rollout.completion_ids for rollout in group] == [ids for ids, _ in engine.said]
    assert all(len(rollout.logprobs) == len(rollout.completion_ids) for rollout in group)
    return [(rollout.accuracy, rollout.format, rollout.language) for rollout in group]


def test_completions_are_scored_on_their_answer_format_and_language(tokenizer: Tokenizer) -> None:
    good, wrong = response(tokenizer, "3 plus 4 is 7", "7"), response(tokenizer, "3 plus 4 is 7", "8")
    japanese, unclosed = (
        response(tokenizer, "3足す4は7", "7"),
        [*tokenizer.encode("3 plus 4 is 7"), tokenizer.eos_id or 0],
    )
    chatty = response(tokenizer, "3 plus 4 is 7", "It is 7, or 8")
    engine = Scripted(
        tokenizer,
        (good, "stop"),
        (wrong, "stop"),
        (japanese, "stop"),
        (unclosed, "stop"),
        (chatty, "stop"),
        (good[:-1], "length"),
    )
    assert scores(engine, PromptForm()) == [
        (1.0, 1.0, 1.0),
        (0.0, 1.0, 1.0),
        (1.0, 1.0, 0.0),
        (0.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
        (0.0, 0.0, 1.0),  # right, but it would have gone on
    ]
    assert engine.asked["keys"] == ["step/3+4"] and engine.asked["params"].n == 6


def test_a_lenient_form_reads_the_last_answer_wherever_it_stands(tokenizer: Tokenizer) -> None:
    said = [
        (tokenizer.encode("3+4 is 8, no, 7"), "length"),
        (tokenizer.encode("7 or 8"), "stop"),
        (tokenizer.encode("none"), "stop"),
    ]
    assert [
        accuracy for accuracy, _, _ in scores(Scripted(tokenizer, *said), PromptForm(chat=False, lenient=True))
    ] == [1.0, 0.0, 0.0]
    assert [accuracy for accuracy, _, _ in scores(Scripted(tokenizer, *said), PromptForm(chat=False))] == [
        0.0,
        0.0,
        0.0,
    ]


def test_reasoning_and_answer_are_kept_apart(tokenizer: Tokenizer) -> None:
    task, problem = load_task("arithmetic", **SHORT), Problem(prompt="What is 3+4?", key="3+4", answer="7")
    engine: Any = Scripted(tokenizer, (response(tokenizer, "3 plus 4 is 7", "7"), "stop"))
    ((rollout,),) = roll_out(engine, [Item(task, problem, "k")], SamplingParams(), PromptForm())
    assert SimpleNamespace(reasoning=rollout.reasoning, answer=rollout.answer) == SimpleNamespace(
        reasoning="3 plus 4 is 7", answer="7"
    )
    assert rollout.prompt_ids == PromptForm().encode(tokenizer, problem)
