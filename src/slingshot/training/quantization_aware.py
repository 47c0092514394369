"""Quantisation-aware distillation: the scales of a quantised model are moved until it says what the full one does.

    hold_rescaled(student, full, packed, scheme, seed)  # its matrices: whole numbers, their scales trained
    held_out = HeldOut(full, student, batches)          # text that is not trained on, read
    kl = matching_step(student, full, batches)          # gradients of the mean KL(full | student) a token
    capped_step(optimizer, fraction, kl)
    held_out.measure(student, step)                     # keeps the best scales so far
    packed = held_numbers(student)                      # numbers and scales, to be stored

What is not packed stays as it is stored, in bfloat16, so that the student is the stored model at every step.

Shape suffixes: N tokens, D input width, F output width, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from slingshot.checkpoint.layout import packed_layout, place
from slingshot.model.rescaled import RescaledMatrix
from slingshot.model.stored import hold
from slingshot.model.transformer import Transformer
from slingshot.quantization.encode import grid
from slingshot.quantization.formats import Scheme
from slingshot.quantization.gptq import rounded
from slingshot.training.calibration import TextRows
from slingshot.training.distillation import distillation_loss, divergences
from slingshot.training.fidelity import fidelity, followed, hidden, reading
from slingshot.training.optimizer import Optimizer

Packed = tuple[Tensor, Tensor]  # numbers and scales of a matrix
SHARE = 0.1  # of its KL that a step may hope to win: what it wins on a few answers is in part of those alone


@torch.no_grad()
def hold_rescaled(
    student: Transformer, full: Transformer, packed: Mapping[str, Packed], scheme: Scheme, seed: int
) -> None:
    """Give the student matrices of these numbers (others rounded to nearest), whose scales alone are trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.requires_grad_(False).parameters():
        parameter.copy_(parameter.bfloat16())
    weights, made = full.state_dict(), dict[str, Packed]()
    for spec in packed_layout(full.config):
        where, index = place(spec.name)
        numbers_FD, scales_FG = packed.get(spec.name) or rounded(weights[where][index], grid(scheme, spec.name))
        if where not in made:
            shape = weights[where].shape
            scales = scales_FG.new_empty(*shape[:-1], scales_FG.shape[-1])
            made[where] = torch.empty(shape, dtype=torch.int8), scales
        for part, whole in zip((numbers_FD, scales_FG), made[where], strict=True):
            whole[index] = part.to(whole.dtype)
    for where, each in made.items():
        hold(student.get_submodule(where.removesuffix(".weight")), RescaledMatrix(*each, generator))


def held_numbers(student: Transformer) -> dict[str, Packed]:
    """Numbers and scales of every matrix, by name."""
    found = dict[str, Packed]()
    for spec in packed_layout(student.config):
        where, index = place(spec.name)
        weight = student.get_submodule(where)
        assert isinstance(weight, RescaledMatrix)
        found[spec.name] = weight.numbers[index].cpu(), weight.rescaled()[index].cpu()
    return found


def trained(student: Transformer) -> dict[str, Tensor]:
    """What is trained, by name."""
    return {name: parameter.data for name, parameter in student.named_parameters() if parameter.requires_grad}


def matching_step(student: Transformer, full: Transformer, batches: Sequence[TextRows]) -> float:
    """Forward and backward over texts: gradients are of the mean of KL(full | student) over the tokens that count."""
    forward_kl = partial(divergences, divergence="forward")
    n_tokens, total = sum(int(followed(batch).sum()) for batch in batches), 0.0
    for batch in batches:
        with torch.no_grad():
            full_ND = hidden(full, batch)
        student_ND = hidden(student, batch)
        loss = distillation_loss(student_ND, student.head, full_ND, full.head, forward_kl) / n_tokens
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def capped_step(optimizer: Optimizer, fraction: float, kl: float) -> float:
    """A step of the optimizer at `fraction` of its rate, shortened where to first order it would win more than that
    fraction of SHARE of what there is to win: the loss itself, which is 0 at its best (Polyak's step size, as in arXiv
    2002.10542). How far scales may go at once so follows from the model, small or large. -> the norm of the gradients.
    """
    moved = [each for each in optimizer.model.parameters() if each.grad is not None]
    before = [(each.clone(), each.grad.clone()) for each in moved if each.grad is not None]
    norm = optimizer.step(fraction)
    hoped = sum(float((gradient * (old - new)).sum()) for (old, gradient), new in zip(before, moved, strict=True))
    if hoped > (most := SHARE * fraction * kl):
        for (old, _), new in zip(before, moved, strict=True):
            new.lerp_(old, 1 - most / hoped)
    return norm


class HeldOut:
    """Text that is not trained on, and at which state of the student the KL of the full model to it was least there.

    kl, best        at the start and at its least, in nats a token; `step` and `state`: when that was, and what then was
                    trained, by name
    """

    def __init__(self, full: Transformer, student: Transformer, batches: Sequence[TextRows]) -> None:
        self._full, self._batches = reading(full, batches), batches
        self.step, self.best = 0, float("inf")
        self.kl = self.measure(student, 0)

    def measure(self, student: Transformer, step: int) -> float:
        """KL of the student after so many steps."""
        kl = fidelity(self._full, reading(student, self._batches), self._batches)["kl"]
        if kl < self.best:
            self.best, self.step = kl, step
            self.state = {name: tensor.clone() for name, tensor in trained(student).items()}
        return kl
