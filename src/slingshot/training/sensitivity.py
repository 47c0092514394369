"""Which matrices need more bits: each is rounded alone, and what that changes in what the model says is measured.

    units = together(names)                                        # what engines multiply at once has one width
    lost = sensitivities(model, batches, units, grid)              # {"model.layers.0.mlp.experts.": 0.004, ...}
    wide = chosen(lost, sizes, bits=4.5)                           # the units that get 8 bits instead of 4

KL of the full model to the one with a rounded unit, in nats a token; that losses add up is assumed in choosing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from slingshot.checkpoint.layout import place
from slingshot.model.context import PackedContext
from slingshot.model.transformer import Transformer
from slingshot.quantization.gptq import Grid, rounded
from slingshot.quantization.integers import from_numbers
from slingshot.training.calibration import TextRows
from slingshot.training.fidelity import followed, token_kl

# Matrices that engines put side by side: queries, keys and values; gate and up; MLA's two projections to latents.
_SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)\d+\.\w+\.weight")


def together(names: Iterable[str]) -> dict[str, list[str]]:
    """Matrices by unit: all experts of a layer under the start of their names, others side by side under the first's.

    What is side by side only where all of it is there: MLA's q_proj has no k_proj beside it.
    """
    every = list(names)
    present, units = set(every), dict[str, list[str]]()
    for name in every:
        if experts := _EXPERTS.fullmatch(name):
            units.setdefault(experts[1], []).append(name)
            continue
        module, _, part = name.removesuffix(".weight").rpartition(".")
        beside = next((parts for parts in _SIDE_BY_SIDE if part in parts), (part,))
        if not {f"{module}.{each}.weight" for each in beside} <= present:
            beside = (part,)
        units.setdefault(f"{module}.{beside[0]}", []).append(name)
    return units


def modules(unit: str, names: Sequence[str]) -> list[str]:
    """A unit as `Scheme.wide` names it."""
    return [unit] if unit.endswith(".") else [name.removesuffix(".weight") for name in names]


@torch.no_grad()
def sensitivities(
    model: Transformer, batches: Sequence[TextRows], units: Mapping[str, Sequence[str]], grid: Grid
) -> dict[str, float]:
    """KL of each unit alone on this grid: a pass a unit through its layer and those behind, after which the model is as
    it was. In float32, whatever type the weights have."""
    state, lost, layers = model.state_dict(), dict[str, float](), model.config.num_hidden_layers
    runs = [(PackedContext(model.config, *batch[:2]), followed(batch)) for batch in batches]
    states = [[model.model.embed_tokens(tokens_BT).float()] for tokens_BT, *_ in batches]  # what enters each layer

    def onwards(first: int, x_BTD: Tensor, run: tuple[PackedContext, Tensor], kept: list[Tensor] | None) -> Tensor:
        """Hidden states [N, D], of tokens that one which counts follows, from what enters layer `first`."""
        for layer in model.model.layers[first:layers]:
            x_BTD, _ = layer(x_BTD, run[0])
            if kept is not None:
                kept.append(x_BTD)
        return model.model.norm(x_BTD)[:, :-1][run[1]]

    full = [onwards(0, kept[0], run, kept) for kept, run in zip(states, runs, strict=True)]
    for unit, names in units.items():
        before = list[tuple[Tensor, Tensor]]()
        for name in names:
            where, index = place(name)
            weight_FD = state[where][index]
            before.append((weight_FD, weight_FD.clone()))
            weight_FD.copy_(from_numbers(*rounded(weight_FD, grid)))
        first = min(layers, int(unit.split(".")[2]))  # an MTP module's changes nothing
        kl_N = [
            token_kl(full_ND, onwards(first, kept[first], run, None), model.head.weight)  # which is not rounded
            for full_ND, kept, run in zip(full, states, runs, strict=True)
        ]
        lost[unit] = torch.cat(kl_N).mean().item()
        for weight_FD, before_FD in before:
            weight_FD.copy_(before_FD)
    return lost


def chosen(lost: Mapping[str, float], sizes: Mapping[str, int], bits: float) -> list[str]:
    """Units that get 8 bits instead of 4, so that numbers have `bits` on the average at most: most KL a number first.

    sizes: how many numbers a unit has.
    """
    room = (bits - 4) / 4 * sum(sizes.values())
    found = []
    for unit in sorted(lost, key=lambda unit: -lost[unit] / sizes[unit]):
        if sizes[unit] <= room:
            found.append(unit)
            room -= sizes[unit]
    return found
