"""How near a smaller model is to the one it was made of: what each says next, token by token, on the same texts.

    told = fidelity(full, small, batches)          # {"kl": 0.012, "kl_p99": 0.21, "same_top": 0.97, ...}

KL is of the full model to the small one, sum p (log p - log q), in nats, over the whole vocabulary, as llama.cpp's
--kl-divergence has it.

Shape suffixes: B batch, T time, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slingshot.model.transformer import Transformer
from slingshot.training.calibration import Batch

_BLOCK = 2**24  # numbers of logits at a time


@torch.no_grad()
def fidelity(full: Transformer, small: Transformer, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean and 99th percentile of KL, share of tokens with the same most likely next token, ratio of perplexities."""
    divergences, agreements, scores = list[Tensor](), list[Tensor](), list[Tensor]()
    for tokens_BT, segments_BT in batches:
        hidden = [model(tokens_BT, segments_BT=segments_BT, logits=False).hidden_BTD[:, :-1] for model in (full, small)]
        follows_BT = segments_BT[:, 1:] == segments_BT[:, :-1]
        targets_N = tokens_BT[:, 1:][follows_BT]
        hidden_N = [each[follows_BT] for each in hidden]
        rows = max(1, _BLOCK // full.config.vocab_size)
        for target_N, full_ND, small_ND in zip(*(each.split(rows) for each in (targets_N, *hidden_N)), strict=True):
            p_NV, q_NV = full.lm_logits(full_ND).log_softmax(-1), small.lm_logits(small_ND).log_softmax(-1)
            divergences.append((p_NV.exp() * (p_NV - q_NV)).sum(-1).clamp_(min=0))
            agreements.append((p_NV.argmax(-1) == q_NV.argmax(-1)).float())
            scores.append(torch.stack([each.gather(1, target_N[:, None])[:, 0] for each in (p_NV, q_NV)]))
    kl_N, (of_full, of_small) = torch.cat(divergences), torch.cat(scores, dim=1).mean(1).tolist()
    return {
        "kl": kl_N.mean().item(), "kl_p99": kl_N.quantile(0.99).item(), "same_top": torch.cat(agreements).mean().item(),
        "perplexity": math.exp(-of_full), "perplexity_ratio": math.exp(of_full - of_small), "tokens": float(len(kl_N)),
    }  # fmt: skip
