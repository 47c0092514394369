"""A request on its way through the engine.

`Request` holds the prompt, one `Sequence` grows per sample and says when it is finished, `RequestOutput` with its
`Completion`s is what comes back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.draw import noise_stream
from slingshot.engine.guide import Guide
from slingshot.engine.logits import LogitRules
from slingshot.engine.records import ExpertRecord, PromptRecord
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.vocabulary import Vocabulary
from slingshot.text.chat_template import END_THINK
from slingshot.text.reasoning import ReasoningStream, beginning, ends_in_reasoning, parse
from slingshot.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Completion:
    """One finished sample.

    token_ids are all sampled ids, an end-of-sequence id included, with logprobs of the same length; text leaves that id
    out and ends before a stop string. reasoning and answer are the text parted at the think tags (reasoning is None
    where there was none). top_logprobs holds, where asked for, the likeliest ids of each place and their logprobs.
    routed_experts, where asked for: int16 [tokens, MoE layers, experts a token] of prompt and sample but its last
    token, which was never computed. finish_reason "error": RequestOutput.error says why it could not go on.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    reasoning: str | None
    answer: str
    top_logprobs: list[dict[int, float]] | None = None
    routed_experts: Tensor | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What a request gave: one completion per sample, in sample order.

    prompt_logprobs, prompt_top_logprobs: where asked for, of every token of the prompt at temperature 1, and the
    likeliest in its place; None for the first.
    """

    request_id: int
    prompt_token_ids: list[int]
    outputs: list[Completion]
    error: SlingshotError | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None

    @property
    def whole(self) -> list[Completion]:
        """The outputs; raises the error where one of them could not go on."""
        if self.error is not None:
            raise self.error
        return self.outputs


class StopWatch:
    """Follows a sample's text for stop strings, which may begin and end inside tokens.

    What is said in a reasoning stops nothing; its closing tag may, and what comes after it. `silent` names the tokens
    that add nothing to the text a reader sees: here they are written out.
    """

    def __init__(self, stop: tuple[str, ...], tokenizer: Tokenizer, silent: Mapping[int, str], opened: bool) -> None:
        self._stop, self._stream, self._silent = stop, tokenizer.stream(), silent
        self._longest = max(map(len, stop))
        self._parts, self._start = ReasoningStream(tokenizer, opened), 0
        self._written: list[tuple[int, int]] = []  # where silent tokens stand in the text
        self.text = ""
        self.ends: list[int] = []  # how long the text was after each token
        self.cut: int | None = None  # where the first stop string begins

    def push(self, token_id: int) -> bool:
        """Take the next token; True when a stop string is complete."""
        begin, reasoned = max(0, len(self.text) - self._longest + 1), self._reasoning
        self._parts.push(token_id)
        self.text += self._stream.push(token_id)
        if name := self._silent.get(token_id):
            self._written.append((len(self.text), len(self.text) + len(name)))
            self.text += name
        self.ends.append(len(self.text))
        if self._reasoning:
            return False
        if reasoned:
            self._start = max(0, self.text.rfind(END_THINK))
        begin = max(begin, self._start)
        found = [at for at in (self.text.find(stop, begin) for stop in self._stop) if at >= 0]
        self.cut = min(found, default=None)
        return self.cut is not None

    @property
    def _reasoning(self) -> bool:
        return self._parts.reasoned and not self._parts.closed

    def visible(self) -> str:
        """The text before the stop string as a reader sees it."""
        text = self.text[: self.cut]
        for start, end in reversed(self._written):
            text = text[:start] + text[end:]
        return text

    def safe_tokens(self) -> int:
        """How many tokens no stop string can reach back into any more, whatever comes next."""
        watched = self.text[self._start :] if not self._reasoning else ""
        held = max(beginning(watched, stop) for stop in self._stop)
        return bisect_right(self.ends, len(self.text) - held)


def visible_ids(ids: list[int], ended: bool, watch: StopWatch | None, tokenizer: Tokenizer) -> list[int]:
    """The ids a reader sees of a sample that an id or a stop string `ended`: without that id, cut before that string.

    Where the cut falls inside a token, the part before it is encoded anew; text never encodes to control tokens, so
    tags stay what they were.
    """
    if watch is None or watch.cut is None:
        return ids[:-1] if ended else ids
    text = watch.visible()
    whole = next(count for count in range(len(ids), -1, -1) if text.startswith(tokenizer.decode(ids[:count])))
    return ids[:whole] + tokenizer.encode(text[len(tokenizer.decode(ids[:whole])) :], continues=True)


class Sequence:
    """One sample while it is generated.

    rules, guide: what changes its logits and leads it, where its parameters ask for such; `free`: neither. `plain`:
    of its tokens only ids and logprobs are told besides, and it has no adapter. accepted: of a traced request, numbers
    of its tokens that speculation had guessed. error: why it cannot go on.
    """

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.finish_reason: FinishReason | None = None
        self.error: SlingshotError | None = None
        params, vocabulary = request.params, request.vocabulary
        self.stream = noise_stream(params.seed, request.key, index)
        silent, tokenizer = vocabulary.silent if params.stop else {}, vocabulary.tokenizer
        self.watch = StopWatch(params.stop, tokenizer, silent, request.opened) if params.stop else None
        self.rules = LogitRules(params, request.prompt, vocabulary, request.said) if params.changes_logits else None
        guided = params.thinking_budget is not None or request.grammar is not None
        self.guide = Guide(params, request.opened, vocabulary, request.grammar, request.prompt) if guided else None
        self.free = self.rules is None and self.guide is None
        self.plain = self.free and not params.top_logprobs and not request.adapter
        self.accepted = set[int]()
        self._ends = set() if params.ignore_eos else tokenizer.eos_ids | set(params.stop_token_ids)
        self._budget = request.limit - len(request.prompt)
        self._experts = ExpertRecord()

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.request.prompt) + len(self.token_ids)

    def push(self, token_id: int, logprob: float) -> bool:
        """Take the sampled token; True when the sample ends with it, or with the `error` instead of it."""
        if self.error is not None:
            self.finish_reason = "error"
            return True
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if token_id in self._ends or (self.watch is not None and self.watch.push(token_id)):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._budget:
            self.finish_reason = "length"
        else:
            if self.rules is not None:
                self.rules.push(token_id)
            if self.guide is not None:
                self.guide.push(token_id)
        return self.finish_reason is not None

    def take_routing(self, start: int, experts_NLk: Tensor) -> None:
        """The experts of the tokens from position `start` on; those of the prompt are all samples'."""
        prompt = len(self.request.prompt)
        if start < prompt:
            self.request.prompt_experts.put(start, experts_NLk[: prompt - start])
        if start + len(experts_NLk) > prompt:
            self._experts.put(max(0, start - prompt), experts_NLk[max(0, prompt - start) :])

    def experts_of(self, first: int, last: int) -> list[list[list[int]]]:
        """[token][MoE layer][experts]: those that made its tokens from number `first` to before `last`."""
        prompt = len(self.request.prompt)
        known = self.request.prompt_experts.first(prompt)[prompt - 1 :] if not first else None
        own = self._experts.first(last - 1)[max(0, first - 1) :]
        rows: list[list[list[int]]] = own.tolist() if known is None else known.tolist() + own.tolist()
        return rows

    def routed_experts(self) -> Tensor | None:
        """As a completion tells them."""
        if not self.request.params.routed_experts:
            return None
        prompt, sampled = self.request.prompt_experts.first(len(self.request.prompt)), len(self.token_ids)
        return torch.cat((prompt, self._experts.first(sampled - 1))) if sampled > 1 else prompt.clone()

    def visible_ids(self) -> list[int]:
        """The ids a reader sees: without the id that ended the sample, cut before a stop string."""
        return visible_ids(self.token_ids, self.finish_reason == "stop", self.watch, self.request.vocabulary.tokenizer)

    def completion(self) -> Completion:
        """What became of the sample. An unfinished one counts as aborted."""
        tokenizer, visible = self.request.vocabulary.tokenizer, self.visible_ids()
        text, parsed = tokenizer.decode(visible), parse(visible, self.request.opened, tokenizer)
        sampled = self.token_ids, self.logprobs, self.finish_reason or "abort"
        told = self.top_logprobs[: len(self.token_ids)] if self.request.params.top_logprobs else None
        return Completion(text, *sampled, parsed.reasoning, parsed.answer, told, self.routed_experts())


class Request:
    """A prompt and its `params.n` samples, none of which may grow beyond `limit` tokens, prompt included.

    claimed: whether a caller waits for `result` itself, so that `step` does not return it. salt: only requests of the
    same one share what is cached. traced: its sequences know of every sampled token the experts that made it and
    whether it was guessed. tells: more is wanted of a step than a next token; told_whole: of its prompt too, which is
    then computed, not found in the cache. done: its sequences that finished, in that order. said: how many of the
    prompt's last ids its samples said themselves, before. adapter: its number, 0 for none. cached: tokens of the prompt
    that were found in the cache. admitted: when it left the queue (time.perf_counter).
    Raises SamplingError for ids that the model does not know, GrammarError for a structure that no answer can have.
    """

    def __init__(
        self, request_id: int, prompt: list[int], params: SamplingParams, key: str, max_length: int,
        vocabulary: Vocabulary, claimed: bool, salt: bytes = b"", traced: bool = False, said: int = 0,
        grammar: xgrammar.CompiledGrammar | None = None, adapter: int = 0,
    ) -> None:  # fmt: skip
        vocabulary.check(params)
        self.request_id, self.prompt, self.params, self.key = request_id, prompt, params, key
        self.vocabulary, self.claimed, self.salt, self.traced, self.cached = vocabulary, claimed, salt, traced, 0
        self.said, self.adapter = said, adapter
        self.result: RequestOutput | None = None
        self.admitted: float | None = None
        self.limit = min(len(prompt) + params.max_tokens, max_length)
        self.opened = ends_in_reasoning(prompt, vocabulary.tokenizer)
        structure = params.structure
        self.grammar = (grammar or vocabulary.grammars.compile(structure)) if structure else None
        self.routed = params.routed_experts or traced
        self.told_whole = params.routed_experts or params.prompt_logprobs is not None
        self.tells = self.told_whole or traced
        self.prompt_record = None if params.prompt_logprobs is None else PromptRecord(prompt, params.prompt_logprobs)
        self.prompt_experts = ExpertRecord()
        self.sequences = [Sequence(self, index) for index in range(params.n)]
        self.done: list[Sequence] = []

    def output(self) -> RequestOutput:
        error = next((sequence.error for sequence in self.sequences if sequence.error), None)
        completions = [sequence.completion() for sequence in self.sequences]
        record, likeliest = self.prompt_record, bool(self.params.prompt_logprobs)
        told = (record.logprobs, record.top if likeliest else None) if record else (None, None)
        return RequestOutput(self.request_id, self.prompt, completions, error, *told)
