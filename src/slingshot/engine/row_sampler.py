"""The next token of every row of a step, with all that its request asks for.

    sampler = RowSampler(device)
    ids, logprobs = sampler.draw(logits_RV, sequences)         # logits float32, changed in place
    for sequence, token_id, logprob in zip(sequences, ids, logprobs): sequence.push(token_id, logprob)

A row that asks for no more than temperature, top-k, top-p and min-p costs nothing beyond `sample`. Logprobs, top
logprobs too, are the model's own at the sampling temperature: before penalties, biases, masks and truncation.
Suffixes: R rows, V vocabulary, T rows of which more is told.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.draw import DrawParams, sample, uniform_noise
from slingshot.engine.logits import change, forbid
from slingshot.engine.sampling import SamplingError
from slingshot.engine.sequence import Sequence


class RowSampler:
    """What it keeps between steps are parameters as tensors, while the same sequences come in the same order."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._sequences: list[Sequence] = []
        self._special: list[tuple[int, Sequence]] = []
        self._take([])

    def _take(self, sequences: Seq[Sequence]) -> None:
        self._sequences = list(sequences)
        self._params = DrawParams.of([sequence.request.params for sequence in sequences], self._device)
        self._streams_R = torch.tensor([sequence.stream for sequence in sequences], device=self._device)
        self._special = [(row, sequence) for row, sequence in enumerate(sequences) if not sequence.plain]

    def draw(self, logits_RV: Tensor, sequences: Seq[Sequence]) -> tuple[list[int], list[float]]:
        """Ids and logprobs, one a row. A sequence that cannot go on gets its `error` instead."""
        if self._sequences != sequences:
            self._take(sequences)
        positions_R = torch.tensor([sequence.length for sequence in sequences], device=self._device)
        uniform_R = uniform_noise(self._streams_R, positions_R)
        if not self._special:
            ids_R, logprobs_R = sample(logits_RV, self._params, uniform_R)
        else:
            rows_T, told_TV = self._own_logprobs(logits_RV)
            self._change(logits_RV)
            ids_R, logprobs_R = sample(logits_RV, self._params, uniform_R)
            self._force(ids_R)
            logprobs_R[rows_T] = told_TV.gather(-1, ids_R[rows_T][:, None])[:, 0]
            self._tell(told_TV)
        if not torch.isfinite(logprobs_R).all():
            raise SlingshotError("logits are not finite: its weights have diverged; go back to an earlier checkpoint")
        return ids_R.tolist(), logprobs_R.tolist()

    def _own_logprobs(self, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        """Logprobs of the special rows before anything is changed: their places, (T, V)."""
        rows_T = torch.tensor([row for row, _ in self._special], device=logits_RV.device)
        return rows_T, (logits_RV[rows_T] / self._params.divisor_B1[rows_T]).log_softmax(-1)

    def _change(self, logits_RV: Tensor) -> None:
        ruled = [(row, sequence.rules) for row, sequence in self._special if sequence.rules is not None]
        if ruled:
            change(logits_RV, ruled)
        guided = [(row, sequence, sequence.guide) for row, sequence in self._special if sequence.guide is not None]
        if not guided:
            return
        forbid(logits_RV, [(row, guide.banned()) for row, _, guide in guided])
        for row, _, guide in guided:
            if allowed := guide.allowed():
                kept = logits_RV[row, list(allowed)]
                logits_RV[row] = -torch.inf
                logits_RV[row, list(allowed)] = kept
        if masks := [(row, mask) for row, _, guide in guided if (mask := guide.mask()) is not None]:
            from slingshot.engine.structured import allow_only

            allow_only(logits_RV, masks)
        dead = logits_RV[[row for row, _, _ in guided]].amax(-1) == -torch.inf
        for (row, sequence, guide), nothing in zip(guided, dead.tolist(), strict=True):
            if nothing or guide.failed:
                sequence.error = SamplingError("no token can follow: the grammar and what is forbidden leave none")
                logits_RV[row] = 0.0

    def _force(self, ids_R: Tensor) -> None:
        for row, sequence in self._special:
            if sequence.guide is not None and sequence.guide.forced:
                ids_R[row] = sequence.guide.forced[0]

    def _tell(self, told_TV: Tensor) -> None:
        """Hand out the likeliest tokens where they are asked for."""
        asking = [(place, its) for place, (_, its) in enumerate(self._special) if its.request.params.top_logprobs]
        if not asking:
            return
        most = max(sequence.request.params.top_logprobs for _, sequence in asking)
        best = told_TV[[place for place, _ in asking]].topk(min(most, told_TV.shape[-1]), dim=-1)
        for (_, sequence), ids, logprobs in zip(asking, best.indices.tolist(), best.values.tolist(), strict=True):
            count = sequence.request.params.top_logprobs
            sequence.top_logprobs.append(dict(zip(ids[:count], logprobs[:count], strict=True)))
