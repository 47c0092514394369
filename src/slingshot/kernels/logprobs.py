"""Log-probabilities of given tokens under logits, and entropies, without a float32 copy of the logits.

Suffixes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slingshot.kernels.calls import NativeCall, native_for


def logprobs_reference(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) at this temperature, and the distribution's entropy (no gradient), both [N] in nats, float32."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logprobs_NV = (logits_NV.to(wide) / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1), entropy_N


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`logprobs_reference`; with native kernels logits are read in their own dtype, nothing else has their size."""
    native = native_for(logits_NV)
    if native is None:
        return logprobs_reference(logits_NV, targets_N, temperature)
    logprob_N, entropy_N = _Logprobs.apply(logits_NV, targets_N, 1 / temperature, native)
    return logprob_N, entropy_N


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, sharpness: float, native: NativeCall
    ) -> tuple[Tensor, Tensor]:
        logits_NV, targets_N = logits_NV.contiguous(), targets_N.contiguous()
        logprob_N, lse_N, entropy_N = (torch.empty(len(logits_NV)) for _ in range(3))
        native("logprobs_forward", logits_NV, targets_N, sharpness, *logits_NV.shape, logprob_N, lse_N, entropy_N)
        ctx.save_for_backward(logits_NV, targets_N, lse_N)
        ctx.sharpness, ctx.native = sharpness, native
        ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, targets_N, lse_N = ctx.saved_tensors
        dlogits_NV = torch.empty_like(logits_NV)
        given = logits_NV, targets_N, ctx.sharpness, lse_N, grads[0].contiguous()
        ctx.native("logprobs_backward", *given, *logits_NV.shape, dlogits_NV)
        return dlogits_NV, None, None, None
