"""One step of the engine: schedule, run, draw.

    core = EngineCore(model, 256, None, cache_bytes=1 << 30, step_tokens=320, speculation="off", native="auto")
    core.add(request.sequences)
    for sequence in core.step(): ...        # those that finished with it
    core.abort(request.sequences)

The scheduler says whose tokens run and in which pages, the runner runs them, the sampler draws what follows. With
speculation a row's step takes the tokens that were guessed for it too, and keeps those that are drawn as guessed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.adapters import AdaptedModel, AdaptedRunner
from slingshot.engine.batch import PAGE, Runner
from slingshot.engine.graph_runner import GraphRunner
from slingshot.engine.kv_cache import CacheForm, CacheTooSmall, KVCache, check_form
from slingshot.engine.lone import LoneDecoder
from slingshot.engine.native_runner import NativeRunner
from slingshot.engine.pages import PagePool
from slingshot.engine.row_sampler import RowSampler, check_finite
from slingshot.engine.rows import Resident
from slingshot.engine.runner import TorchRunner
from slingshot.engine.scheduler import EngineCounters, Scheduler
from slingshot.engine.sequence import Sequence
from slingshot.engine.speculation import Speculator
from slingshot.engine.telling import ask, tell
from slingshot.kernels.native import native_kernels
from slingshot.model.transformer import Transformer
from slingshot.quantization.integers import WeightGrid

Speculation = Literal["off", "on", "auto"]
Native = Literal["off", "auto"]


class EngineCore:
    """The parameters are the Engine's. max_length None is resolved here: as many tokens as model and cache hold."""

    def __init__(
        self, model: Transformer, max_batch: int, max_length: int | None, cache_bytes: int, step_tokens: int,
        speculation: Speculation, native: Native, weight_bits: int | None = None, keep_model: bool = True,
        adapters: Mapping[str, Path] | None = None, grid: WeightGrid | None = None, kv_cache: CacheForm = "auto",
    ) -> None:  # fmt: skip
        check_form(kv_cache)
        config, weight = model.config, model.model.embed_tokens.weight
        self.dtype, self.device = dtype, device = model.compute_dtype or weight.dtype, weight.device
        mtp = speculation != "off" and config.num_nextn_predict_layers > 0
        page_bytes = KVCache.page_bytes(config, dtype, mtp, kv_cache)
        room = max(0, cache_bytes // page_bytes - 1)  # pages besides page 0
        self.max_length = max_length or min(config.max_position_embeddings, max(2, room * PAGE))
        needed = -(-self.max_length // PAGE)  # pages of one sequence
        if room < needed:
            way_out = "raise it, or lower max_length" if needed > 1 else "raise it"
            takes = f"one sequence of {self.max_length} tokens takes {(needed + 1) * page_bytes}"
            raise CacheTooSmall(f"cache_bytes {cache_bytes}: {takes}; {way_out}")
        pages = min(room, 2 * max_batch * needed)  # all sequences at their longest, and as many prefixes besides
        self._model, self._cache = model, KVCache(config, 1 + pages, dtype, device, mtp, kv_cache)
        kernels = native_kernels() if native == "auto" and device.type == "cpu" else None
        self._runner: Runner
        self.keeps_model, obstacle = True, NativeRunner.obstacle(model, self._cache)
        if kernels is not None and obstacle is None:
            self._runner = NativeRunner(model, self._cache, kernels, weight_bits, keep_model, grid)
            self.keeps_model = self._runner.keeps_model
            self.runs_on = f"native code ({', '.join(filter(None, (kernels.level, self._runner.weights)))})"
        elif weight_bits is not None:
            reason = obstacle or ("native is off" if native == "off" else "there is no native library, or it is off")
            raise SlingshotError(f"weight_bits {weight_bits}: only native code has them: {reason}; leave it out")
        elif native == "auto" and weight.is_cuda and GraphRunner.obstacle(model, self._cache) is None:
            self._runner, self.runs_on = GraphRunner(model, self._cache), "torch, in CUDA graphs"
        else:
            self._runner, self.runs_on = TorchRunner(model, self._cache), "torch"
        if kv_cache != "auto":
            self.runs_on += f", {kv_cache} cache"
        base, self.adapters = self._runner, dict[str, int]()
        if adapters:
            adapted = AdaptedModel(model, adapters)
            self._runner, self.adapters = AdaptedRunner(base, adapted, self._cache), adapted.numbers
        self._sampler = RowSampler(device, kernels)
        self._scheduler = Scheduler(PagePool(pages), max_batch, self.max_length, step_tokens)
        self._speculator: Speculator | None = None
        if speculation != "off":
            drafts = RowSampler(device, kernels, tells=False)
            self._speculator = Speculator(self._runner, drafts, mtp, measured=speculation == "auto")
        self._native = base if isinstance(base, NativeRunner) else None
        self._lone = None if self._native is None else LoneDecoder(self._native)
        # Found once: to walk through the modules takes as long as some steps.
        self._parameters = list(model.parameters()) if self.keeps_model else []
        self._versions = self._weight_versions()

    @property
    def counters(self) -> EngineCounters:
        return self._scheduler.counted()

    def add(self, sequences: list[Sequence]) -> None:
        """Queue samples of one request."""
        if self._scheduler.idle and self._versions != self._weight_versions():
            self.weights_changed()  # a trainer's, with which they are shared
        for sequence in sequences:
            self._scheduler.add(sequence)

    def abort(self, sequences: list[Sequence]) -> None:
        """All samples of one request leave, wherever they are."""
        self._scheduler.abort(sequences)

    def take_weights(self, state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Copy them into the model's own tensors, of which all have to be there in their shapes; see the Engine."""
        with nullcontext() if self._native is None else self._native.restored():
            own = self._model.state_dict()
            if isinstance(state, Mapping):
                for name, tensor in state.items():
                    _check_shape(own, name, tensor)
                _check_whole(own, state.keys())
            taken = set()
            for name, tensor in state.items() if isinstance(state, Mapping) else state:
                taken.add(name)
                _check_shape(own, name, tensor)
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
            _check_whole(own, taken)
            self.weights_changed()

    def weights_changed(self) -> None:
        """What is cached or packed belongs to the old weights."""
        self._versions = self._weight_versions()
        self._scheduler.pool.forget()
        self._runner.refresh()

    def _weight_versions(self) -> list[int]:
        """A number for every parameter that grows when it is written to; none of a model that nobody else uses."""
        return [parameter._version for parameter in self._parameters if not parameter.is_inference()]

    def step(self) -> list[Sequence]:
        """One forward pass over what is scheduled; -> the sequences that finished, in the order of their rows."""
        lone = None if self._lone is None else self._scheduler.lone_row()
        if self._lone is None or lone is None or not lone.sequence.plain:
            return self._step_together()
        return [lone.sequence] if self._step_alone(self._lone, lone) else []

    def _step_alone(self, decoder: LoneDecoder, resident: Resident) -> bool:
        """The step of a sequence that has the engine for itself; -> whether it has finished."""
        scheduler, speculator, sequence = self._scheduler, self._speculator, resident.sequence
        start, position, most = time.perf_counter(), scheduler.rows.position(resident), 0
        if speculator is not None:
            speculator.propose([resident])
            most = max(0, min(speculator.most, sequence.request.limit - position - 3))
            scheduler.give_drafts_pages(resident)
        tokens, taken = decoder.step(resident, position, scheduler.rows.table(resident), most), 0
        try:
            check_finite([logprob for _, logprob in tokens])
        except SlingshotError:
            self._cache.clear()
            raise
        done = False
        for token_id, logprob in tokens:
            done = sequence.push(token_id, logprob)
            taken += 1
            if done:
                break
        scheduler.rows.advance_one(resident, sequence.token_ids[-1], taken)
        scheduler.counters.steps += 1
        self._count(resident, taken)
        if speculator is not None:
            speculator.note(1, taken, time.perf_counter() - start)
        if done:
            scheduler.finish(resident)
            if scheduler.idle:
                scheduler.check_idle()
        return done

    def _count(self, resident: Resident, taken: int) -> None:
        """A row took so many tokens: its guesses, as many as were right, and one."""
        counters, drafts = self._scheduler.counters, len(resident.drafts)
        counters.drafted += drafts
        counters.accepted += taken - 1
        counters.decoded += taken
        if self._speculator is not None and drafts:
            self._speculator.learn(resident, drafts, taken - 1)
            sequence = resident.sequence
            if sequence.request.traced:
                sequence.accepted.update(range(len(sequence.token_ids) - taken, len(sequence.token_ids) - 1))

    @torch.inference_mode()
    def _step_together(self) -> list[Sequence]:
        scheduler, speculator = self._scheduler, self._speculator
        start = time.perf_counter()
        if speculator is not None:
            scheduler.rows.guessing = speculator.propose(scheduler.rows.residents)
        step = scheduler.schedule()
        if step is None:
            return []
        if step.copies:
            sources, targets = zip(*step.copies, strict=True)
            self._cache.copy(sources, targets)
        batch = step.batch(scheduler.rows)
        batch.hidden = speculator is not None and speculator.needs_hidden
        if self.adapters:
            batch.adapters_S = torch.tensor(step.adapters(scheduler.rows))
        if step.told:
            ask(batch, step, scheduler.rows)
        output = self._runner.forward(batch)
        if step.told:
            tell(output, step, scheduler.rows)
        drawn, before = scheduler.commit(step), scheduler.counters.decoded
        finished = self._draw(drawn, output.logits_RV)
        if speculator is not None:
            speculator.follow(step, batch, output.hidden_ND, drawn)
            if not step.chunks:
                speculator.note(step.rows, scheduler.counters.decoded - before, time.perf_counter() - start)
        for resident in finished:
            scheduler.finish(resident)
        if scheduler.idle:
            scheduler.check_idle()
        return [resident.sequence for resident in finished]

    def _draw(self, drawn: list[Resident], logits_RV: Tensor) -> list[Resident]:
        """Give every row its next token, or as many as were guessed right and one more; -> the rows that finished."""
        if not drawn:
            return []
        rows = self._scheduler.rows
        sequences = [resident.sequence for resident in drawn]
        ahead = None
        if rows.guessing:
            sequences = [its.sequence for its in drawn for _ in range(1 + len(its.drafts))]
            ahead = [place for its in drawn for place in range(1 + len(its.drafts))]
        try:
            ids, logprobs = self._sampler.draw(logits_RV[: len(sequences)], sequences, ahead)
        except SlingshotError:
            self._cache.clear()
            raise
        if not rows.guessing:
            self._scheduler.counters.decoded += len(ids)
            rows.advance(ids)
            tokens = zip(drawn, ids, logprobs, strict=True)
            return [its for its, token_id, logprob in tokens if its.sequence.push(token_id, logprob)]
        finished, at = [], 0
        for resident in drawn:
            drafts, taken, done = resident.drafts, 0, False
            while True:
                done = resident.sequence.push(ids[at + taken], logprobs[at + taken])
                taken += 1
                if done or taken > len(drafts) or drafts[taken - 1] != ids[at + taken - 1]:
                    break
            del resident.sequence.top_logprobs[len(resident.sequence.token_ids) :]  # of what was guessed wrong
            rows.advance_one(resident, ids[at + taken - 1], taken)
            self._count(resident, taken)
            at += 1 + len(drafts)
            if done:
                finished.append(resident)
        return finished


def _check_shape(own: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    if name not in own or own[name].shape != tensor.shape:
        raise SlingshotError(f"update_weights: {name} of shape {tuple(tensor.shape)} is not of this model")


def _check_whole(own: Mapping[str, Tensor], names: Set[str]) -> None:
    if missing := own.keys() - names:
        raise SlingshotError(f"update_weights: {min(missing)} is missing")
