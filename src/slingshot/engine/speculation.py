"""Speculation, exact: a step runs guessed tokens behind a row's last one, and what was guessed right is kept.

The token after each of them is drawn from the model's own logits with the noise of its place, as it would be without
guessing; the first that differs from its guess is the last that counts. That is rejection sampling (Leviathan et al.,
arXiv 2211.17192) for a guess that is one token, not a distribution: it is accepted with the probability that the model
gives it, and what replaces it follows the rest. More than the distribution stays: the tokens themselves do.

Guesses come from the model's own MTP module (arXiv 2412.19437, 2.2), which runs over what the step computed and draws
with the same noise, and from what followed the last `NGRAM` tokens when they stood in the sequence before.
A module that joins late (or after a cached prefix) begins at a page's border: it sees the pages from there on, at
positions counted from there, which rotary embeddings do not tell from the true ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slingshot.engine.batch import PAGE, FlatBatch, Runner, placed
from slingshot.engine.row_sampler import RowSampler
from slingshot.engine.rows import Resident
from slingshot.engine.scheduler import Step

NGRAM = 3  # tokens that must have stood there before
MOST = 4  # guesses a step and row at most
WORTH = 0.7  # how often a guess must be right that is not a row's first: it costs a pass of the module, and its own run
TRIAL = 32  # steps by which plain and guessing are compared, after as many as half of them to get going
AGAIN = 1000  # steps after which the slower of them is tried again


class NgramIndex:
    """Where in a sequence its last tokens stood before."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # where what follows an n-gram begins, the last time
        self._earlier: int | None = None

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """What followed the last NGRAM tokens of the sequence, which has grown to `tokens`; [] if they are new."""
        new = range(max(len(self._tokens), NGRAM - 1), len(tokens))
        self._tokens = tokens
        for end in new:
            key = tuple(tokens[end - NGRAM + 1 : end + 1])
            self._earlier = self._follows.get(key)
            self._follows[key] = end + 1
        return [] if self._earlier is None else tokens[self._earlier : self._earlier + count]


@dataclass
class Pace:
    """Tokens and seconds of the steps of one kind."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Payoff:
    """Whether guessing is faster, measured for each size of batch (by powers of two)."""

    def __init__(self) -> None:
        self._paces: dict[tuple[int, bool], Pace] = {}
        self._steps, self._last = 0, (0, False)

    def pays(self, rows: int) -> bool:
        """Whether the next step of so many rows is to guess."""
        size = rows.bit_length()
        plain, guessing = (self._paces.setdefault((size, kind), Pace()) for kind in (False, True))
        if min(plain.steps, guessing.steps) < TRIAL:
            return guessing.steps < TRIAL
        better = guessing.tokens * plain.seconds > plain.tokens * guessing.seconds
        self._steps += 1
        if self._steps % AGAIN == 0:
            self._paces[size, not better] = Pace()
        return better

    def note(self, rows: int, guessing: bool, tokens: int, seconds: float) -> None:
        """A step that only decoded took so long."""
        pace = self._paces.setdefault((rows.bit_length(), guessing), Pace())
        pace.steps += 1
        if pace.steps > TRIAL // 2:
            pace.tokens, pace.seconds = pace.tokens + tokens, pace.seconds + seconds


class Speculator:
    """Guesses for the rows of an engine. `mtp`: whether the model has the module, and the cache its layer.

    measured: it leaves off where it costs more than it brings; which steps guess depends on time then, tokens never.
    """

    def __init__(self, runner: Runner, sampler: RowSampler, mtp: bool, measured: bool) -> None:
        self._runner, self._sampler, self._mtp = runner, sampler, mtp
        self._payoff = Payoff() if measured else None
        self._indices: dict[Resident, NgramIndex] = {}
        self._guessing = True
        self.most = 0  # guesses of the module for a row, behind the step that was proposed for
        self._right = [1.0] * MOST  # how often the module's guesses were right lately, by their place in a step

    @property
    def needs_hidden(self) -> bool:
        """Whether `follow` needs the step's hidden states."""
        return self._mtp and self._guessing

    def learn(self, resident: Resident, drafted: int, accepted: int) -> None:
        """So many of a row's drafts turned out right. One whose turn does not come is tried again by and by."""
        if not self._mtp:
            resident.reach = min(accepted + 1, MOST) if accepted == drafted else max(1, accepted)
            return
        for place in range(1, MOST):
            if place <= accepted and place < drafted:
                self._right[place] += 0.05 * ((place < accepted) - self._right[place])
            elif place >= drafted and self._right[place] < WORTH:
                self._right[place] += 0.001

    def propose(self, residents: list[Resident]) -> bool:
        """Give the rows their `drafts` for the next step; -> whether there are any."""
        self._guessing = self._payoff is None or self._payoff.pays(len(residents))
        self._indices = {its: self._indices.get(its) or NgramIndex() for its in residents} if self._guessing else {}
        worth = next((place for place in range(1, MOST) if self._right[place] < WORTH), MOST)
        self.most = worth if self.needs_hidden else 0
        for resident in residents:
            resident.drafts = []
            sequence = resident.sequence
            if self._mtp:
                resident.reach = self.most
            count = min(resident.reach, sequence.request.limit - sequence.length - 1)
            if not self._guessing or not sequence.free or count < 1:
                continue
            resident.drafts = resident.guesses[:count]
            if len(resident.drafts) < count:
                seen = self._indices[resident].guess(sequence.request.prompt + sequence.token_ids, count)
                agree = not resident.guesses or seen[:1] == resident.guesses[:1]
                if agree and len(seen) > len(resident.drafts):
                    resident.drafts = seen
        return any(resident.drafts for resident in residents)

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """The step that was proposed for gave its rows so many tokens, and did nothing else."""
        if self._payoff is not None:
            self._payoff.note(rows, self._guessing, tokens, seconds)

    def follow(self, step: Step, batch: FlatBatch, hidden_ND: Tensor | None, residents: list[Resident]) -> None:
        """After a step and its draws: let the module follow over the tokens that count, and guess on."""
        starts, positions_N = batch.starts.tolist(), batch.positions_N.numpy()
        for resident in residents:
            resident.guesses = []
        if hidden_ND is None:
            return
        parts, rows, last = [], [], []
        places: list[int] = []
        owners = [*residents[: step.rows], *(resident for resident, _ in step.chunks)]
        for resident, start in zip(owners, starts, strict=False):
            sequence, first = resident.sequence, int(positions_N[start])
            if sequence.finish_reason is not None or not sequence.free:
                continue
            ids = resident.known + sequence.token_ids[len(resident.known) - len(sequence.request.prompt) :]
            end = min(len(ids) - 1, resident.computed if resident.row < 0 else len(ids))
            begin = first
            if resident.mtp_next != first:
                begin = -(-first // PAGE) * PAGE
                resident.mtp_page = begin // PAGE
            if begin >= end:
                continue
            resident.mtp_next = end
            parts.append(
                (ids[begin + 1 : end + 1], begin - resident.mtp_page * PAGE, resident.pages[resident.mtp_page :])
            )
            places += range(start + begin - first, start + end - first)
            if resident.row >= 0:
                rows.append(resident)
                last.append(len(places) - 1)
        if not parts:
            return
        flat = FlatBatch.of(parts, wanted=last, hidden=True)
        output = self._runner.draft(flat, _rows_of(hidden_ND, places))
        assert output.hidden_ND is not None
        self._guess_on(rows, output.logits_RV, _rows_of(output.hidden_ND, last))

    def _guess_on(self, rows: list[Resident], logits_RV: Tensor, hidden_RD: Tensor) -> None:
        """The module's tokens for these rows, each from the one before, as many as are worth it."""
        while rows:
            place = len(rows[0].guesses)
            ids, _ = self._sampler.draw(logits_RV, [its.sequence for its in rows], [place] * len(rows))
            for resident, token_id in zip(rows, ids, strict=True):
                resident.guesses.append(token_id)
            kept = [at for at, its in enumerate(rows) if place + 1 < self.most and self._has_page(its, place)]
            rows = [rows[at] for at in kept]
            if not rows:
                return
            parts = []
            for its in rows:
                position = its.mtp_next + place - its.mtp_page * PAGE
                parts.append((its.guesses[-1:], position, its.pages[its.mtp_page :]))
            output = self._runner.draft(FlatBatch.of(parts, hidden=True), _rows_of(hidden_RD, kept))
            assert output.hidden_ND is not None
            logits_RV, hidden_RD = output.logits_RV, output.hidden_ND

    @staticmethod
    def _has_page(resident: Resident, place: int) -> bool:
        return resident.mtp_next + place < len(resident.pages) * PAGE


def _rows_of(hidden_ND: Tensor, places: list[int]) -> Tensor:
    if places == list(range(len(hidden_ND))):
        return hidden_ND
    return hidden_ND.index_select(0, placed(torch.tensor(places, dtype=torch.long), hidden_ND.device))
