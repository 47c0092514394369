"""What is kept for a request of the forward passes themselves: the experts of its tokens, the logprobs of its prompt.

Suffixes: N tokens, V vocabulary, L MoE layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor


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
