"""The next token of every row of a step, with all that its request asks for.

    sampler = RowSampler(device)
    ids, logprobs = sampler.draw(logits_RV, sequences)         # logits float32, changed in place
    for sequence, token_id, logprob in zip(sequences, ids, logprobs): sequence.push(token_id, logprob)

A row that asks for no more than temperature, top-k, top-p and min-p costs nothing beyond `sample`. Logprobs, top
logprobs too, are the model's own at the sampling temperature: before penalties, biases, masks and truncation.
Suffixes: R rows, V vocabulary, T rows that ask for more, C those of them with rules, A those that ask for K likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.batch import placed
from slingshot.engine.draw import DrawParams, sample, uniform_noise
from slingshot.engine.logits import change, forbid
from slingshot.engine.sampling import SamplingError
from slingshot.engine.sequence import Sequence
from slingshot.kernels.native import NativeKernels

KEPT = 16  # arrangements of rows
CANDIDATES = 1024  # tokens that top-k and top-p look at on a GPU; where they keep more, the row is drawn again


def check_finite(logprobs: Seq[float]) -> None:
    """Raise SlingshotError where logits gave no probability."""
    if not all(map(math.isfinite, logprobs)):
        raise SlingshotError("logits are not finite: its weights have diverged; go back to an earlier checkpoint")


class DrawnRows:
    """Rows of a step: their sequences, and what of them is needed as tensors. special: those that ask for more."""

    def __init__(self, sequences: list[Sequence], device: torch.device | str, tells: bool = True) -> None:
        self.sequences = sequences
        self.params = DrawParams.of([sequence.request.params for sequence in sequences], device)
        self.streams_R = torch.tensor([sequence.stream for sequence in sequences], dtype=torch.long)
        self.prompts_R = torch.tensor([len(sequence.request.prompt) for sequence in sequences], dtype=torch.long)
        self.special = [
            (row, its)
            for row, its in enumerate(sequences)
            if not its.free or (tells and its.request.params.top_logprobs)
        ]


class RowSampler:
    """What it keeps between steps are parameters as tensors, while the same sequences come in the same order.

    kernels: what draws on a CPU; without them torch does. candidates: as `sample` takes them; default: what suits the
    device. tells: what is drawn is the sequences' own, who are told the likeliest; else it is guesses.
    On a GPU the host waits once, for the ids, but for rows that ask for more or rows that are new.
    """

    def __init__(
        self, device: torch.device | str = "cpu", kernels: NativeKernels | None = None, candidates: int | None = None,
        tells: bool = True,
    ) -> None:  # fmt: skip
        self._device, self._kernels, self._tells = torch.device(device), kernels, tells
        suited = CANDIDATES if self._device.type == "cuda" else 0
        self._candidates = suited if candidates is None else candidates
        self._rows = DrawnRows([], device)
        self._known: dict[tuple[int, ...], DrawnRows] = {}

    def _take(self, sequences: Seq[Sequence]) -> None:
        """Speculation gives the same sequence one row and several by turns, so the last few arrangements are kept."""
        name = tuple(map(id, sequences))
        if name not in self._known:
            if len(self._known) == KEPT:
                self._known.clear()
            self._known[name] = DrawnRows(list(sequences), self._device, self._tells)
        self._rows = self._known[name]

    def draw(
        self, logits_RV: Tensor, sequences: Seq[Sequence], ahead: Seq[int] | None = None
    ) -> tuple[list[int], list[float]]:
        """Ids and logprobs, one a row. A sequence that cannot go on gets its `error` instead.

        ahead: how many tokens after the sequence's next one a row's is; a sequence may then have several rows.
        """
        if self._rows.sequences != sequences:
            self._take(sequences)
        positions_R = self._rows.prompts_R + torch.tensor([len(sequence.token_ids) for sequence in sequences])
        if ahead is not None:
            positions_R += torch.tensor(ahead)
        uniform_R = placed(uniform_noise(self._rows.streams_R, positions_R), self._device)
        if self._rows.special:
            own = OwnLogprobs(logits_RV, self._rows.special, self._rows.params.divisor_B1)
            self._change(logits_RV)
            ids_R, logprobs_R = sample(logits_RV, self._rows.params, uniform_R, self._kernels)
            self._force(ids_R)
            own.tell(logits_RV, ids_R, logprobs_R)
        else:
            ids_R, logprobs_R = sample(logits_RV, self._rows.params, uniform_R, self._kernels, self._candidates)
        ids, logprobs = _told(ids_R, logprobs_R)
        if self._candidates and not self._rows.special and not all(map(math.isfinite, logprobs)):
            ids, logprobs = _told(*sample(logits_RV, self._rows.params, uniform_R, self._kernels))
        check_finite(logprobs)
        return ids, logprobs

    def _change(self, logits_RV: Tensor) -> None:
        ruled = [(row, sequence.rules) for row, sequence in self._rows.special if sequence.rules is not None]
        if ruled:
            change(logits_RV, ruled)
        guided = [(row, sequence, sequence.guide) for row, sequence in self._rows.special if sequence.guide is not None]
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
            if guide.slow:
                sequence.error = SamplingError("the grammar takes too long to be followed; make it simpler")
            elif nothing or guide.failed:
                sequence.error = SamplingError("no token can follow: the grammar and what is forbidden leave none")
            if sequence.error is not None:
                logits_RV[row] = 0.0

    def _force(self, ids_R: Tensor) -> None:
        for row, sequence in self._rows.special:
            if sequence.guide is not None and sequence.guide.forced:
                ids_R[row] = sequence.guide.forced[0]


def _told(ids_R: Tensor, logprobs_R: Tensor) -> tuple[list[int], list[float]]:
    """To the host: from a GPU in one piece, for which it waits."""
    if ids_R.device.type == "cpu":
        return ids_R.tolist(), logprobs_R.tolist()
    ids, logprobs = torch.stack((ids_R.double(), logprobs_R.double())).tolist()
    return [int(id) for id in ids], logprobs


class OwnLogprobs:
    """The model's own logprobs of some rows, kept while their logits are changed.

    Penalties and biases move the logit that is drawn; masks and what is forbidden only take others out. So the rows
    with rules are kept whole, and of the others the logarithm of their sum.
    """

    def __init__(self, logits_RV: Tensor, special: Seq[tuple[int, Sequence]], divisor_R1: Tensor) -> None:
        rows = [row for row, _ in special]
        self._rows_T = torch.tensor(rows, device=logits_RV.device)
        self._divisor_T = divisor_R1[self._rows_T, 0]
        of_rows_TV = logits_RV if len(rows) == len(logits_RV) else logits_RV[self._rows_T]
        self._log_total_T = (of_rows_TV / self._divisor_T[:, None]).logsumexp(-1)
        self._ruled_C = torch.tensor([sequence.rules is not None for _, sequence in special]).nonzero()[:, 0]
        self._ruled_CV = logits_RV[[rows[place] for place in self._ruled_C.tolist()]]
        self._asking = [(place, its) for place, (_, its) in enumerate(special) if its.request.params.top_logprobs]
        if self._asking:
            places = [place for place, _ in self._asking]
            most = max(sequence.request.params.top_logprobs for _, sequence in self._asking)
            asked_AV = logits_RV[[rows[place] for place in places]]
            best, self._ids_AK = asked_AV.topk(min(most, logits_RV.shape[-1]), dim=-1)
            self._best_AK = best / self._divisor_T[places, None] - self._log_total_T[places, None]

    def tell(self, logits_RV: Tensor, ids_R: Tensor, logprobs_R: Tensor) -> None:
        """Put the drawn ids' own logprobs in their places, and hand out the likeliest where they are asked for."""
        ids_T = ids_R[self._rows_T]
        logits_T = logits_RV[self._rows_T, ids_T]
        if len(self._ruled_C):
            logits_T[self._ruled_C] = self._ruled_CV.gather(-1, ids_T[self._ruled_C, None])[:, 0]
        logprobs_R[self._rows_T] = logits_T / self._divisor_T - self._log_total_T
        if self._asking:
            for (_, sequence), *told in zip(self._asking, self._ids_AK.tolist(), self._best_AK.tolist(), strict=True):
                ids, logprobs = (each[: sequence.request.params.top_logprobs] for each in told)
                sequence.top_logprobs.append(dict(zip(ids, logprobs, strict=True)))
