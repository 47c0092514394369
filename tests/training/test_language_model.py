"""One training step over packed rows: the loss is a mean over the global batch's tokens, however the rows are split."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slingshot.cost.flops import forward_flops, training_parts
from slingshot.data.packing import pack
from slingshot.model.config import Yarn
from slingshot.model.moe import balance_loss
from slingshot.training.batch import Rows
from slingshot.training.language_model import (
    LanguageModelLoss,
    MemoryConfig,
    evaluate_loss,
    head_logprobs,
    language_model_step,
)
from slingshot.training.parallel import Parallel

ALONE = Parallel()
WEIGHTS = LanguageModelLoss(mtp=0.3, balance=0.01)


@pytest.fixture(scope="module")
def model(make_model, deepseek):
    return make_model(deepseek())


DOCUMENTS = [np.random.default_rng(size).integers(0, 64, size).tolist() for size in (5, 9, 2, 7, 12, 4, 6)]
PIECES = [5, 7, 2, 2, 7, 1, 11, 1, 3, 6]  # what rows of 12 cut them into: 5 + 7, 2 + 2 + 7 + 1, 11 + 1, 3 + 6


def packed_rows():
    """Four rows of 12 tokens, the last with padding; targets from every third token on weigh 0."""
    tokens_NT, segments_NT = pack(DOCUMENTS, 12)
    weights = (segments_NT > 0) * (np.arange(12) % 3 != 0)
    return Rows.of(tokens_NT, segments_NT, weights)


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_losses_against_a_loop_over_documents(model):
    """Cross entropy and MTP over each piece of a document alone; balance loss per row; gradients of their sum."""
    rows = packed_rows()
    next_losses, far_losses = [], []
    for tokens_T, segments_T, weights_T in zip(rows.tokens_BT, rows.segments_BT, rows.weights_BT, strict=True):
        for segment in range(1, int(segments_T.max()) + 1):
            piece, weights = tokens_T[segments_T == segment], weights_T[segments_T == segment]
            output = model(piece[None], mtp=True)
            assert output.mtp_hidden_BTD is not None
            next_losses.append(
                (F.cross_entropy(output.logits_BTV[0, :-1], piece[1:], reduction="none") * weights[1:], weights[1:])
            )
            far_logits = model.lm_logits(output.mtp_hidden_BTD[0, :-2])
            far_losses.append((F.cross_entropy(far_logits, piece[2:], reduction="none") * weights[2:], weights[2:]))
    next_loss, far_loss = (
        sum(loss.sum() for loss, _ in parts) / sum(weights.sum() for _, weights in parts)
        for parts in (next_losses, far_losses)
    )

    routings = []
    handles = [
        layer.gate.register_forward_hook(lambda _, __, routing: routings.append(routing))
        for layer in model.moe_layers()
    ]
    model(rows.tokens_BT, segments_BT=rows.segments_BT, mtp=True)
    for handle in handles:
        handle.remove()
    balance = []
    for index, segments_T in enumerate(rows.segments_BT):
        valid = torch.arange(index * 12, index * 12 + 12)[segments_T > 0]
        balance.append(
            sum(balance_loss(routing.scores_NE[valid][None], routing.experts_Nk[valid][None]) for routing in routings)
        )
    mean_balance = sum(balance) / len(balance)
    (next_loss + 0.3 * far_loss + 0.01 * mean_balance).backward()
    expected = gradients(model)

    losses = language_model_step(model, rows, WEIGHTS, 4, ALONE)
    found = gradients(model)
    assert losses.loss == pytest.approx(next_loss.item(), rel=1e-5)
    assert losses.mtp_loss == pytest.approx(far_loss.item(), rel=1e-5)
    assert losses.balance_loss == pytest.approx(mean_balance.item(), rel=1e-5)
    assert [float(load.sum()) for load in losses.load_LE] == [sum(map(len, DOCUMENTS)) * 3.0] * 3
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("empty", [0, 2])
def test_micro_batches_and_empty_rows_change_nothing(model, micro_batch_size, empty):
    """Empty rows are what a rank gets where the ranks do not divide the batch."""
    rows = packed_rows()
    whole = language_model_step(model, rows, WEIGHTS, 4, ALONE)
    expected = gradients(model)
    fields = (rows.tokens_BT, rows.segments_BT, rows.weights_BT)
    padded = Rows(*(torch.cat((field, field.new_zeros(empty, 12))) for field in fields))
    split = language_model_step(model, padded, WEIGHTS, micro_batch_size, ALONE)
    found = gradients(model)
    assert (split.loss, split.mtp_loss, split.balance_loss) == pytest.approx(
        (whole.loss, whole.mtp_loss, whole.balance_loss), rel=1e-5
    )
    assert all(torch.equal(a, b) for a, b in zip(split.load_LE, whole.load_LE, strict=True))
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


def test_weights_of_zero_leave_their_parts_out(model):
    losses = language_model_step(model, packed_rows(), LanguageModelLoss(mtp=0.0, balance=0.0), 4, ALONE)
    found = gradients(model)
    assert losses.mtp_loss is None and len(losses.load_LE) == 2
    assert not [name for name in found if name.startswith("model.layers.3.")]


def test_rows_without_a_target_give_no_loss_and_no_gradient(make_model, dense):
    model, rows = make_model(dense()), packed_rows()
    losses = language_model_step(
        model, Rows(rows.tokens_BT, rows.segments_BT, torch.zeros_like(rows.weights_BT)), WEIGHTS, 4, ALONE
    )
    assert losses.loss == 0.0 and losses.mtp_loss is None and losses.balance_loss is None
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(model).values())


def test_held_out_loss_is_the_sum_over_tokens(model):
    rows = packed_rows()
    losses = language_model_step(model, rows, WEIGHTS, 4, ALONE)
    model.zero_grad()
    same = (rows.segments_BT[:, 1:] == rows.segments_BT[:, :-1]) & (rows.segments_BT[:, 1:] > 0)
    count = float((same * rows.weights_BT[:, 1:]).sum())
    assert evaluate_loss(model, rows, 2, ALONE) == pytest.approx(losses.loss * count, rel=1e-5)


def test_rows_count_their_tokens_and_documents(model):
    rows = packed_rows()
    assert rows.n_tokens == 45
    assert sorted(rows.lengths()) == sorted(PIECES)
    main, both = 3 * forward_flops(model.config, PIECES), 3 * forward_flops(model.config, PIECES, mtp=True)
    assert training_parts(model.config, rows.lengths()) == {"training": main, "mtp": both - main} and both > main
    assert training_parts(model.config, rows.lengths(), mtp=False) == {"training": main, "mtp": 0.0}


def test_ranks_share_the_rows_and_all_take_part():
    """Five rows over two ranks: three each, the last of the second empty; together the whole batch."""
    rows = Rows(*(torch.arange(5)[:, None].expand(5, 2) + 1 for _ in range(3)))
    shares = [rows.shard(Parallel(rank, 2)) for rank in range(2)]
    assert [share.tokens_BT[:, 0].tolist() for share in shares] == [[1, 3, 5], [2, 4, 0]]
    assert shares[1].segments_BT[-1].tolist() == [0, 0] and shares[1].weights_BT[-1].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", ["", "off"])
@pytest.mark.parametrize(
    "shape", [{}, *(pytest.param(s, marks=pytest.mark.slow) for s in ({"q_lora_rank": None}, {"qk_norm": True}))]
)
def test_what_is_computed_again_gives_the_same_gradients_to_the_bit(
    make_model, deepseek, dense, shape, native, dtype, monkeypatch
):
    """What blocks keep instead is counted in tests/planning/test_memory.py."""
    monkeypatch.setenv("SLINGSHOT_NATIVE", native)
    found = {}
    for recompute in ("none", "selective", "full"):
        model = make_model(dense(**shape) if "qk_norm" in shape else deepseek(**shape))
        model.compute_dtype = dtype
        MemoryConfig(recompute=recompute).apply(model)
        losses = language_model_step(model, packed_rows(), WEIGHTS, 2, ALONE)
        found[recompute] = losses.loss, losses.mtp_loss, losses.balance_loss, gradients(model)
    for recompute in ("selective", "full"):
        assert found[recompute][:3] == found["none"][:3] and found[recompute][3].keys() == found["none"][3].keys()
        assert all(torch.equal(gradient, found["none"][3][name]) for name, gradient in found[recompute][3].items())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_of_some_tokens_at_a_time_give_the_same_gradients(model, temperature):
    hidden_ND = torch.randn(300, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    targets_N = torch.arange(300) % model.config.vocab_size
    found = []
    for chunk in (0, 128, 1000):
        MemoryConfig(logits_chunk=chunk).apply(model)
        given = hidden_ND.clone().requires_grad_()
        logprobs_N, entropies_N = head_logprobs(model, given, targets_N, temperature)
        (logprobs_N * torch.linspace(0, 1, 300)).sum().backward()
        found.append((logprobs_N.detach(), entropies_N, given.grad, *gradients(model).values()))
    MemoryConfig().apply(model)
    for one, chunked, large in zip(*found, strict=True):
        assert torch.allclose(one, chunked, atol=1e-5, rtol=1e-5) and torch.equal(one, large)


@pytest.mark.slow
def test_a_row_of_8192_tokens_learns_what_its_documents_do_each_in_a_row(make_model, deepseek):
    """Of an extended model: documents of 5,000, 3,000 and 192 tokens, whose positions in the long row are others."""
    extended = Yarn(factor=8.0, original_max_position_embeddings=1024).extended(deepseek(num_hidden_layers=2), "model")
    model, generator = make_model(extended), torch.Generator().manual_seed(0)
    lengths = [5000, 3000, 192]
    documents = [torch.randint(0, 64, (length,), generator=generator) for length in lengths]
    segments = [torch.full((length,), number) for number, length in enumerate(lengths, start=1)]
    long = Rows(torch.cat(documents)[None], torch.cat(segments)[None], torch.ones(1, 8192))
    apart = Rows(*(torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (
        documents, [torch.ones_like(document) for document in documents], [torch.ones(length) for length in lengths]
    )))  # fmt: skip
    weights = LanguageModelLoss(balance=0.0)  # which is of rows
    losses, expected = language_model_step(model, long, weights, 1, ALONE), gradients(model)
    again = language_model_step(model, apart, weights, 1, ALONE)
    assert (losses.loss, losses.mtp_loss) == pytest.approx((again.loss, again.mtp_loss), rel=1e-5)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name
