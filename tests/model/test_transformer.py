"""The whole network: causality, packed documents, and what a forward pass reports of its routing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slingshot.model.config import ModelConfig
from slingshot.model.moe import balance_loss, expert_load
from slingshot.model.transformer import Transformer

Config = Callable[..., ModelConfig]
Make = Callable[..., Transformer]


@pytest.fixture(scope="module")
def model(make_model: Make, deepseek: Config) -> Transformer:
    return make_model(deepseek())


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_no_position_sees_the_future(model: Transformer, packed: bool) -> None:
    before, segments = tokens(1, 9), torch.ones(1, 9, dtype=torch.long) if packed else None
    after = before.clone()
    after[0, 5] = (after[0, 5] + 1) % 64
    a, b = (model(t, segments_BT=segments, mtp=True) for t in (before, after))
    assert torch.equal(a.logits_BTV[:, :5], b.logits_BTV[:, :5])
    assert (a.logits_BTV[:, 5:] - b.logits_BTV[:, 5:]).abs().amax(-1).min() > 1e-3
    # the MTP module at t also sees the embedding of t+1, and no further
    assert torch.equal(a.mtp_hidden_BTD[:, :4], b.mtp_hidden_BTD[:, :4])
    assert (a.mtp_hidden_BTD[:, 4:] - b.mtp_hidden_BTD[:, 4:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_packed_documents_are_as_if_alone(make_model: Make, deepseek: Config, dense: Config, family: str) -> None:
    """Logits and MTP states of each document, wherever it stands in a row, and whatever follows."""
    model = make_model(deepseek() if family == "deepseek_v3" else dense())
    mtp = family == "deepseek_v3"
    documents = [tokens(size, seed=size) for size in (5, 1, 7)]
    rows = torch.zeros(2, 15, dtype=torch.long)
    segments = torch.zeros_like(rows)
    places = [(0, 0, 1), (0, 5, 2), (1, 0, 1)]
    for (row, start, segment), document in zip(places, documents, strict=True):
        rows[row, start : start + len(document)] = document
        segments[row, start : start + len(document)] = segment
    rows[0, 6:13], segments[0, 6:13] = documents[2], 3
    places.append((0, 6, 3))
    packed = model(rows, segments_BT=segments, mtp=mtp)
    for (row, start, _), document in zip(places, [*documents, documents[2]], strict=True):
        alone = model(document[None], mtp=mtp)
        place = slice(start, start + len(document))
        assert (packed.logits_BTV[row, place] - alone.logits_BTV[0]).abs().max() < 1e-4
        if mtp and len(document) > 1:  # the last position has no following token, and predicts nothing
            assert (packed.mtp_hidden_BTD[row, place][:-1] - alone.mtp_hidden_BTD[0, :-1]).abs().max() < 1e-4
    merged = model(rows, segments_BT=(segments > 0).long())  # there a document does see what stands before it
    assert (merged.logits_BTV[0, 6] - packed.logits_BTV[0, 6]).abs().max() > 0.1


@torch.no_grad()
def test_routing_is_reported_per_layer_and_without_padding(model: Transformer) -> None:
    """Loads and balance loss cover the two MoE layers and the MTP module's; padding counts nowhere."""
    rows, segments = tokens(2, 6), torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    recorded = []
    gates = [layer.gate for layer in model.moe_layers()]
    handles = [gate.register_forward_hook(lambda _, __, routing: recorded.append(routing)) for gate in gates]
    output = model(rows, segments_BT=segments, mtp=True)
    for handle in handles:
        handle.remove()
    assert [float(load.sum()) for load in output.load_LE] == [7 * 3.0] * 3 and len(recorded) == 3
    valid = segments > 0
    losses = [balance_loss(r.scores_NE.view(2, 6, -1), r.experts_Nk.view(2, 6, -1), valid) for r in recorded]
    assert output.balance_loss is not None and float(output.balance_loss) == pytest.approx(float(sum(losses)))
    for load, routing in zip(output.load_LE, recorded, strict=True):
        assert torch.equal(load, expert_load(routing.experts_Nk, valid.flatten(), 8))
    assert len(model(rows, segments_BT=segments).load_LE) == 2


def test_initial_weights_follow_the_seed_and_the_range(deepseek: Config) -> None:
    config = deepseek(initializer_range=0.05, vocab_size=512)
    models = [Transformer(config), Transformer.empty(config), Transformer.empty(config)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        model.init_weights(torch.Generator().manual_seed(seed))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    for name, tensor in states[0].items():
        if tensor.numel() > 2000:
            assert float(tensor.std()) == pytest.approx(0.05, rel=0.1), name
        if tensor.dim() == 1:
            assert (tensor == (0 if name.endswith("bias") else 1)).all()


@torch.no_grad()
def test_bfloat16_activations_stay_near_float32(make_model: Make, dense: Config) -> None:
    model = make_model(dense())
    rows = tokens(2, 10)
    exact = model(rows).logits_BTV
    model.compute_dtype = torch.bfloat16
    output = model(rows)
    assert output.hidden_BTD.dtype == torch.bfloat16 and output.logits_BTV.dtype == torch.float32
    assert 1e-4 < (output.logits_BTV - exact).abs().mean() / exact.std() < 0.05
