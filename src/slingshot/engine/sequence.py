"""A request on its way through the engine.

`Request` holds the prompt, one `Sequence` grows per sample and says when it is finished, `RequestOutput` with its
`Completion`s is what comes back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slingshot.engine.sampling import SamplingParams, noise_stream
from slingshot.text.reasoning import ends_in_reasoning, parse
from slingshot.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Completion:
    """One finished sample.

    token_ids are all sampled ids, an end-of-sequence id included, with logprobs of the same length; text leaves that id
    out and ends before a stop string. reasoning and answer are the text parted at the think tags (reasoning is None
    where there was none).
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    reasoning: str | None
    answer: str


@dataclass(frozen=True)
class RequestOutput:
    """What a request gave: one completion per sample, in sample order."""

    request_id: int
    prompt_token_ids: list[int]
    outputs: list[Completion]


class StopWatch:
    """Follows a sample's text for stop strings, which may begin and end inside tokens.

    `silent` names the tokens that add nothing to the text a reader sees: here they are written out.
    """

    def __init__(self, stop: tuple[str, ...], tokenizer: Tokenizer, silent: Mapping[int, str]) -> None:
        self._stop, self._stream, self._silent = stop, tokenizer.stream(), silent
        self._longest = max(map(len, stop))
        self._written: list[tuple[int, int]] = []  # where silent tokens stand in the text
        self.text = ""
        self.ends: list[int] = []  # how long the text was after each token
        self.cut: int | None = None  # where the first stop string begins

    def push(self, token_id: int) -> bool:
        """Take the next token; True when a stop string is complete."""
        begin = max(0, len(self.text) - self._longest + 1)
        self.text += self._stream.push(token_id)
        if name := self._silent.get(token_id):
            self._written.append((len(self.text), len(self.text) + len(name)))
            self.text += name
        self.ends.append(len(self.text))
        found = [at for at in (self.text.find(stop, begin) for stop in self._stop) if at >= 0]
        self.cut = min(found, default=None)
        return self.cut is not None

    def visible(self) -> str:
        """The text before the stop string as a reader sees it."""
        text = self.text[: self.cut]
        for start, end in reversed(self._written):
            text = text[:start] + text[end:]
        return text

    def safe_tokens(self) -> int:
        """How many tokens no stop string can reach back into any more, whatever comes next."""
        starts = (stop[:size] for stop in self._stop for size in range(1, len(stop)))
        held = max((len(start) for start in starts if self.text.endswith(start)), default=0)
        return bisect_right(self.ends, len(self.text) - held)


class Sequence:
    """One sample while it is generated."""

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.stream = noise_stream(request.params.seed, request.key, index)
        params = request.params
        self.watch = StopWatch(params.stop, request.tokenizer, request.silent) if params.stop else None
        self._ends = set() if params.ignore_eos else request.tokenizer.eos_ids | set(params.stop_token_ids)
        self._budget = request.limit - len(request.prompt)

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.request.prompt) + len(self.token_ids)

    def push(self, token_id: int, logprob: float) -> bool:
        """Take the sampled token; True when the sample ends with it."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if token_id in self._ends or (self.watch is not None and self.watch.push(token_id)):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._budget:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def visible_ids(self) -> list[int]:
        """The ids a reader sees: without the id that ended the sample, cut before a stop string.

        Where the cut falls inside a token, the part before it is encoded anew; text never encodes to control tokens, so
        tags stay what they were.
        """
        ids, tokenizer = self.token_ids, self.request.tokenizer
        if self.watch is None or self.watch.cut is None:
            return ids[:-1] if self.finish_reason == "stop" else ids
        text = self.watch.visible()
        whole = next(count for count in range(len(ids), -1, -1) if text.startswith(tokenizer.decode(ids[:count])))
        return ids[:whole] + tokenizer.encode(text[len(tokenizer.decode(ids[:whole])) :], continues=True)

    def completion(self) -> Completion:
        """What became of the sample. An unfinished one counts as aborted."""
        tokenizer, visible = self.request.tokenizer, self.visible_ids()
        text, parsed = tokenizer.decode(visible), parse(visible, self.request.opened, tokenizer)
        sampled = self.token_ids, self.logprobs, self.finish_reason or "abort"
        return Completion(text, *sampled, parsed.reasoning, parsed.answer)


class Request:
    """A prompt and its `params.n` samples, none of which may grow beyond `limit` tokens, prompt included.

    claimed: whether a caller waits for `result` itself, so that `step` does not return it.
    """

    def __init__(
        self, request_id: int, prompt: list[int], params: SamplingParams, key: str, max_length: int,
        tokenizer: Tokenizer, silent: Mapping[int, str], claimed: bool,
    ) -> None:  # fmt: skip
        self.request_id, self.prompt, self.params, self.key = request_id, prompt, params, key
        self.tokenizer, self.silent, self.claimed = tokenizer, silent, claimed
        self.result: RequestOutput | None = None
        self.limit = min(len(prompt) + params.max_tokens, max_length)
        self.opened = ends_in_reasoning(prompt, tokenizer)
        self.sequences = [Sequence(self, index) for index in range(params.n)]
        self.unfinished = params.n

    def output(self) -> RequestOutput:
        return RequestOutput(self.request_id, self.prompt, [sequence.completion() for sequence in self.sequences])
