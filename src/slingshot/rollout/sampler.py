"""Where samples come from: the `Sampler` protocol, the engine in this process, and a sampler that says a script.

    sampler = EngineSampler(Engine.load("runs/tiny/zero"))
    for index, number, sampled in sampler.sample(prompts, [params] * len(prompts), keys): ...   # each as it finishes
    sampler.update_weights(version, model.state_dict())

rl, sample and evaluate know samplers only, so that where the tokens come from is chosen outside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, Self

import torch
from pydantic import model_validator
from torch import Tensor

from slingshot.base.config import Strict
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.sequence import Request
from slingshot.engine.sequence import Sequence as Sample
from slingshot.model.config import ModelConfig
from slingshot.model.stored import holds_stored
from slingshot.model.transformer import Transformer
from slingshot.rollout.trajectory import Sampled
from slingshot.tasks.task import Solution
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import ToolCall
from slingshot.text.turns import encode_calling
from slingshot.training.lora import adapters, twin
from slingshot.training.parallel import whole


class SamplingConfig(Strict):
    """How responses are drawn. `top_p` 1 and `top_k` 0 keep the whole vocabulary, `temperature` 0 is greedy."""

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.params(n=1, seed=0)
        return self

    def params(self, n: int, seed: int) -> SamplingParams:
        """What the engine is asked for: `n` samples of each prompt, their noise keyed by `seed`."""
        return SamplingParams(self.max_tokens, self.temperature, self.top_p, self.top_k, n, seed)


Prompts = Sequence[list[int]]
Samples = Iterator[tuple[int, int, Sampled]]


class Sampler(Protocol):
    tokenizer: Tokenizer
    model_config: ModelConfig
    max_length: int  # tokens of prompt and sample together at most

    def sample(self, prompts: Prompts, params: Sequence[SamplingParams], keys: Sequence[str]) -> Samples:
        """Yield (prompt's index, number, sample) for its params' n samples of every prompt, each as soon as it ends.

        A key names the noise of its prompt's samples: seed, key and weights make the tokens, whatever runs beside them.
        """

    def update_weights(self, version: int, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Sample with these weights from now on: a model's state dict, sharded or not. What is under way goes on so.

        Returns numbers to be logged.
        """


class EngineSampler:
    """The engine in this process."""

    def __init__(self, engine: Engine, shares: bool = False) -> None:
        """`shares`: the engine's model is the one in training, its adapters beside it."""
        self._engine, self._shares = engine, shares
        self.tokenizer, self.model_config, self.max_length = engine.tokenizer, engine.config, engine.max_length

    @classmethod
    def beside(cls, model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype, alone: bool) -> Self:
        """For a model in training: its own parameters where it is `alone` (not sharded) and in `dtype`, else a copy.

        With adapters a GPU has a copy too, where a step with the change beside each matrix would take longer. Of a base
        held as it is stored there is none: native kernels pack what it and its adapters come to, in `dtype`.
        """
        if holds_stored(model):
            model.compute_dtype = dtype
            return cls(Engine(model, tokenizer), shares=True)
        adapted = bool(adapters(model))
        alone = alone and not (adapted and model.model.embed_tokens.weight.is_cuda)
        if alone and all(parameter.dtype == dtype for parameter in model.parameters()):
            return cls(Engine(model, tokenizer), shares=True)
        return cls(Engine(twin(model) if adapted else model, tokenizer, dtype=dtype))

    def sample(self, prompts: Prompts, params: Sequence[SamplingParams], keys: Sequence[str]) -> Samples:
        """Several threads may; each step advances the samples of all."""
        engine, requests = self._engine, list[Request]()
        try:
            for asked in zip(prompts, params, keys, strict=True):
                requests.append(engine.submit(*asked))
            told = [0] * len(requests)  # of the samples that are done
            while sum(told) < sum(len(request.sequences) for request in requests):
                engine.advance()
                for index, request in enumerate(requests):
                    for sequence in request.done[told[index] :]:
                        told[index] += 1
                        yield index, request.sequences.index(sequence), _sampled(sequence)
        finally:
            for request in requests:
                if request.result is None:
                    engine.abort(request.request_id)

    def update_weights(self, version: int, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Parameters are gathered and copied one by one; those that model and engine share are there already."""
        pairs = ((name, whole(tensor)) for name, tensor in state.items())
        self._engine.update_weights(self._engine.model if self._shares else pairs, version, keep=True)
        return {}


def _sampled(sequence: Sample) -> Sampled:
    if sequence.error is not None:
        raise sequence.error
    ended = sequence.finish_reason or "abort"
    return Sampled(sequence.token_ids, sequence.logprobs, ended, sequence.routed_experts())


Script = Callable[[str, int], Solution | str]


class ScriptedSampler:
    """Says `script(key, index)` as sample `index` of the prompt `key`: a solution in R1's layout, its calls at the end
    of the response, or a plain text.

    With a sampler in `timed` it takes the time that one takes for as many tokens, which the script's then replace.
    """

    logprob = -0.5  # of every token: a text that the model might well have said

    def __init__(
        self, script: Script, tokenizer: Tokenizer, model_config: ModelConfig, timed: Sampler | None = None
    ) -> None:
        self.script, self.tokenizer, self.model_config, self._timed = script, tokenizer, model_config, timed
        self.max_length = model_config.max_position_embeddings
        self.version = -1

    def sample(self, prompts: Prompts, params: Sequence[SamplingParams], keys: Sequence[str]) -> Samples:
        said = [
            [self._say(prompt, self.script(key, index), its.max_tokens) for index in range(its.n)]
            for prompt, its, key in zip(prompts, params, keys, strict=True)
        ]
        if self._timed is None:
            for index, samples in enumerate(said):
                yield from ((index, number, sampled) for number, sampled in enumerate(samples))
            return
        longest = (max(len(sampled.ids) for sampled in samples) for samples in said)
        forced = [replace(its, max_tokens=size, ignore_eos=True) for its, size in zip(params, longest, strict=True)]
        for index, number, _ in self._timed.sample(prompts, forced, keys):
            yield index, number, said[index][number]

    def update_weights(self, version: int, state: Mapping[str, Tensor]) -> dict[str, float]:
        self.version = version
        return {} if self._timed is None else self._timed.update_weights(version, state)

    def _say(self, prompt: list[int], words: Solution | str, max_tokens: int) -> Sampled:
        if isinstance(words, Solution):
            opened = ends_in_reasoning(prompt, self.tokenizer)
            calls = [ToolCall(*call) for call in words.calls]
            ids = encode_calling(self.tokenizer, words.reasoning, words.answer, calls, opened)
        else:
            ids = [*self.tokenizer.encode(words), *sorted(self.tokenizer.eos_ids)[:1]]
        room = min(max_tokens, self.max_length - len(prompt))
        return Sampled(ids[:room], [self.logprob] * len(ids[:room]), "stop" if len(ids) <= room else "length")
