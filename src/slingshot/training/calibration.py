"""What goes into every matrix, a layer at a time: what calibrated quantisation needs of a model's own text.

    for name, weight_FD, gram_DD, rows in by_layer(open_weights(path), batches): weight_FD.copy_(...)

Layers come in order, and each is run again once its matrices were changed: the next one's inputs are of a model that is
changed up to there (arXiv 2210.17323, 4: quantised layer by layer). Memory: activations, the embedding, and one layer
with its grams; a layer is read when its turn comes.

Shape suffixes: B batch, T time, D input width, F output width, N rows, k experts of a token, A = N k assignments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slingshot.base.clock import Clock
from slingshot.checkpoint.load_save import StoredWeights, load_part
from slingshot.model.context import PackedContext
from slingshot.model.dispatch import Experts, Routing
from slingshot.model.linear import GroupedLinear, Linear
from slingshot.model.moe import Gate, MoE
from slingshot.model.transformer import MTP, Transformer
from slingshot.quantization.formats import is_packed

EMBEDDING = "model.embed_tokens.weight"
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

    def add(self, x_XD: Tensor, own: Gram | None) -> Gram:
        """The Gram that these rows are added to: a matrix's own, or that of the matrix which read them before it."""
        if self._last is not None and self._last[0] is x_XD:
            return self._last[1]
        gram = own or Gram(x_XD.shape[-1])
        gram.add(x_XD.flatten(0, -2).float())
        self._last = x_XD, gram
        return gram

    def forget(self) -> None:
        self._last = None


class ObservedLinear(Linear):
    """A matrix whose inputs are added up. What a layer's last one makes of them is not looked at, and is not made."""

    def __init__(self, base: Linear, inputs: Inputs, last: bool) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.inputs, self.last = base.weight, base.bias, inputs, last
        self.gram: Gram | None = None

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        self.gram = self.inputs.add(x_XD, self.gram)
        width = len(self.weight)
        return x_XD.new_zeros(1).expand(*x_XD.shape[:-1], width) if self.last else super().product(x_XD, detach)


class ObservedGroupedLinear(GroupedLinear):
    """Expert matrices whose inputs are added up, each expert's apart."""

    def __init__(self, base: GroupedLinear, last: bool) -> None:
        nn.Module.__init__(self)
        self.weight, self.last = base.weight, last
        self.grams = [Gram(base.weight.shape[-1]) for _ in base.weight]

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        for gram, own_ND in zip(self.grams, x_ND.float().split(counts), strict=True):
            gram.add(own_ND)
        width = self.weight.shape[1:-1].numel()
        return x_ND.new_zeros(1).expand(len(x_ND), width) if self.last else super().forward(x_ND, counts)


def each_row_once(x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """A Dispatcher that repeats no row to fill a block, as the one does that is made for speed."""
    n_experts, k = routing.scores_NE.shape[1], routing.experts_Nk.shape[1]
    order_A = routing.experts_Nk.flatten().argsort(stable=True)
    counts = routing.experts_Nk.flatten().bincount(minlength=n_experts).tolist()
    y_AD = experts(x_ND[order_A // k], counts) * routing.gates_Nk.flatten()[order_A, None]
    return torch.zeros_like(x_ND).index_add_(0, order_A // k, y_AD)


@torch.no_grad()
def by_layer(
    weights: StoredWeights, batches: Sequence[TextRows], clock: Clock | None = None
) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Name (as in a checkpoint's files), weight, x^T x and number of rows of every matrix of the layers that is packed.

    The weights, in float32, are to be changed before the next is asked for. Matrices that read the same have the same
    x^T x, one after the other. clock: counts "reading", which takes longer for more text, as nothing else here does.
    """
    clock = clock or Clock()
    with torch.device("meta"):
        model = Transformer(weights.config.stored_as(None)).model
    contexts = [PackedContext(weights.config, *batch[:2]) for batch in batches]
    embedding_VD = weights.read(EMBEDDING)
    states = [F.embedding(tokens_BT, embedding_VD).float() for tokens_BT, *_ in batches]
    del embedding_VD
    embedded = list(states) if weights.config.num_nextn_predict_layers else []
    load_part(model.norm, weights, "model.norm.")
    for number, layer in enumerate(model.layers):
        load_part(layer, weights, f"model.layers.{number}.")
        if isinstance(layer, MTP):  # it reads the last layer's hidden states and the tokens behind
            states = [model.norm(x_BTD) for x_BTD in states]
        more = [(x_BTD.roll(-1, dims=1),) for x_BTD in embedded] if isinstance(layer, MTP) else [()] * len(batches)
        plain = {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, Linear | GroupedLinear)
            and not isinstance(module, Gate)
            and is_fitted(f"{name}.weight")
        }
        gates = [module for module in layer.modules() if isinstance(module, MoE)]
        inputs, dispatchers = Inputs(), [moe.dispatcher for moe in gates]
        for moe in gates:
            moe.dispatcher = each_row_once
        for name, module in plain.items():
            last = name.endswith("down_proj")
            if isinstance(module, Linear):
                layer.set_submodule(name, ObservedLinear(module, inputs, last))
            elif isinstance(module, GroupedLinear):
                layer.set_submodule(name, ObservedGroupedLinear(module, last))
        with clock("reading"):
            for x_BTD, context, others in zip(states, contexts, more, strict=True):
                layer(x_BTD, context, *others)
        inputs.forget()
        found = {name: layer.get_submodule(name) for name in plain}
        for name, module in plain.items():
            layer.set_submodule(name, module)
        for moe, dispatcher in zip(gates, dispatchers, strict=True):
            moe.dispatcher = dispatcher
        for name in list(found):
            yield from _matrices(f"model.layers.{number}.{name}", found.pop(name))
        if number + 1 < len(model.layers):
            with clock("reading"):
                for at, context in enumerate(contexts):
                    states[at] = layer(states[at], context, *more[at])[0]
        layer.to_empty(device="meta")


def is_fitted(name: str) -> bool:
    """Whether inputs of the layers' matrix NAME are observed: not those of what joins an MTP module's two inputs."""
    return is_packed(name, "linear") and not name.endswith("eh_proj.weight")


def _matrices(name: str, observed: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    if isinstance(observed, ObservedLinear) and (gram := observed.gram) is not None:
        yield f"{name}.weight", observed.weight.data, gram.whole(), gram.rows
    elif isinstance(observed, ObservedGroupedLinear):
        experts, _, parts = name.rpartition(".")
        names = ("gate_proj", "up_proj") if parts == "gate_up_proj" else ("down_proj",)
        for expert, gram in enumerate(observed.grams):
            weights = observed.weight.data[expert].view(len(names), -1, observed.weight.shape[-1])
            for part, weight_FD in zip(names, weights, strict=True):
                yield f"{experts}.{expert}.{part}.weight", weight_FD, gram.whole(), gram.rows


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
