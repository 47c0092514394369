"""A model by the name that clients call it: its prompts rendered, and what a question asks of its sampler.

model = ServedModel("tiny", tokenizer, backend)
prompt_ids = model.encode(question)
params = model.params(question, prompt_ids, most)
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.vocabulary import Vocabulary
from slingshot.recipe.origin import Origin
from slingshot.serving.backend import Backend
from slingshot.serving.call_structure import call_structure, free_text
from slingshot.serving.errors import ApiError
from slingshot.serving.exact_turns import ExactTurns
from slingshot.serving.question import Question, joined, reasoning_apart
from slingshot.serving.tools import with_arguments
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import ToolFormat, tool_format

LOW_EFFORT = 4  # the share of an answer that reasoning of low effort may take is one in so many

# Tokens around what stands before a hole and after it: DeepSeek's, Qwen's, StarCoder's (and SmolLM's).
_HOLES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


@dataclass(frozen=True)
class ServedModel:
    """created: seconds since 1970. origin: what it was trained on. runs: what runs it, for people."""

    name: str
    tokenizer: Tokenizer
    backend: Backend
    created: int = 0
    origin: Origin = field(default_factory=Origin)
    runs: str = ""
    exact_turns: ExactTurns = field(default_factory=ExactTurns, compare=False, repr=False)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.tokenizer.vocab_size)

    @cached_property
    def thinks(self) -> bool:
        """Whether its template begins an answer with reasoning, or lets the model do so."""
        try:
            asked = self.tokenizer.encode_chat([{"role": "user", "content": "?"}])
        except SlingshotError:
            return False
        return ends_in_reasoning(asked, self.tokenizer) or self.vocabulary.may_begin_reasoning

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        return tool_format(self.tokenizer)

    @property
    def card(self) -> dict[str, Any]:
        """As GET /v1/models tells of it. single_turns: a question is best asked without those before it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "slingshot",
            "max_model_len": self.backend.max_length,
            "thinks": self.thinks,
            "single_turns": self.origin.single_turns,
            "example": self.origin.example,
        }

    def encode(self, question: Question) -> list[int]:
        """The prompt's ids; ApiError 400 where the template or the tokenizer refuses it."""
        try:
            if question.messages is not None:
                return self._encode_chat(question, question.messages)
            prompt = question.prompt or ""
            if question.suffix is not None:
                return self._around_hole(prompt, question.suffix)
            return self.tokenizer.encode_raw(prompt) if isinstance(prompt, str) else list(prompt)
        except SlingshotError as error:
            raise ApiError(400, str(error), param="prompt" if question.messages is None else "messages") from error

    def params(self, question: Question, prompt_ids: Sequence[int], most: int) -> SamplingParams:
        """How each of its samples is drawn, of at most `most` tokens: its seed and its budget of reasoning decided."""
        params, budget = question.params, self._budget(question, prompt_ids, most)
        seed = params.seed if question.seeded else secrets.randbits(31)
        held = self._held_to_calls(question)
        return replace(params, n=1, stop=(), max_tokens=most, seed=seed, thinking_budget=budget, **held)

    def _budget(self, question: Question, prompt_ids: Sequence[int], most: int) -> int | None:
        """Tokens of reasoning at most."""
        budget = question.params.thinking_budget
        if question.messages is None:
            return budget
        reads_effort = "reasoning_effort" in (self.tokenizer.chat_template or "")
        if question.thinking is False:
            budget = 0
        elif budget is None and question.effort == "low" and not reads_effort:
            budget = most // LOW_EFFORT
        reasons = ends_in_reasoning(prompt_ids, self.tokenizer) or self.vocabulary.may_begin_reasoning
        if not reasons or (budget is not None and budget >= most):
            return None  # it could never count
        return budget

    def _held_to_calls(self, question: Question) -> dict[str, Any]:
        """The structure of an answer that must hold a call, or whose calls are strict."""
        must, form = question.tool_choice == "required", self.tool_format
        if form is None or not (must or (question.strict and question.tool_choice == "auto")):
            return {}
        given, source = question.params.structure or (None, "")
        if given is not None and (must or given != "json_schema"):
            wish = "tool_choice" if must else "strict"
            raise ApiError(400, f"tools: {wish} and {given} bind the same answer; leave one of them out", param="tools")
        functions = [tool["function"] for tool in question.tools]
        if must:
            functions = [its for its in functions if question.function in (None, its["name"])]
            several = question.parallel and question.function is None
            return {"structural_tag": call_structure(form, self.tokenizer, functions, several)}
        functions = [its | {"loose": its["name"] not in question.strict} for its in functions]
        if given is None:
            return {"structural_tag": free_text(form, self.tokenizer, functions)}
        text = {"type": "json_schema", "json_schema": json.loads(source)}
        tag = call_structure(form, self.tokenizer, functions, question.parallel, otherwise=text)
        return {"structural_tag": tag, "json_schema": None}

    def resumed(self, params: SamplingParams, left: int) -> SamplingParams:
        """The same for the rest of a sample whose reasoning was closed."""
        return replace(params, max_tokens=left, thinking_budget=0 if params.structure else None, prompt_logprobs=None)

    def _encode_chat(self, question: Question, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        offered = question.tools and question.tool_choice != "none"
        if offered and self.tool_format is None:
            raise SlingshotError("this model's chat template knows no tools: leave `tools` out")
        more: dict[str, Any] = {"tools": list(question.tools)} if offered else {}
        if question.thinking is not None:
            more["thinking"] = question.thinking
        if question.effort is not None:
            more["reasoning_effort"] = question.effort
        messages = with_arguments(messages, as_text=self.tool_format is not None and self.tool_format.as_text)
        if self.tokenizer.think_id is not None:
            messages = [*map(reasoning_apart, messages[:-1]), *messages[-1:]]
        late = next((place for place, its in enumerate(messages) if place and its["role"] == "system"
                     and messages[place - 1]["role"] != "system"), None)  # fmt: skip
        if late is not None:
            turns = messages[:late], messages
            before, whole = (self.tokenizer.encode_chat(its, add_generation_prompt=False, **more) for its in turns)
            if whole[: len(before)] != before:  # the template moves it to the head, before what the cache has
                messages = joined([dict(message) for message in messages])

        def rendered(count: int, answering: bool) -> list[int]:
            return self.tokenizer.encode_chat(messages[:count], add_generation_prompt=answering, **more)

        if not question.continues and (exact := self.exact_turns.prompt(question, rendered)):
            return exact
        last = messages[-1] if question.continues and messages else {}
        if reasoning := last.get("reasoning_content"):
            begun = self.tokenizer.encode_chat(messages[:-1], **more)
            return begun + self._begun_answer(begun, reasoning, last.get("content") or "")
        return self.tokenizer.encode_chat(
            messages, add_generation_prompt=not question.continues, continue_final_message=question.continues, **more
        )

    def _begun_answer(self, prompt_ids: list[int], reasoning: str, content: str) -> list[int]:
        """An answer's beginning, its reasoning included: what templates drop of earlier turns."""
        tokenizer, ids = self.tokenizer, list[int]()
        if not ends_in_reasoning(prompt_ids, tokenizer):
            if tokenizer.think_id is None:
                raise SlingshotError("this model does not reason: leave reasoning_content out of the begun answer")
            ids += [tokenizer.think_id, *tokenizer.encode("\n", continues=True)]
        ids += tokenizer.encode(reasoning, continues=True)
        if content:
            ends, leads = self.vocabulary.closing
            ids += [*ends, *leads, *tokenizer.encode(content, continues=True)]
        return ids

    def _around_hole(self, prompt: str | Sequence[int], suffix: str) -> list[int]:
        """Prefix and suffix as a model that fills holes was trained on them (arXiv 2207.14255)."""
        tokenizer = self.tokenizer
        added = {token["content"]: token["id"] for token in tokenizer.description()["added_tokens"]}
        marks = next((marks for marks in _HOLES if all(mark in added for mark in marks)), None)
        if marks is None:
            raise SlingshotError("this model has no tokens for text before and after a hole: leave `suffix` out")
        begin, hole, end = (added[mark] for mark in marks)
        before = tokenizer.encode(prompt, continues=True) if isinstance(prompt, str) else list(prompt)
        after = tokenizer.encode(suffix, continues=True)
        return [*tokenizer.begin_ids, begin, *before, hole, *after, end]


def names_of(sources: Iterable[str]) -> list[str]:
    """What checkpoints are called: the last part of each path, with as many before it as tell them apart.

    Without "/", which some clients do not take in a model's name.
    """
    paths = [Path(source).resolve().parts if Path(source).exists() else Path(source).parts for source in sources]
    if twice := next((parts for place, parts in enumerate(paths) if parts in paths[:place]), None):
        raise SlingshotError(f"{Path(*twice)} is given twice; leave one of them out")
    sizes = [1] * len(paths)
    while True:
        names = ["-".join(parts[-size:]) for parts, size in zip(paths, sizes, strict=True)]
        longer = [
            size + 1 if names.count(name) > 1 and size < len(parts) else size
            for name, parts, size in zip(names, paths, sizes, strict=True)
        ]
        if longer == sizes:
            return names
        sizes = longer
