"""A checkpoint's matrices in few bits: which have more than the others, numbers fitted to text, the tensors to write.

    scheme, found = widened(load_model(path), texts, scheme, bits=4.5)         # 8 bits where 4 lose most
    fit = fitted(open_weights(path), stream(texts, 256, 8), scheme)
    write_shards(folder, tensors(open_weights(path), fit, scheme, None, progress))

Shape suffixes: D input width, F output width, G groups of a row.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from slingshot.base.clock import Clock
from slingshot.base.progress import Progress
from slingshot.checkpoint.layout import layout, packed_layout
from slingshot.checkpoint.load_save import StoredWeights, read_into
from slingshot.cost.flops import forward_flops
from slingshot.model.transformer import Transformer
from slingshot.quantization.encode import encoded, grid
from slingshot.quantization.formats import SCALE, Scheme, is_packed
from slingshot.quantization.fp8 import quantize
from slingshot.quantization.gptq import gptq, rounded
from slingshot.quantization.integers import IntegerGrid, from_numbers
from slingshot.training.calibration import TextRows, by_layer, is_fitted, stream
from slingshot.training.quantization_aware import Packed
from slingshot.training.sensitivity import chosen, modules, sensitivities, together

FEW = 64  # rows of inputs: a matrix that saw fewer, such as an expert's, is rounded to nearest
# One x^T x for all of these and what stands before them.
_BESIDE = tuple(f".{part}.weight" for part in ("k_proj", "v_proj", "up_proj", "kv_a_proj_with_mqa"))
_PROBED = 512  # tokens on which each matrix's sensitivity is measured


def widened(
    model: Transformer, texts: Sequence[Sequence[int]], scheme: Scheme, bits: float, length: int = 256
) -> tuple[Scheme, dict[str, Any]]:
    """The scheme with 8 bits where 4 lose most, on texts in rows of `length`, and what was measured."""
    shapes = {spec.name: spec.shape for spec in packed_layout(model.config)}
    units = together(shapes)
    sizes = {unit: sum(prod(shapes[name]) for name in names) for unit, names in units.items()}
    length = min(length, _PROBED)
    batches = stream(texts, length, _PROBED // length)[:1]
    lost = sensitivities(model, batches, units, IntegerGrid(4, scheme.group))
    wide = chosen(lost, sizes, bits)
    scheme = Scheme(scheme.kind, scheme.group, tuple(each for unit in wide for each in modules(unit, units[unit])))
    mean = sum(prod(shape) * scheme.bits(name) for name, shape in shapes.items()) / sum(sizes.values())
    print(f"8 bits for {len(wide)} of {len(units)}, {mean:.2f} on the average; KL of each at 4:", file=sys.stderr)
    for unit in wide:
        print(f"    {unit.removeprefix('model.').rstrip('.')} {lost[unit]:.2g}", file=sys.stderr)
    tokens = [batches[0][0].numel()] if batches else []
    flops = (1 + len(units) / 2) * forward_flops(model.config, tokens)  # half of the layers on the average
    return scheme, {"bits": mean, "sensitivities": lost, "wide": list(scheme.wide), "flops": flops}


@dataclass
class Fit:
    """Numbers and scales of matrices that were fitted to text, and what there is to say of them."""

    packed: dict[str, Packed] = field(default_factory=dict)
    flops: float = 0.0  # of the sums x^T x alone
    unseen: list[str] = field(default_factory=list)  # matrices that saw too little
    outliers: Counter[str] = field(default_factory=Counter)  # by matrix: groups in which one weight leaves others none

    def add(self, name: str, weight_FD: Tensor, gram_DD: Tensor, rows: int, scheme: Scheme) -> None:
        """Fit a matrix to its inputs' x^T x; the weight becomes what its numbers stand for."""
        self.flops += 0.0 if name.endswith(_BESIDE) else float(rows) * gram_DD.numel()
        if rows < FEW or not gram_DD.isfinite().all():
            self.unseen.append(name)
            return
        numbers_FD, scales_FG = gptq(weight_FD, gram_DD, grid(scheme, name))
        self.outliers[name] += lone(weight_FD, numbers_FD, scales_FG.shape[1])
        weight_FD.copy_(from_numbers(numbers_FD, scales_FG))
        self.packed[name] = numbers_FD.to(torch.bfloat16 if scheme.kind == "mxfp4" else torch.int8), scales_FG


def fitted(
    weights: StoredWeights,
    batches: Sequence[TextRows],
    scheme: Scheme,
    title: str = "fitted",
    clock: Clock | None = None,
) -> Fit:
    """GPTQ of every matrix that enough of the text goes through, a layer at a time.

    clock: counts "reading" the text, which takes longer for more of it, and "fitting", which does not.
    """
    clock, fit = clock or Clock(), Fit()
    names = [spec.name for spec in packed_layout(weights.config) if is_fitted(spec.name)]
    with Progress(title, len(names)) as progress, clock("reading"):

        def change(name: str, weight_FD: Tensor, gram_DD: Tensor, rows: int) -> None:
            with clock("fitting"):
                fit.add(name, weight_FD, gram_DD, rows, scheme)
            progress.update(len(fit.packed) + len(fit.unseen))

        by_layer(weights, batches, change)
    return fit


def lone(weight_FD: Tensor, numbers_FD: Tensor, groups: int) -> int:
    """Groups in which all numbers but one are 0, and not all weights but one: an outlier took the whole scale."""
    numbers_FGI, weight_FGI = (each.unflatten(-1, (groups, -1)) for each in (numbers_FD, weight_FD))
    return int((weight_FGI[numbers_FGI.count_nonzero(-1) == 1].count_nonzero(-1) > 1).sum())


def tensors(
    weights: StoredWeights, fit: Fit, scheme: Scheme | None, scale_fmt: str | None, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """The new checkpoint's tensors: what is not fitted is rounded to nearest; without a scheme all, to fp8.

    What is yielded is taken out of `fit`, so that memory has it once.
    """
    for number, spec in enumerate(layout(weights.config), start=1):
        if (packed := fit.packed.pop(spec.name, None)) is None:
            tensor = torch.empty(spec.shape, dtype=torch.float32 if spec.stored != "plain" else torch.bfloat16)
            read_into(tensor, weights, spec)
        if scheme is not None and is_packed(spec.name, spec.stored):
            if packed is None:
                packed = rounded(tensor, grid(scheme, spec.name))
                fit.outliers[spec.name] += lone(tensor, packed[0], packed[1].shape[1])
            for suffix, part in encoded(scheme, spec.name, *packed):
                yield spec.name + suffix, part
        elif scheme is None and spec.stored == "linear":
            values, scale_inv = quantize(tensor, scale_fmt)
            yield spec.name, values
            yield spec.name + SCALE, scale_inv
        else:
            yield spec.name, tensor if spec.stored == "float32" else tensor.bfloat16()
        progress.update(number)
