"""Who runs in the next step: no tensors, no tokens beyond their number.

    scheduler.add(sequence)
    step = scheduler.schedule()             # None: nothing to do
    batch = step.batch(scheduler.rows)      # after copying step.copies
    drawn = scheduler.commit(step)          # the step was run: sequences whose next token is to be drawn, in order
    scheduler.finish(resident)

Every decoding row takes one token of a step, and prompts up to `step_tokens`, first come first served, in chunks: a
long prompt never holds the rows up by more than one step. The other samples of a request wait for its first
one's prompt and share its pages; a page that several hold is copied before one of them writes to it. When pages run
out, who came last gives its own up, waits at the head of the queue and computes its tokens again. Nothing here depends
on how many wait.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count

from slingshot.engine.batch import PAGE, FlatBatch
from slingshot.engine.pages import PagePool, prefix_keys
from slingshot.engine.rows import DecodingRows, Resident
from slingshot.engine.sequence import Sequence

ALONE = 8  # times as many tokens go to prompts while no row decodes: nobody is held up
TOLD = 128  # tokens of a prompt at once whose logits are wanted, each a vocabulary of floats


@dataclass
class EngineCounters:
    """What was done since the engine was made, and what is there now.

    prefilled       tokens computed of prompts, and of samples again after a preemption
    cached          tokens of either that were found in the cache
    decoded         tokens drawn
    drafted, accepted   tokens guessed by speculation, and those that turned out right
    steps           forward passes; preemptions: sequences that had to give up their pages
    waiting, running    sequences
    pages_used, pages_kept, pages   held by sequences, kept for a later prompt, in all
    """

    prefilled: int = 0
    cached: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    preemptions: int = 0
    waiting: int = 0
    running: int = 0
    pages_used: int = 0
    pages_kept: int = 0
    pages: int = 0


@dataclass
class Step:
    """What the next forward pass runs: the decoding rows, and chunks (resident, end): its tokens up to `end`.

    told: requests are there that want to know more of it than a next token.
    """

    rows: int = 0
    chunks: list[tuple[Resident, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # pages (from, to) to copy before
    told: bool = False

    def batch(self, rows: DecodingRows) -> FlatBatch:
        """The rows, then the chunks; a chunk that completes its tokens wants the logits after it, for every sample."""
        decoding = None
        if self.rows:
            decoding = rows.guessing_batch() if rows.guessing else rows.batch()
            if not self.chunks:
                return decoding
        parts, wanted, at = [], [], 0
        for resident, end in self.chunks:
            parts.append((resident.known[resident.computed : end], resident.computed, resident.pages))
            at += end - resident.computed
            if end == len(resident.known):
                wanted += [at - 1] * (1 + len(resident.followers))
        prompts = FlatBatch.of(parts, wanted=wanted)
        return prompts if decoding is None else decoding.joined(prompts)

    def adapters(self, rows: DecodingRows) -> list[int]:
        """The number of each of the batch's sequences' adapter."""
        residents = [*rows.residents[: self.rows], *(resident for resident, _ in self.chunks)]
        return [resident.sequence.request.adapter for resident in residents]


class Scheduler:
    """Up to `max_batch` sequences at once over the pages of `pool`; `step_tokens` tokens of prompts a step."""

    def __init__(self, pool: PagePool, max_batch: int, max_length: int, step_tokens: int) -> None:
        self.pool, self.rows = pool, DecodingRows(max_batch, max_length)
        self.counters = EngineCounters(pages=pool.count)
        self._max_batch, self._step_tokens = max_batch, step_tokens
        self._waiting: deque[Sequence] = deque()
        self._residents: dict[Sequence, Resident] = {}
        self._prefilling: list[Resident] = []
        self._serials, self._telling = count(), 0  # the latter: residents that want to know more
        self._forked: list[Resident] = []  # rows that may share the page they write to next
        self._head: Resident | None = None  # the first in the queue, while it waits for pages

    def add(self, sequence: Sequence) -> None:
        """Queue up."""
        self._waiting.append(sequence)
        self.counters.waiting += 1

    def schedule(self) -> Step | None:
        """Choose the next step's work and find the pages for it."""
        step = Step()
        self._give_rows_pages(step)
        step.rows = len(self.rows)
        budget = self._step_tokens * (1 if step.rows else ALONE)
        for resident in self._prefilling:
            budget = self._chunk(step, resident, budget)
        while admitted := self._admit(budget):
            if admitted.pages:  # not a follower
                budget = self._chunk(step, admitted, budget)
        step.told = self._telling > 0
        return step if step.rows or step.chunks else None

    def lone_row(self) -> Resident | None:
        """The only sequence there is, with a page for its next token; None where anything else is to be done."""
        rows = self.rows.residents
        if len(rows) != 1 or self._waiting or self._prefilling or self._forked or self._telling:
            return None
        return rows[0] if self.pages_ahead(rows[0], 0) >= 0 else None

    def commit(self, step: Step) -> list[Resident]:
        """The step was run: who is to be given a token, in the order of the batch's `wanted`; all of them are rows."""
        counters = self.counters
        counters.steps += 1
        for resident, end in step.chunks:
            counters.prefilled += end - resident.computed
            for index in range(resident.computed // PAGE, end // PAGE):
                self.pool.register(resident.pages[index], resident.keys[index])
            resident.computed = end
            if end < len(resident.known):
                continue
            self._prefilling.remove(resident)
            samples = [resident, *resident.followers]
            resident.followers = []
            for sample in samples:
                if sample is not resident:
                    self.pool.hold(resident.pages)
                    sample.pages = list(resident.pages)
                self.rows.enter(sample, sample.known[-1], len(sample.known) - 1)
            if len(samples) > 1 and end % PAGE:
                self._forked += samples
        return self.rows.residents

    def finish(self, resident: Resident) -> None:
        """It leaves; what it computed may serve a later prompt that begins with it."""
        sequence = resident.sequence
        if resident.row >= 0:
            ids = sequence.request.prompt + sequence.token_ids
            computed = min(self.rows.position(resident), len(ids))
            known = len(resident.keys)
            after = resident.keys[-1] if known else sequence.request.salt
            keys = resident.keys + list(prefix_keys(ids[known * PAGE : computed], after))
            for page, key in zip(resident.pages, keys[: computed // PAGE], strict=False):
                self.pool.register(page, key)
            self.rows.leave(resident)
        elif resident in self._prefilling:
            self._prefilling.remove(resident)
        self.pool.release(resident.pages)
        self._telling -= sequence.request.tells
        del self._residents[sequence]

    def abort(self, sequences: list[Sequence]) -> None:
        """All samples of one request leave, those that wait too."""
        for sequence in sequences:
            resident = self._residents.get(sequence)
            if resident is not None:
                resident.followers = []
                self.finish(resident)
            elif sequence.finish_reason is None:
                sequence.finish_reason = "abort"  # passed over when its turn comes
                self.counters.waiting -= 1
        if self.idle:
            self._waiting.clear()

    def counted(self) -> EngineCounters:
        """The counters as they stand."""
        pool = self.pool
        return replace(self.counters, running=len(self._residents), pages_used=pool.used, pages_kept=pool.kept)

    @property
    def idle(self) -> bool:
        """Nobody runs or waits."""
        return not self._residents and not self.counters.waiting

    def check_idle(self) -> None:
        """Raise AssertionError where something of a request was left behind."""
        assert not self._residents and not self._prefilling and not len(self.rows) and not self.pool.used

    def _chunk(self, step: Step, resident: Resident, budget: int) -> int:
        """As much of the resident's tokens as the budget has; -> what is left of it."""
        if budget <= 0:
            return 0
        most = TOLD if resident.sequence.request.prompt_record is not None else budget
        end = min(len(resident.known), resident.computed + min(budget, most))
        step.chunks.append((resident, end))
        return budget - (end - resident.computed)

    def _admit(self, budget: int) -> Resident | None:
        """Let the next in the queue in, if a row, enough pages and, for a prompt to compute, some of the budget are
        there."""
        while self._waiting and self._waiting[0].finish_reason is not None:
            self._waiting.popleft()
        if not self._waiting or len(self._residents) >= self._max_batch:
            return None
        sequence, spare = self._waiting[0], len(self._residents)  # a page for every other one's next tokens
        leader = next((its for its in self._prefilling if its.sequence.request is sequence.request), None)
        if leader is not None and not leader.sequence.token_ids and not sequence.token_ids:
            if self.pool.available <= spare:
                return None
            resident = Resident(sequence, leader.known, leader.keys, next(self._serials))
            leader.followers.append(resident)
        elif budget <= 0:
            return None
        else:
            resident = self._head if self._head and self._head.sequence is sequence else self._resident(sequence)
            self._head, known = resident, resident.known
            if not sequence.request.told_whole:
                resident.pages = self.pool.match(resident.keys[: (len(known) - 1) // PAGE])  # the last is computed
            resident.computed = len(resident.pages) * PAGE
            missing = -(-len(known) // PAGE) - len(resident.pages)
            if self.pool.available < missing + spare:
                self.pool.release(resident.pages)
                return None
            self._head = None
            resident.pages += [page for _ in range(missing) if (page := self.pool.take()) is not None]
            self.counters.cached += resident.computed
            if not sequence.token_ids:  # not after a preemption
                sequence.request.cached, sequence.request.admitted = resident.computed, time.perf_counter()
            self._prefilling.append(resident)
        self._waiting.popleft()
        self.counters.waiting -= 1
        self._residents[sequence] = resident
        self._telling += sequence.request.tells
        return resident

    def _resident(self, sequence: Sequence) -> Resident:
        known = sequence.request.prompt + sequence.token_ids
        return Resident(sequence, known, list(prefix_keys(known, sequence.request.salt)), next(self._serials))

    def _give_rows_pages(self, step: Step) -> None:
        """A page of its own for every row's next token."""
        for resident in self.rows.short_of_pages():
            if (page := self._take(resident, step)) is not None:
                self.rows.set_page(resident, len(resident.pages), page)
        forked, self._forked = self._forked, []
        for resident in forked:
            if resident.row < 0 or not self.pool.shared(shared := resident.pages[-1]):
                continue
            if (page := self._take(resident, step)) is not None:
                step.copies.append((shared, page))
                self.rows.set_page(resident, len(resident.pages) - 1, page)
                self.pool.release([shared])
        for resident in self.rows.residents if self.rows.guessing else ():
            self.give_drafts_pages(resident)

    def give_drafts_pages(self, resident: Resident) -> None:
        """For its drafts, as many of them as there are free ones, and for what may be guessed behind them."""
        room = resident.sequence.request.limit - self.rows.position(resident) - 2
        ahead = min(2 * len(resident.drafts) + resident.reach, max(0, room))
        resident.drafts = resident.drafts[: self.pages_ahead(resident, ahead)]

    def pages_ahead(self, resident: Resident, count: int) -> int:
        """Give a row pages for its next token and `count` more, if there are free ones; -> for how many more."""
        end = self.rows.position(resident) + 1
        while (held := len(resident.pages) * PAGE) < end + count:
            if (page := self.pool.take()) is None:
                return held - end
            self.rows.set_page(resident, len(resident.pages), page)
        return count

    def _take(self, resident: Resident, step: Step) -> int | None:
        """A page for a row, if need be from who came last; None when that is the row itself."""
        while resident.row >= 0:
            if (page := self.pool.take()) is not None:
                return page
            self._preempt(max(self._residents.values(), key=lambda its: its.serial), step)
        return None

    def _preempt(self, resident: Resident, step: Step) -> None:
        """Back to the head of the queue."""
        for leader in self._prefilling:
            leader.followers = [its for its in leader.followers if its is not resident]
        step.copies = [copy for copy in step.copies if copy[1] not in resident.pages]
        self.finish(resident)
        self._waiting.appendleft(resident.sequence)
        self.counters.waiting += 1
        self.counters.preemptions += 1
