"""Quantisation-aware distillation: a rounded model's own weights are moved until it says what the full one does.

    hold_rounded(student, full, packed, scheme)         # its matrices: trained, and rounded at every product
    loss = matching_step(student, full, batches)        # gradients of the mean KL(full | student) a token
    packed = held_numbers(student)                      # numbers and scales, to be stored

What is not packed stays as it is stored, in bfloat16, so that the student is the stored model at every step.

Shape suffixes: N tokens, D input width, F output width, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slingshot.checkpoint.layout import layout, place
from slingshot.model.rounded import RoundedMatrix
from slingshot.model.stored import hold
from slingshot.model.transformer import Transformer
from slingshot.quantization.encode import grid
from slingshot.quantization.formats import Scheme, is_packed
from slingshot.quantization.gptq import rounded
from slingshot.training.calibration import Batch
from slingshot.training.distillation import distillation_loss
from slingshot.training.fidelity import follows, hidden

Packed = tuple[Tensor, Tensor]  # numbers and scales of a matrix


@torch.no_grad()
def hold_rounded(student: Transformer, full: Transformer, packed: Mapping[str, Packed], scheme: Scheme) -> None:
    """Give the student matrices that start as these numbers (others rounded to nearest) and are alone trained.

    A latent starts as the full model's weight where that rounds to the number, else as the number: of what calibration
    made good elsewhere nothing is undone.
    """
    for parameter in student.requires_grad_(False).parameters():
        parameter.copy_(parameter.bfloat16())
    weights, made = full.state_dict(), dict[str, RoundedMatrix]()
    for spec in layout(full.config):
        if not is_packed(spec.name, spec.stored):
            continue
        (where, index), its = place(spec.name), grid(scheme, spec.name)
        weight_FD = weights[where][index]
        numbers_FD, scales_FG = packed.get(spec.name) or rounded(weight_FD, its)
        if where not in made:
            latents = torch.empty_like(weights[where])
            scales = scales_FG.new_empty(*latents.shape[:-1], scales_FG.shape[-1])
            made[where] = RoundedMatrix(latents, scales, its.nearest)  # experts of a layer have one grid
        scaled_FD = (weight_FD.unflatten(-1, (scales_FG.shape[-1], -1)) / scales_FG[..., None]).flatten(-2)
        same_FD = its.nearest(scaled_FD) == numbers_FD
        made[where].latents[index] = torch.where(same_FD, scaled_FD, numbers_FD)
        made[where].scales[index] = scales_FG
    for where, matrix in made.items():
        hold(student.get_submodule(where.removesuffix(".weight")), matrix)


def held_numbers(student: Transformer) -> dict[str, Packed]:
    """Numbers and scales of every matrix, by name."""
    found = dict[str, Packed]()
    for spec in layout(student.config):
        if is_packed(spec.name, spec.stored):
            where, index = place(spec.name)
            weight = student.get_submodule(where)
            assert isinstance(weight, RoundedMatrix)
            found[spec.name] = weight.numbers()[index].cpu(), weight.scales[index].cpu()
    return found


def matching_step(student: Transformer, full: Transformer, batches: Sequence[Batch]) -> float:
    """Forward and backward over texts: gradients are of the mean of KL(full | student) over their tokens, in nats."""
    n_tokens, total = sum(int(follows(batch).sum()) for batch in batches), 0.0
    for batch in batches:
        with torch.no_grad():
            full_ND = hidden(full, batch).float()
        student_ND = hidden(student, batch).float()
        loss = distillation_loss(student_ND, student.head, full_ND, full.head, "forward") / n_tokens
        loss.backward()
        total += loss.item()
    return total
