"""What a request asks of the sampler, checked: `SamplingParams`. engine/draw.py chooses tokens by it.

params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=256, n=8, seed=0)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from slingshot.base.errors import SlingshotError

# Below this a float32 logit difference of one unit in the last place already decides: ask for 0, which says so.
MIN_TEMPERATURE = 1e-4
MOST_LOGPROBS = 1000  # alternatives of a token; each is an object of Python
_MOST = 2**31  # beyond any model and any patience
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "bool": (bool, "true or false"), "int": (Integral, "a whole number"), "float": (Real, "a number"),
    "str": (str, "a text"), "stop": (str, "strings"), "stop_token_ids": (Integral, "token ids"),
    "bad_words": ((str, list, tuple), "strings and lists of token ids"), "choice": (str, "strings"),
}  # fmt: skip
_NEEDED = {"max_tokens", "temperature", "n", "seed", "ignore_eos", "routed_experts"}  # of all others None is: off
_OPTIONAL = {"prompt_logprobs": 0, "thinking_budget": 0, "json_schema": "", "regex": "", "grammar": "",
             "structural_tag": ""}  # fmt: skip  # or None
STRUCTURES = ("json_schema", "regex", "choice", "grammar", "structural_tag")
Structure = tuple[str, Any]  # one of STRUCTURES, and its text; of a choice several


class SamplingError(SlingshotError):
    """A request that asks for what cannot be: a value out of range, parameters that contradict each other."""


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for.

    max_tokens          tokens at most, the end-of-sequence token and those that `thinking_budget` writes included
    temperature         0 is greedy
    top_p, top_k, min_p keep the whole vocabulary at 1, 0 and 0 (or None); min_p keeps tokens at least so probable
                        as that share of the likeliest one (arXiv 2407.01082)
    n                   samples of the same prompt
    stop                the text ends before the first of these strings, be it a special token's; the text of a
                        reasoning is not searched: what follows it is, its closing tag included
    stop_token_ids      ids that end a sample besides the tokenizer's own
    ignore_eos          nothing but max_tokens and stop strings end a sample, for timings
    logit_bias          {id: what its logit is raised by}; -inf forbids it
    repetition_penalty  logits of ids in prompt and sample are divided by it where positive, else multiplied
                        (arXiv 1909.05858)
    presence_penalty, frequency_penalty
                        subtracted from the logits of sampled ids: once, and for each time (OpenAI's API)
    bad_words           strings that the text will not hold, however they are spelt in tokens, and sequences of ids
    top_logprobs        how many of the likeliest tokens are told in each place, the sampled one apart
    prompt_logprobs     None: nothing is told of the prompt; 0: logprobs of its tokens; more: and of so many likeliest
    thinking_budget     tokens of reasoning at most, and up to 3 to end a character; then the sampler writes the
                        template's closing words, and the model answers
    json_schema, regex, choice, grammar (EBNF), structural_tag (xgrammar's, as JSON)
                        what the answer will be like; one of them. It binds after the reasoning
    routed_experts      whether the experts of every token are told

    Raises SamplingError for values of another kind and for impossible ones.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    thinking_budget: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    structural_tag: str | None = None
    routed_experts: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            value = field.default if value is None and field.name not in _NEEDED else value
            if value is not None or field.name in _NEEDED:
                object.__setattr__(self, field.name, _of_kind(field.name, field.default, value))
        temperature = self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < float("inf")
        told = f"from 0 to {MOST_LOGPROBS}"
        bias = all(bias < float("inf") for _, bias in self.logit_bias)  # nan is not
        swallowed = [(s, word) for s in self.stop for word in self.bad_words if isinstance(word, str) and word in s]
        structures = [name for name in STRUCTURES if getattr(self, name)]
        checks = (
            (1 <= self.max_tokens <= _MOST, f"max_tokens must be from 1 to {_MOST}, got {self.max_tokens}"),
            (1 <= self.n <= _MOST, f"n must be from 1 to {_MOST}, got {self.n}"),
            (temperature, f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (0 <= self.top_k <= _MOST, f"top_k must be from 0 (off) to {_MOST}, got {self.top_k}"),
            (0 <= self.min_p <= 1, f"min_p must be from 0 to 1, got {self.min_p}"),
            (all(self.stop), "an empty stop string would end every answer at once; remove it"),
            (bias, "logit_bias must be numbers, or -inf to forbid a token"),
            (0 < self.repetition_penalty < float("inf"),
             f"repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty}"),
            (abs(self.presence_penalty) < _MOST, f"presence_penalty {self.presence_penalty} is out of range"),
            (abs(self.frequency_penalty) < _MOST, f"frequency_penalty {self.frequency_penalty} is out of range"),
            (all(self.bad_words), "an empty bad word forbids every text; remove it"),
            (0 <= self.top_logprobs <= MOST_LOGPROBS, f"top_logprobs must be {told}, got {self.top_logprobs}"),
            (0 <= (self.prompt_logprobs or 0) <= MOST_LOGPROBS,
             f"prompt_logprobs must be {told}, got {self.prompt_logprobs}"),
            ((self.thinking_budget or 0) >= 0, f"thinking_budget must be 0 or more, got {self.thinking_budget}"),
            ("" not in [getattr(self, name) for name in STRUCTURES], "an empty structure is none; leave it out"),
            (all(self.choice), "an empty choice is none; remove it"),
            (not swallowed, "the stop string {!r} holds the bad word {!r}, so nothing could reach it; remove one"
             .format(*(swallowed or [("", "")])[0])),
            (len(structures) < 2, f"{' and '.join(structures[:2])} contradict each other; give one of them"),
            (not (structures and self.ignore_eos), "ignore_eos contradicts structured output, which ends; remove one"),
        )  # fmt: skip
        for good, message in checks:
            if not good:
                raise SamplingError(f"sampling: {message}")

    @property
    def structure(self) -> Structure | None:
        """What the answer is held to."""
        return next(((name, value) for name in STRUCTURES if (value := getattr(self, name))), None)

    @property
    def changes_logits(self) -> bool:
        """Whether anything but masks of what comes next changes a logit."""
        penalised = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalised or bool(self.logit_bias or self.bad_words)


def _of_kind(name: str, default: Any, value: Any) -> Any:
    """The value as Python's own int, float, bool, str or tuple; SamplingError where the field takes no such kind."""
    default, hint = _OPTIONAL.get(name, default), ""
    if name == "logit_bias":
        return _biases(value)
    if name == "json_schema" and isinstance(value, dict | bool):
        value = json.dumps(value)
    if isinstance(default, tuple):
        one, words = _KINDS[name]
        good = isinstance(value, list | tuple) and all(isinstance(part, one) for part in value)
        hint = f"; write ({value!r},)" if isinstance(value, str) else ""  # to Python a tuple of characters
        words = f"a tuple of {words}"
        if good and name == "bad_words":
            value = [part if isinstance(part, str) else tuple(part) for part in value]
            good = all(type(id) is int for part in value if isinstance(part, tuple) for id in part)
    else:
        one, words = _KINDS[type(default).__name__]
        good = isinstance(value, one) and isinstance(value, bool) == (one is bool)
    if not good:
        raise SamplingError(f"sampling: {name} must be {words}, got {value!r:.200}{hint}")
    return type(default)(value)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """{id: bias}, ids as numbers or, from JSON, as their digits -> pairs in the order of ids."""
    try:
        pairs = value.items() if isinstance(value, Mapping) else value
        return tuple(sorted((int(id), float(bias)) for id, bias in pairs))
    except (TypeError, ValueError, OverflowError) as error:
        wanted = "a table of token id and number"
        raise SamplingError(f"sampling: logit_bias must be {wanted}, got {value!r:.200}") from error
