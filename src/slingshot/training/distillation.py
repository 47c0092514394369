"""Divergences between a student's and a teacher's next-token distributions, in nats: what distillation minimises.

    judged = partial(divergences, divergence="reverse", temperature=0.6)
    loss = distillation_loss(student_hidden_ND, student.head, teacher_hidden_ND, teacher.head, judged)   # of all tokens

Logits are made for `BLOCK` tokens at a time and made again in the backward pass: never [N, V] of all tokens.

Shape suffixes: N tokens, C tokens of one block, D model width, V vocabulary, K its entries kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.model.linear import Linear
from slingshot.model.recompute import recomputed

Divergence = Literal["reverse", "forward", "jsd"]
BLOCK = 256  # tokens


def divergences(
    student_CV: Tensor,
    teacher_CV: Tensor,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    top_k: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """Of each token [C], from logits: reverse KL(student | teacher), forward KL(teacher | student), or their
    generalised Jensen-Shannon divergence (arXiv 2306.13649, 2), of mixture beta teacher + (1 - beta) student.

    `top_k`: over the entries likeliest to whom the expectation is of (student for reverse, else teacher), both
    distributions renormalised there; 0 is the whole vocabulary. The teacher's logits get no gradient.
    """
    student_CV, teacher_CV = student_CV.float() / temperature, teacher_CV.detach().float() / temperature
    if 0 < top_k < student_CV.shape[-1]:
        kept_CK = (student_CV.detach() if divergence == "reverse" else teacher_CV).topk(top_k).indices
        student_CV, teacher_CV = student_CV.gather(-1, kept_CK), teacher_CV.gather(-1, kept_CK)
    student_CV, teacher_CV = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
    if divergence == "reverse":
        return _kl(student_CV, teacher_CV)
    if divergence == "forward":
        return _kl(teacher_CV, student_CV)
    shares = torch.tensor([beta, 1 - beta], device=student_CV.device).log()
    mixture_CV = torch.logaddexp(teacher_CV + shares[0], student_CV + shares[1])
    return beta * _kl(teacher_CV, mixture_CV) + (1 - beta) * _kl(student_CV, mixture_CV)


def distillation_loss(
    student_ND: Tensor,
    student_head: Linear,
    teacher_ND: Tensor,
    teacher_head: Linear,
    judged: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Sum over tokens of what `judged` makes of student's and teacher's logits, as `divergences` does, from the hidden
    states that each network's head multiplies, in their dtype."""

    def block(student_CD: Tensor, teacher_CD: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_CV = teacher_head.wide_product(teacher_CD)
        return judged(student_head.wide_product(student_CD), teacher_CV).sum()

    total = student_ND.new_zeros((), dtype=torch.float32)
    for student_CD, teacher_CD in zip(student_ND.split(BLOCK), teacher_ND.split(BLOCK), strict=True):
        total = total + recomputed(block, student_CD, teacher_CD)
    return total


def _kl(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    return F.kl_div(log_q_CV, log_p_CV, reduction="none", log_target=True).sum(-1)
