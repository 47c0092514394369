"""What goes into every matrix, a layer at a time: what calibrated quantisation needs of a model's own text.

    by_layer(open_weights(path), batches, lambda name, weight_FD, gram_DD, rows: weight_FD.copy_(...))

Every matrix is changed as soon as all of its inputs are there and before anything is multiplied by it, so that the
inputs of each come of a model that is changed up to there (arXiv 2210.17323, 4, where that holds from layer to layer),
and the text goes through a layer once. Memory: what a matrix of a layer reads of the whole text at the widest, its
x^T x, the embedding, and one layer; a layer is read when its turn comes.

Shape suffixes: B batch, T time, D input width, F output width, N rows, n some of them, k experts of a token,
A = N k assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slingshot.checkpoint.load_save import StoredWeights, load_part
from slingshot.kernels.swiglu import swiglu
from slingshot.model.context import PackedContext
from slingshot.model.dispatch import Experts, Routing
from slingshot.model.linear import GroupedLinear, Linear
from slingshot.model.moe import MLP, Gate, MoE
from slingshot.model.transformer import MTP, Transformer
from slingshot.quantization.formats import is_packed

Change = Callable[[str, Tensor, Tensor, int], None]
EMBEDDING = "model.embed_tokens.weight"
_ROWS = 512  # of the text at a time, between a feed-forward block's first matrices and its last
_WIDE = 1024  # columns of x^T x at a time: what lies above the diagonal is not multiplied, but within such a block


class TextRows(NamedTuple):
    """Rows of texts without padding: a segment each, and 1 where losses count a token, such as what a model wrote."""

    tokens_BT: Tensor
    segments_BT: Tensor
    written_BT: Tensor


class Gram:
    """x^T x of all rows of inputs so far: its lower triangle, until it is asked for whole."""

    def __init__(self, width: int) -> None:
        self.rows, self._lower_DD = 0, torch.zeros(width, width)

    def add(self, x_ND: Tensor) -> None:
        self.rows += len(x_ND)
        for start in range(0, x_ND.shape[1], _WIDE):
            stop = start + _WIDE
            self._lower_DD[start:, start:stop].addmm_(x_ND[:, start:].T, x_ND[:, start:stop])

    def whole(self) -> Tensor:
        """[D, D], symmetric to the bit."""
        for start in range(0, len(self._lower_DD), _WIDE):
            own, below = slice(start, start + _WIDE), slice(start + _WIDE, None)
            self._lower_DD[own, below] = self._lower_DD[below, own].T
            block = self._lower_DD[own, own]
            block.copy_(block.tril() + block.tril(-1).T)
        return self._lower_DD


class Inputs:
    """What went into a layer's matrices last, and its Gram, which those share that read the same."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Gram] | None = None

    def gram(self, x_XD: Tensor) -> Gram:
        """Of these rows; that of the matrix which read them before, where one did."""
        if self._last is None or self._last[0] is not x_XD:
            self._last = x_XD, Gram(x_XD.shape[-1])
            self._last[1].add(x_XD.flatten(0, -2).float())
        return self._last[1]


class ObservedLinear(Linear):
    """A matrix that is changed, by its inputs, before it multiplies them."""

    def __init__(self, base: Linear, name: str, inputs: Inputs, change: Change) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.name, self.inputs, self.change = base.weight, base.bias, name, inputs, change

    def observe(self, x_XD: Tensor) -> None:
        gram = self.inputs.gram(x_XD)
        self.change(f"{self.name}.weight", self.weight.data, gram.whole(), gram.rows)

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        self.observe(x_XD)
        return super().product(x_XD, detach)


class ObservedMLP(MLP):
    """A feed-forward block that never holds more of the whole text than what its last matrix reads."""

    def __init__(self, base: MLP) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj

    def forward(self, x: Tensor) -> Tensor:
        first = self.gate_proj, self.up_proj
        for linear in first:
            if isinstance(linear, ObservedLinear):
                linear.observe(x)
        hidden = x.new_empty(*x.shape[:-1], len(self.gate_proj.weight))
        for x_nD, hidden_nF in zip(*(each.flatten(0, -2).split(_ROWS) for each in (x, hidden)), strict=True):
            hidden_nF.copy_(swiglu(torch.cat([F.linear(x_nD, linear.weight) for linear in first], dim=-1)))
        return self.down_proj(hidden)


class ObservedGroupedLinear(GroupedLinear):
    """Expert matrices that are changed, each by its own inputs, before they multiply these."""

    def __init__(self, base: GroupedLinear, stack: str, parts: Sequence[str], change: Change) -> None:
        nn.Module.__init__(self)
        self.weight, self.stack, self.parts, self.change = base.weight, stack, parts, change

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        for expert, own_ND in enumerate(x_ND.float().split(counts)):
            gram = Gram(x_ND.shape[-1])
            gram.add(own_ND)
            weights = self.weight.data[expert].view(len(self.parts), -1, x_ND.shape[-1])
            for part, weight_FD in zip(self.parts, weights, strict=True):
                self.change(f"{self.stack}.{expert}.{part}.weight", weight_FD, gram.whole(), gram.rows)
        return super().forward(x_ND, counts)


def each_row_once(x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """A Dispatcher that repeats no row to fill a block, as the one does that is made for speed."""
    n_experts, k = routing.scores_NE.shape[1], routing.experts_Nk.shape[1]
    order_A = routing.experts_Nk.flatten().argsort(stable=True)
    counts = routing.experts_Nk.flatten().bincount(minlength=n_experts).tolist()
    y_AD = experts(x_ND[order_A // k], counts) * routing.gates_Nk.flatten()[order_A, None]
    return torch.zeros_like(x_ND).index_add_(0, order_A // k, y_AD)


@torch.no_grad()
def by_layer(weights: StoredWeights, batches: Sequence[TextRows], change: Change) -> None:
    """Read the text, and call `change` with the name (as in a checkpoint's files), weight, x^T x and number of rows of
    every matrix of the layers that is packed.

    It changes the weights, in float32. Matrices that read the same have the same x^T x, one after the other.
    """
    with torch.device("meta"):
        model = Transformer(weights.config.stored_as(None)).model
    text = TextRows(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    context, embedding_VD = PackedContext(weights.config, *text[:2]), weights.read(EMBEDDING)
    x_BTD = F.embedding(text.tokens_BT, embedding_VD).float()
    del embedding_VD
    embedded_BTD = x_BTD if weights.config.num_nextn_predict_layers else None
    load_part(model.norm, weights, "model.norm.")
    for number, layer in enumerate(model.layers):
        load_part(layer, weights, f"model.layers.{number}.")
        more = []
        if isinstance(layer, MTP) and embedded_BTD is not None:  # it reads the last hidden states and the tokens behind
            x_BTD, more = model.norm(x_BTD), [embedded_BTD.roll(-1, dims=1)]
        _observe(layer, f"model.layers.{number}.", change)
        x_BTD = layer(x_BTD, context, *more)[0]
        model.layers[number] = nn.Identity()  # its weights, and what went into them


def _observe(layer: nn.Module, prefix: str, change: Change) -> None:
    """Have every matrix of a layer changed by what it reads."""
    inputs = Inputs()
    for name, module in list(layer.named_modules()):
        if isinstance(module, MoE):
            module.dispatcher = each_row_once
        if isinstance(module, MLP):
            layer.set_submodule(name, ObservedMLP(module))
        if isinstance(module, Gate) or not is_fitted(f"{name}.weight"):
            continue
        if isinstance(module, GroupedLinear):
            stack, _, last = f"{prefix}{name}".rpartition(".")
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            layer.set_submodule(name, ObservedGroupedLinear(module, stack, parts, change))
        elif isinstance(module, Linear):
            layer.set_submodule(name, ObservedLinear(module, f"{prefix}{name}", inputs, change))


def is_fitted(name: str) -> bool:
    """Whether inputs of the layers' matrix NAME are observed: not those of what joins an MTP module's two inputs."""
    return is_packed(name, "linear") and not name.endswith("eh_proj.weight")


def stream(
    texts: Sequence[Sequence[int]], length: int, rows: int, written: Sequence[Sequence[int]] | None = None
) -> list[TextRows]:
    """Texts end to end, each a segment, in batches of `rows` rows of `length` tokens; what fills no row is left out.

    A text that a row's end cuts goes on in the next as a segment of its own. written: masks of the texts, by which
    tokens count; unless told all do.
    """
    parts = [[id for text in texts for id in text], [number for number, text in enumerate(texts, 1) for _ in text]]
    parts.append([mark for mask in written for mark in mask] if written else [1] * len(parts[0]))
    length = max(1, min(length, len(parts[0])))
    whole = len(parts[0]) // length
    tokens_NT, segments_NT, written_NT = torch.tensor(parts)[:, : whole * length].view(3, whole, length)
    segments_NT = segments_NT - segments_NT[:, :1] + 1  # numbered from 1 in every row
    if not written_NT.any():  # all that was kept of the texts is prompts
        written_NT = torch.ones_like(written_NT)
    pieces = (whole.split(rows) for whole in (tokens_NT, segments_NT, written_NT))
    return [TextRows(*each) for each in zip(*pieces, strict=True)]
