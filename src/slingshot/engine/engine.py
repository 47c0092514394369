"""Continuous batching over the one Transformer: token sequences in, tokens out.

    engine = Engine.load("runs/tiny/rl")
    outputs = engine.generate(["3+4=", [{"role": "user", "content": "What is 3+4?"}]], SamplingParams(n=4, seed=0))
    outputs[0].outputs[0].text / .token_ids / .logprobs / .finish_reason / .reasoning / .answer
    engine.chat("What is 3+4?").outputs[0].answer
    for kind, text in engine.stream(prompt, params): ...        # kind is "reasoning" or "answer"

Underneath, `add` queues a request, `step` advances what runs and returns the requests that finished, `abort` takes one
out; core.py has the step. Any number of threads may use one engine: they take turns to step, each step advances the
requests of all, and generate, chat and stream return their own.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Generator, Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.load_save import load_as_stored, load_tokenizer
from slingshot.engine.core import EngineCore, Native, Speculation
from slingshot.engine.kv_cache import CacheForm
from slingshot.engine.sampling import SamplingError, SamplingParams
from slingshot.engine.scheduler import EngineCounters
from slingshot.engine.sequence import Completion, Request, RequestOutput
from slingshot.engine.vocabulary import Vocabulary
from slingshot.machine.device import auto_device, named_dtype
from slingshot.model.transformer import Transformer
from slingshot.quantization.integers import WeightGrid
from slingshot.text.reasoning import Delta, Kind, ReasoningStream
from slingshot.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

    from slingshot.engine.structured import Grammars

Message = Mapping[str, str]
Prompt = str | Seq[int] | Seq[Message]


class PromptError(SlingshotError):
    """A prompt that the model cannot continue."""


class Turns:
    """A lock served about in the order in which threads come: who steps in a loop queues behind those that wait."""

    def __init__(self) -> None:
        self._first, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._first:  # only the first in the queue waits for the turn itself, so nobody can overtake it
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Engine:
    """Generates with a model and its tokenizer.

    max_batch       sequences that run together at most
    max_length      tokens of a sequence at most, prompt included; default: the model's max_position_embeddings, or as
                    many as the cache holds
    dtype           None shares the model's parameters; otherwise the engine keeps a copy in that dtype
    cache_bytes     memory of the cache at most; where sequences are long, fewer run at once
    step_tokens     tokens of prompts in a step at most, while others run: what prompts hold them up by
    speculation     "on": tokens are guessed ahead (speculation.py) and computed together; "auto": where that is faster.
                    What is sampled stays the same but for rounding; with "auto" the rounding depends on timings
    native          "auto": the compiled kernels run the network where they can, CUDA graphs on a GPU; "off": torch does
    weight_bits     8 or 4: the compiled kernels' copy of the matrices is rounded to nearest in so few bits, which needs
                    less bandwidth; an error where those kernels do not run
    grid            what the model's weights are whole numbers of (load_grid): compiled kernels keep just those numbers
    keep_model      False: nobody else uses the model, so that weights are in memory once: where compiled kernels run,
                    its matrices go as soon as they have theirs, and `model` is no more to be had
    adapters        folders of LoRA adapters of this model by name, of which requests may name one. Those run on torch's
                    path, all others where they always do; the model is kept for them
    kv_cache        "int8" or "fp8": the cache keeps 8 bits of a number, and nearly twice the tokens fit into the same
                    memory

    weights_version is what the last `update_weights` called its weights; 0 before. Raises CacheTooSmall where the cache
    cannot hold one sequence of max_length.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        max_batch: int = 256,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        cache_bytes: int = 1 << 30,
        step_tokens: int = 320,
        speculation: Speculation = "off",
        native: Native = "auto",
        weight_bits: int | None = None,
        keep_model: bool = True,
        adapters: Mapping[str, Path | str] | None = None,
        grid: WeightGrid | None = None,
        kv_cache: CacheForm = "auto",
    ) -> None:
        config = model.config
        for name, value in (("max_batch", max_batch), ("step_tokens", step_tokens)):
            if value < 1:
                raise SlingshotError(f"{name} must be at least 1, got {value}")
        longest, named = config.max_position_embeddings, "the model's max_position_embeddings"
        if max_length is not None and not 2 <= max_length <= longest:
            raise SlingshotError(f"max_length must be between 2 and {named} {longest}, got {max_length}")
        self.config, self.tokenizer, self.weights_version = config, tokenizer, 0
        if dtype is not None:  # routers stay float32, as in the trainer: both choose alike
            model = copy.deepcopy(model).requires_grad_(False)
            model.cast(dtype)
            model.compute_dtype = None
        self._vocabulary, self._model = Vocabulary(tokenizer, config.vocab_size), model
        folders = {name: locate(folder) for name, folder in (adapters or {}).items()}
        how = speculation, native, weight_bits, keep_model or bool(folders), folders, grid, kv_cache
        core = self._core = EngineCore(model, max_batch, max_length, cache_bytes, step_tokens, *how)
        self.dtype, self.device, self.max_length = core.dtype, core.device, core.max_length
        self._turns, self._ids = Turns(), itertools.count()
        self._requests: dict[int, Request] = {}
        self._updates = 0  # of weights, so far
        self._finished: list[RequestOutput] = []  # what the next `step` returns

    @classmethod
    def load(
        cls,
        path: Path | str,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        max_batch: int = 256,
        max_length: int | None = None,
        cache_bytes: int = 1 << 30,
        step_tokens: int = 320,
        speculation: Speculation = "off",
        native: Native = "auto",
        weight_bits: int | None = None,
        adapters: Mapping[str, Path | str] | None = None,
        kv_cache: CacheForm = "auto",
    ) -> Self:
        """Load a checkpoint (folder, .gguf file, hub name); "auto" takes the device and dtype that multiply fastest."""
        where = auto_device() if device == "auto" else torch.device(device)
        if isinstance(dtype, str):
            dtype = named_dtype(dtype, where)
        path = locate(path)
        (model, grid), tokenizer = load_as_stored(path, dtype=dtype, device=where), load_tokenizer(path)
        room, how = (max_batch, max_length, None, cache_bytes, step_tokens), (speculation, native, weight_bits, False)
        return cls(model, tokenizer, *room, *how, adapters, grid, kv_cache)

    def add(
        self, prompt: Prompt, params: SamplingParams | None = None, key: str | None = None, adapter: str | None = None
    ) -> int:
        """Queue a request, return its id; `step` will return it.

        prompt: text, which the model continues as it stands, token ids, or a chat (a list of messages with "role" and
        "content"), which goes through the chat template. key: names the request's noise together with params.seed;
        default: the prompt itself, so that the same request always gets the same tokens. adapter: its name, if any.
        Raises PromptError for a prompt that is empty, too long or holds ids outside the vocabulary.
        """
        return self.submit(prompt, params, key, claimed=False, adapter=adapter).request_id

    def step(self) -> list[RequestOutput]:
        """Advance what runs by one forward pass; return the requests of `add` that are finished."""
        with self._turns:
            self._advance()
            outputs, self._finished = self._finished, []
            return outputs

    @property
    def counters(self) -> EngineCounters:
        """What was done so far, and what is there now."""
        return self._core.counters

    @property
    def runs_on(self) -> str:
        """What runs the network: "torch", alone or in CUDA graphs, or native code and its level of instructions."""
        return self._core.runs_on

    @property
    def model(self) -> Transformer:
        """The model that the engine runs. Raises SlingshotError where its weights are packed for the kernels alone."""
        if not self._core.keeps_model:
            raise SlingshotError("this engine keeps its weights packed alone; load_model gives the model")
        return self._model

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def abort(self, request_id: int) -> RequestOutput | None:
        """Take a request out and return what it has so far; None if it is not here any more.

        What is unfinished of it ends with finish_reason "abort", for whoever waits for it too.
        """
        with self._turns:
            request = self._requests.pop(request_id, None)
            if request is None:
                return None
            self._core.abort(request.sequences)
            request.result = request.output()
            return request.result

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        keys: Seq[str] | None = None,
        adapters: str | Seq[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts, in order. `params` and `adapters`: one for all or one each; the rest as in `add`.

        A plain text is continued raw, without the chat template: to ask a question, give messages, or use `chat`. A
        request that could not go on, its grammar being stuck, says why in its output's `error`; the others are whole.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
        names: Seq[str | None] = [None] * len(prompts) if keys is None else keys
        beside = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else adapters
        if not len(prompts) == len(each) == len(names) == len(beside):
            counts = f"{len(each)} params, {len(names)} keys and {len(beside)} adapters"
            raise SlingshotError(f"{len(prompts)} prompts, {counts}: give one each")
        requests: list[Request] = []
        try:
            for prompt, its_params, key, adapter in zip(prompts, each, names, beside, strict=True):
                requests.append(self.submit(prompt, its_params, key, adapter=adapter))  # type: ignore[arg-type]
            for request in requests:
                while request.result is None:
                    with self._turns:
                        if request.result is None:  # not finished meanwhile
                            self._advance()
            return [request.result for request in requests if request.result]
        finally:  # nothing of an interrupted call stays behind
            for request in requests:
                self.abort(request.request_id)

    def chat(
        self, messages: str | Seq[Message], params: SamplingParams | None = None, key: str | None = None
    ) -> RequestOutput:
        """The model's reply to a question, or to a conversation of messages, in its chat template."""
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.generate([conversation], params, None if key is None else [key])[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, key: str | None = None
    ) -> Generator[Delta, None, Completion]:
        """Yield (kind, text) as one sample grows, kind "reasoning" or "answer"; the return value is the Completion.

        Text comes in whole characters and never goes beyond the start of a stop string. Closing the generator aborts
        the request. The prompt is read as in `add`.
        """
        if params is not None and params.n != 1:
            raise SlingshotError(f"a stream carries one sample, got n={params.n}; use generate")
        request = self.submit(prompt, params, key, claimed=True)
        sequence = request.sequences[0]
        parser = ReasoningStream(self.tokenizer, request.opened)
        sent: dict[Kind, str] = {"reasoning": "", "answer": ""}
        pushed = 0
        try:
            while True:
                with self._turns:
                    if request.result is None:
                        self._advance()
                    if output := request.result:
                        break
                    safe = len(sequence.token_ids) if sequence.watch is None else sequence.watch.safe_tokens()
                    fresh = sequence.token_ids[pushed:safe]
                for token_id in fresh:
                    for kind, text in parser.push(token_id):
                        sent[kind] += text
                        yield kind, text
                pushed = safe
        finally:
            self.abort(request.request_id)
        completion = output.whole[0]
        # The end was held back: where the text ends, and what its last white space belongs to, is known only now.
        for kind in sent:
            text = completion.answer if kind == "answer" else completion.reasoning or ""
            if rest := text[len(sent[kind]) :]:
                yield kind, rest
        return completion

    @torch.no_grad()
    def update_weights(
        self,
        source: Transformer | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        version: int = 0,
        keep: bool = False,
    ) -> None:
        """Take over new weights, cast to the engine's dtype: a model, its state dict, or pairs taken one by one.

        Tensors that the engine shares with the model are there already. A model or a state dict that does not fit
        changes nothing; of pairs that turn out not to fit, those before were taken.
        keep: requests in flight go on with them, after what the old weights computed, which nobody else then reuses;
        otherwise SlingshotError is raised while there are any.
        """
        with self._turns:
            if self._requests and not keep:
                raise SlingshotError(f"update_weights: {len(self._requests)} requests are in flight; abort them first")
            state = source.state_dict() if isinstance(source, Transformer) else source
            self._core.take_weights(state)
            self.weights_version = version
            self._updates += 1

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_raw(prompt)
        else:
            ids = [part for part in prompt if isinstance(part, int)]
            messages = [part for part in prompt if isinstance(part, Mapping)]
            if len(prompt) not in (len(ids), len(messages)):
                raise PromptError("a prompt is text, token ids or chat messages; several go in one list around them")
            if messages:
                ids = self.tokenizer.encode_chat(messages, add_generation_prompt=True)
        if not ids:
            raise PromptError("the prompt is empty: nothing says where to begin")
        if len(ids) >= self.max_length:
            raise PromptError(f"the prompt has {len(ids)} tokens, max_length is {self.max_length}: shorten it")
        vocabulary = self.config.vocab_size
        if beyond := [token_id for token_id in ids if not 0 <= token_id < vocabulary]:
            raise PromptError(f"the prompt holds token id {beyond[0]}, the model's vocabulary has {vocabulary}")
        return ids

    @property
    def grammars(self) -> Grammars:
        """What compiles the structures that answers are held to. SlingshotError where xgrammar is not installed."""
        return self._vocabulary.grammars

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        key: str | None = None,
        claimed: bool = True,
        salt: str = "",
        traced: bool = False,
        said: int = 0,
        grammar: xgrammar.CompiledGrammar | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Queue a request, for a caller who looks at it while it grows and drives the engine by `advance`.

        claimed: `step` does not return it. salt: its prompt shares cached prefixes with those of the same salt only.
        traced: its sequences know the experts of what they sampled (`experts_of`) and what was guessed (`accepted`).
        said: so many of the prompt's last ids are the sample's own, from before: penalties count them as such.
        grammar: what `grammars` made of the parameters; otherwise it is made now. adapter: what it caches is its own.
        """
        numbers = self._core.adapters
        if adapter is not None and adapter not in numbers:
            raise SlingshotError(f"adapter {adapter!r:.60}: this engine has {', '.join(numbers) or 'none'}")
        ids, params = self._encode(prompt), params or SamplingParams()
        if params.routed_experts and not self.config.n_moe_layers:
            raise SamplingError("sampling: routed_experts: this model has none; leave it out")
        name = ",".join(map(str, ids)) if key is None else key
        number = 0 if adapter is None else numbers[adapter]
        salted = f"{self._updates}|{number}|{salt}"
        whose = claimed, salted.encode(), traced, said, grammar, number
        request = Request(next(self._ids), ids, params, name, self.max_length, self._vocabulary, *whose)
        with self._turns:
            self._requests[request.request_id] = request
            self._core.add(request.sequences)
        return request

    def advance(self) -> None:
        """One forward pass over what runs. Results of requests are found in their `result`."""
        with self._turns:
            self._advance()

    def _advance(self) -> None:
        """One step; whoever calls has the turn."""
        for sequence in self._core.step():
            request = sequence.request
            request.done.append(sequence)
            if len(request.done) == len(request.sequences):
                request.result = self._requests.pop(request.request_id).output()
                if not request.claimed:
                    self._finished.append(request.result)
