"""What requests want to know of the forward passes themselves: the logprobs of their prompts, the experts of their
tokens. A sequence that gave its pages up is computed, and tells, again.

    ask(batch, step, rows)
    output = runner.forward(batch)
    tell(output, step, rows)            # before the step is committed

Suffixes: N tokens, V vocabulary, L MoE layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from slingshot.engine.batch import FlatBatch, RunnerOutput
from slingshot.engine.records import PromptRecord
from slingshot.engine.rows import DecodingRows
from slingshot.engine.scheduler import Step
from slingshot.engine.sequence import Sequence


def ask(batch: FlatBatch, step: Step, rows: DecodingRows) -> None:
    """Want what the step's requests want to know; the logits that are told of prompts come after all others."""
    batch.routing = any(sequence.request.routed for sequence, *_ in _parts(step, rows))
    wanted = [at + place for _, _, at, size in _told_prompts(step, rows) for place in range(size)]
    batch.wanted = torch.cat((batch.wanted, torch.tensor(wanted, dtype=torch.long)))


def tell(output: RunnerOutput, step: Step, rows: DecodingRows) -> None:
    """Hand out what `ask` wanted."""
    if output.routing_NLk is not None:
        for sequence, start, at, size in _parts(step, rows):
            if sequence.request.routed:
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
        size = 1 + len(resident.drafts)  # of those that turn out wrong the right ones' experts take the place
        yield resident.sequence, rows.position(resident), at, size
        at += size
    for resident, end in step.chunks:
        yield resident.sequence, resident.computed, at, end - resident.computed
        at += end - resident.computed


def _told_prompts(step: Step, rows: DecodingRows) -> Iterator[tuple[PromptRecord, int, int, int]]:
    """The tokens of prompts whose following logits are told: (record, position, place in the batch, how many)."""
    for sequence, start, at, size in _parts(step, rows):
        record, last = sequence.request.prompt_record, len(sequence.request.prompt) - 1
        if record is not None and start < last:
            yield record, start, at, min(size, last - start)
