"""How near a smaller model is to the one it was made of: what each says next, token by token, on the same texts.

    told = fidelity(full, small, batches)          # {"kl": 0.012, "kl_p99": 0.21, "same_top": 0.97, ...}

KL is of the full model to the small one, sum p (log p - log q), in nats, over the whole vocabulary, as llama.cpp's
--kl-divergence has it.

Shape suffixes: B batch, T time, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slingshot.model.transformer import Transformer
from slingshot.training.calibration import Batch

_BLOCK = 2**24  # numbers of logits at a time


@torch.no_grad()
def fidelity(full: Transformer, small: Transformer, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean of KL with its standard error, 99th percentile, share of tokens with the same most likely next token, ratio
    of perplexities."""
    kl, agreements, scores = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch in batches:
        target_N = batch[0][:, 1:][follows(batch)]
        for target_n, p_NV, q_NV in _logprobs(full, hidden(full, batch), small, hidden(small, batch), target_N):
            kl.append(_kl(p_NV, q_NV))
            agreements.append((p_NV.argmax(-1) == q_NV.argmax(-1)).float())
            scores.append(torch.stack([each.gather(1, target_n[:, None])[:, 0] for each in (p_NV, q_NV)]))
    kl_N, (of_full, of_small) = torch.cat(kl), torch.cat(scores, dim=1).mean(1).tolist()
    return {
        "kl": kl_N.mean().item(), "kl_error": kl_N.std().item() / len(kl_N) ** 0.5,
        "kl_p99": kl_N.quantile(0.99).item(), "same_top": torch.cat(agreements).mean().item(),
        "perplexity": math.exp(-of_full), "perplexity_ratio": math.exp(of_full - of_small), "tokens": float(len(kl_N)),
    }  # fmt: skip


def divergences(full: Transformer, full_ND: Tensor, small: Transformer, small_ND: Tensor) -> Tensor:
    """KL of the full model to the small one at every token, from their hidden states: [N]."""
    blocks = _logprobs(full, full_ND, small, small_ND, torch.zeros(len(full_ND)))
    return torch.cat([_kl(p_NV, q_NV) for _, p_NV, q_NV in blocks])


def hidden(model: Transformer, batch: Batch) -> Tensor:
    """Hidden states [N, D] of the tokens that another of their text follows."""
    device = model.model.embed_tokens.weight.device
    tokens_BT, segments_BT = (each.to(device) for each in batch)
    return model(tokens_BT, segments_BT=segments_BT, logits=False).hidden_BTD[:, :-1][follows(batch)]


def follows(batch: Batch) -> Tensor:
    """Which tokens [B, T - 1] another of their text follows."""
    return batch[1][:, 1:] == batch[1][:, :-1]


def _logprobs(
    full: Transformer, full_ND: Tensor, small: Transformer, small_ND: Tensor, target_N: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Targets and both models' logprobs over the vocabulary, some tokens at a time."""
    rows = max(1, _BLOCK // full.config.vocab_size)
    for target_n, p_ND, q_ND in zip(*(each.split(rows) for each in (target_N, full_ND, small_ND)), strict=True):
        yield target_n, full.lm_logits(p_ND).log_softmax(-1), small.lm_logits(q_ND).log_softmax(-1)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1).clamp_(min=0)
