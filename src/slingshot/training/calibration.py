"""What goes into every matrix, a layer at a time: what calibrated quantisation needs of a model's own text.

    for name, weight_FD, gram_DD, rows in by_layer(open_weights(path), batches): weight_FD.copy_(...)

Layers come in order, and each is run again once its matrices were changed: the next one's inputs are of a model that is
changed up to there (arXiv 2210.17323, 4: quantised layer by layer). Memory: activations, the embedding, and one layer
with its grams; a layer is read when its turn comes.

Shape suffixes: B batch, T time, D input width, F output width, E experts, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slingshot.checkpoint.load_save import StoredWeights, load_part
from slingshot.model.context import PackedContext
from slingshot.model.linear import GroupedLinear, Linear
from slingshot.model.moe import Gate
from slingshot.model.transformer import MTP, Transformer

EMBEDDING = "model.embed_tokens.weight"
Batch = tuple[Tensor, Tensor]  # tokens_BT, segments_BT: no padding


class ObservedLinear(Linear):
    """A matrix that adds up x^T x of the rows it is given."""

    def __init__(self, base: Linear) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.rows = base.weight, base.bias, 0
        self.gram_DD = torch.zeros(base.weight.shape[1], base.weight.shape[1])

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        x_ND = x_XD.flatten(0, -2).float()
        self.gram_DD.addmm_(x_ND.T, x_ND)
        self.rows += len(x_ND)
        return super().product(x_XD, detach)


class ObservedGroupedLinear(GroupedLinear):
    """Expert matrices that add up x^T x of the rows that each is given."""

    def __init__(self, base: GroupedLinear) -> None:
        nn.Module.__init__(self)
        self.weight, self.rows = base.weight, [0] * len(base.weight)
        self.gram_EDD = torch.zeros(len(base.weight), base.weight.shape[-1], base.weight.shape[-1])

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        for expert, own_ND in enumerate(x_ND.float().split(counts)):
            self.gram_EDD[expert].addmm_(own_ND.T, own_ND)
            self.rows[expert] += len(own_ND)
        return super().forward(x_ND, counts)


@torch.no_grad()
def by_layer(weights: StoredWeights, batches: Sequence[Batch]) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Name (as in a checkpoint's files), weight, x^T x and number of rows of every matrix of the layers, routers' not.

    The weights, in float32, are to be changed before the next is asked for.
    """
    with torch.device("meta"):
        model = Transformer(weights.config.stored_as(None)).model
    contexts = [PackedContext(weights.config, *batch) for batch in batches]
    embedding_VD = weights.read(EMBEDDING)
    states = [F.embedding(tokens_BT, embedding_VD).float() for tokens_BT, _ in batches]
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
            if isinstance(module, Linear | GroupedLinear) and not isinstance(module, Gate)
        }
        for name, module in plain.items():
            observed = ObservedLinear(module) if isinstance(module, Linear) else ObservedGroupedLinear(module)
            layer.set_submodule(name, observed)
        for x_BTD, context, others in zip(states, contexts, more, strict=True):
            layer(x_BTD, context, *others)
        found = {name: layer.get_submodule(name) for name in plain}
        for name, module in plain.items():
            layer.set_submodule(name, module)
        for name, each in found.items():
            yield from _matrices(f"model.layers.{number}.{name}", each)
        if number + 1 < len(model.layers):
            for at, context in enumerate(contexts):
                states[at] = layer(states[at], context, *more[at])[0]
        layer.to_empty(device="meta")


def _matrices(name: str, observed: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    if isinstance(observed, ObservedLinear):
        yield f"{name}.weight", observed.weight.data, observed.gram_DD, observed.rows
    elif isinstance(observed, ObservedGroupedLinear):
        experts, _, parts = name.rpartition(".")
        names = ("gate_proj", "up_proj") if parts == "gate_up_proj" else ("down_proj",)
        for expert, (gram_DD, rows) in enumerate(zip(observed.gram_EDD, observed.rows, strict=True)):
            weights = observed.weight.data[expert].view(len(names), -1, observed.weight.shape[-1])
            for part, weight_FD in zip(names, weights, strict=True):
                yield f"{experts}.{expert}.{part}.weight", weight_FD, gram_DD, rows


def stream(texts: Sequence[Sequence[int]], length: int, rows: int) -> list[Batch]:
    """Texts end to end, each a segment, in batches of `rows` rows of `length` tokens; what fills no row is left out.

    A text that a row's end cuts goes on in the next as a segment of its own.
    """
    ids = torch.tensor([id for text in texts for id in text], dtype=torch.long)
    segments = torch.tensor([number for number, text in enumerate(texts, start=1) for _ in text], dtype=torch.long)
    length = max(1, min(length, len(ids)))
    whole = len(ids) // length
    tokens_NT, segments_NT = (each[: whole * length].view(whole, length) for each in (ids, segments))
    segments_NT = segments_NT - segments_NT[:, :1] + 1  # numbered from 1 in every row
    return list(zip(tokens_NT.split(rows), segments_NT.split(rows), strict=True))
