"""What requests want to know of the forward passes themselves: the logprobs of their prompts, the experts of their
tokens. A sequence that gave its pages up is computed, and tells, again.

    ask(batch, step, rows)
    output = runner.forward(batch)
    tell(output, step, rows)            # before the step is committed

Suffixes: N tokens, V vocabulary, L MoE layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slingshot.engine.batch import FlatBatch, RunnerOutput

if TYPE_CHECKING:
    from slingshot.engine.rows import DecodingRows
    from slingshot.engine.scheduler import Step
    from slingshot.engine.sequence import Sequence


class ExpertRecord:
    """The experts that one token after the other went to."""

    def __init__(self) -> None:
        self._experts_NLk = torch.empty(0, 0, 0, dtype=torch.int16)

    def put(self, start: int, experts_NLk: Tensor) -> None:
        """Of the tokens from number `start` on."""
        end = start + len(experts_NLk)
        if end > len(self._experts_NLk):
            known, size = self._experts_NLk, max(end, 2 * len(self._experts_NLk))
            self._experts_NLk = torch.zeros(size, *experts_NLk.shape[1:], dtype=torch.int16)
            if len(known):
                self._experts_NLk[: len(known)] = known
        self._experts_NLk[start:end] = experts_NLk

    def first(self, count: int) -> Tensor:
        return self._experts_NLk[:count]


class PromptRecord:
    """Logprobs of a prompt's tokens at temperature 1, and of the `count` likeliest in their places. Nothing is told of
    the first token."""

    def __init__(self, prompt: Seq[int], count: int) -> None:
        self._prompt, self._count = torch.tensor(prompt), count
        self.logprobs: list[float | None] = [None] * len(prompt)
        self.top: list[dict[int, float] | None] = [None] * len(prompt)

    def put(self, start: int, logits_NV: Tensor) -> None:
        """Logits after the prompt's tokens from number `start` on; the last one's are the sample's."""
        logprobs_NV = logits_NV.log_softmax(-1)
        following = self._prompt[start + 1 : start + 1 + len(logits_NV)].to(logits_NV.device)
        places = slice(start + 1, start + 1 + len(logits_NV))
        self.logprobs[places] = logprobs_NV.gather(-1, following[:, None])[:, 0].tolist()
        if self._count:
            best = logprobs_NV.topk(min(self._count, logits_NV.shape[-1]), dim=-1)
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            self.top[places] = [dict(zip(*row, strict=True)) for row in rows]


def ask(batch: FlatBatch, step: Step, rows: DecodingRows) -> None:
    """Want what the step's requests want to know; the logits that are told of prompts come after all others."""
    batch.routing = any(sequence.request.params.routed_experts for sequence, *_ in _parts(step, rows))
    wanted = [at + place for _, _, at, size in _told_prompts(step, rows) for place in range(size)]
    batch.wanted = torch.cat((batch.wanted, torch.tensor(wanted, dtype=torch.long)))


def tell(output: RunnerOutput, step: Step, rows: DecodingRows) -> None:
    """Hand out what `ask` wanted."""
    if output.routing_NLk is not None:
        for sequence, start, at, size in _parts(step, rows):
            if sequence.request.params.routed_experts:
                sequence.take_routing(start, output.routing_NLk[at : at + size])
    told = list(_told_prompts(step, rows))
    at = len(output.logits_RV) - sum(size for *_, size in told)
    for record, start, _, size in told:
        record.put(start, output.logits_RV[at : at + size])
        at += size


def _parts(step: Step, rows: DecodingRows) -> Iterator[tuple[Sequence, int, int, int]]:
    """All tokens of a step: (sequence, position, place in the batch, how many)."""
    at = 0
    for resident in rows.residents:
        yield resident.sequence, rows.position(resident), at, 1
        at += 1 + len(resident.drafts)  # of requests that want to know nothing
    for resident, end in step.chunks:
        yield resident.sequence, resident.computed, at, end - resident.computed
        at += end - resident.computed


def _told_prompts(step: Step, rows: DecodingRows) -> Iterator[tuple[PromptRecord, int, int, int]]:
    """The tokens of prompts whose following logits are told: (record, position, place in the batch, how many)."""
    for sequence, start, at, size in _parts(step, rows):
        record, last = sequence.request.prompt_record, len(sequence.request.prompt) - 1
        if record is not None and start < last:
            yield record, start, at, min(size, last - start)
