"""What goes into every matrix: x^T x of exactly the rows that it multiplies, once for matrices that read the same."""

import weakref

import pytest
import torch

from slingshot.checkpoint.load_save import load_model, open_weights
from slingshot.model.context import PackedContext
from slingshot.stages.pretrain import PretrainConfig
from slingshot.stages.pretrain import run as run_pretraining
from slingshot.training.calibration import Gram, by_layer, stream
from slingshot.training.fidelity import followed

MIXTURE = {
    "family": "deepseek_v3", "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
    "kv_lora_rank": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": None, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Two layers, the second a mixture, and an MTP module."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    sums = {"name": "arithmetic", "params": {"min_terms": 2, "max_terms": 2, "languages": ["en"]}}
    run = {
        "dtype": "float32", "threads": 1, "model": MIXTURE, "documents": {"tasks": [sums], "count": 200},
        "vocab_size": 300, "steps": 2, "sequence_length": 32, "batch_size": 4,
    }  # fmt: skip
    run_pretraining(PretrainConfig.parse(run, "base"), folder)
    return folder


def test_half_of_a_symmetric_product_is_all_of_it():
    rows = torch.randn(200, 1500, generator=torch.Generator().manual_seed(0))
    gram = Gram(1500)
    for part in rows.split(70):
        gram.add(part)
    whole = gram.whole()
    assert torch.equal(whole, whole.T) and gram.rows == 200
    assert torch.allclose(whole, rows.T @ rows, atol=1e-3) and torch.equal(gram.whole(), whole)


@pytest.fixture(scope="module")
def found(mixture):
    """By matrix its x^T x and rows, and the tokens that were read: more than go through a block's middle at a time."""
    texts = torch.randint(5, 250, (24, 23), generator=torch.Generator().manual_seed(0)).tolist()
    batches, inputs = stream(texts, 23, 4), {}

    def kept(name, weight, gram, rows):
        inputs[name] = gram, rows

    by_layer(open_weights(mixture), batches, kept)
    return inputs, batches


def test_every_token_goes_into_as_many_experts_as_it_chooses_and_no_row_is_repeated(mixture, found):
    inputs, batches = found
    model, chosen = load_model(mixture), torch.zeros(4)
    moe, seen = model.model.layers[1].mlp, list[torch.Tensor]()
    moe.gate.register_forward_hook(lambda _, args, routing: seen.append(routing.experts_Nk))
    with torch.no_grad():
        for tokens, segments, _ in batches:
            model(tokens, segments_BT=segments, context=PackedContext(model.config, tokens, segments))
    for experts in seen[: len(batches)]:
        chosen += experts.flatten().bincount(minlength=4)
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(4)]
    assert [inputs[name][1] for name in names] == chosen.int().tolist()
    assert chosen.sum() == 2 * 24 * 23


def test_matrices_that_read_the_same_have_one_gram_and_what_is_not_packed_has_none(found):
    inputs, _ = found
    attention = "model.layers.0.self_attn"
    assert inputs[f"{attention}.q_proj.weight"][0] is inputs[f"{attention}.kv_a_proj_with_mqa.weight"][0]
    dense, shared = "model.layers.0.mlp", "model.layers.1.mlp.shared_experts"
    for module in (dense, shared, "model.layers.1.mlp.experts.2"):
        gate, up, down = (inputs[f"{module}.{part}_proj.weight"][0] for part in ("gate", "up", "down"))
        assert gate is up and down is not gate
    assert not any("kv_b_proj" in name or "eh_proj" in name for name in inputs)
    assert any(name.startswith("model.layers.2.") for name in inputs)
    assert all(rows == 24 * 23 for name, (_, rows) in inputs.items() if ".experts." not in name)


def test_the_first_layers_inputs_are_its_normalised_embeddings(mixture, found):
    inputs, batches = found
    model = load_model(mixture).model
    with torch.no_grad():
        rows = torch.cat(
            [model.layers[0].input_layernorm(model.embed_tokens(tokens)).flatten(0, 1) for tokens, *_ in batches]
        )
    assert torch.allclose(inputs["model.layers.0.self_attn.q_proj.weight"][0], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_the_second_layers_inputs_are_what_the_model_makes_there(mixture, found):
    """Also where a feed-forward block reads the text in pieces."""
    inputs, batches = found
    model, seen = load_model(mixture), list[torch.Tensor]()
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for tokens, segments, _ in batches:
            model(tokens, segments_BT=segments)
    rows = torch.cat(seen)
    assert torch.allclose(inputs["model.layers.1.self_attn.q_proj.weight"][0], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_what_went_into_a_layer_is_gone_when_the_next_is_read(mixture, found):
    _, batches = found
    grams, held = list[tuple[str, weakref.ref[torch.Tensor]]](), list[str]()

    def watched(name, _, gram, __):
        layer = name.split(".")[2]
        held.extend(old for old, its in grams if old.split(".")[2] != layer and its() is not None)
        grams.append((name, weakref.ref(gram)))

    by_layer(open_weights(mixture), batches, watched)
    assert len({name.split(".")[2] for name, _ in grams}) == 3 and not held


def test_a_matrix_sees_what_those_before_it_were_changed_to(mixture, found):
    """Of its own layer and of those below."""
    inputs, batches = found
    grams = {}

    def without_keys_and_values(name, weight, gram, _):
        grams[name] = gram.clone()
        if name == "model.layers.0.self_attn.kv_a_proj_with_mqa.weight":
            weight.zero_()

    by_layer(open_weights(mixture), batches, without_keys_and_values)
    assert not grams["model.layers.0.self_attn.o_proj.weight"].any()
    assert torch.equal(grams.pop(first := "model.layers.0.self_attn.q_proj.weight"), inputs[first][0])
    moved = [not torch.equal(grams[name], inputs[name][0]) for name in grams if ".layers.1." in name and "attn" in name]
    assert moved and all(moved)


def test_of_texts_with_masks_what_was_written_counts_alone_and_where_none_was_kept_all_of_it():
    texts, written = [[1, 2, 3, 4, 5], [6, 7, 8]], [[0, 0, 1, 1, 1], [0, 1, 1]]
    (batch,) = stream(texts, 4, 2, written)
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]] and batch.segments_BT[1].tolist() == [1, 2, 2, 2]
    assert followed(batch).tolist() == [[False, True, True], [False, True, True]]  # 5 begins a row: nothing before it
    (whole,), (prompts,) = stream(texts, 8, 1), stream(texts, 8, 1, [[0] * 5, [0] * 3])
    assert followed(whole).sum() == followed(prompts).sum() == 6
