"""The torch runner over pages against the model's own forward pass."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.engine.batch import PAGE, FlatBatch
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.runner import TorchRunner

PAGES = 40


def runner_of(model):
    cache = KVCache(model.config, PAGES, torch.float32, mtp=model.config.num_nextn_predict_layers > 0)
    for layer in cache.layers:
        layer.fill_(1e3)  # whatever an earlier sequence left
    return TorchRunner(model, cache)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@torch.inference_mode()
def test_sequences_in_any_pieces_give_the_logits_of_a_full_forward_pass(model, data):
    """Chunks and single tokens of several sequences in one flat batch, pages in any order."""
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(len(lengths))
    sequences = [torch.randint(7, 290, (length,), generator=generator).tolist() for length in lengths]
    pages = data.draw(st.permutations(range(1, PAGES)))
    tables = [[pages.pop() for _ in range(-(-length // PAGE))] for length in lengths]
    expected = [model(torch.tensor([ids])).logits_BTV[0] for ids in sequences]
    runner, done = runner_of(model), [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        rows = [row for row, length in enumerate(lengths) if done[row] < length]
        sizes = {row: data.draw(st.sampled_from([1, 1, 7, 40])) for row in rows}
        parts = [(sequences[row][done[row] : done[row] + sizes[row]], done[row], tables[row]) for row in rows]
        output = runner.forward(FlatBatch.of(parts))
        for row, logits_V, (ids, _, _) in zip(rows, output.logits_RV, parts, strict=True):
            done[row] += len(ids)
            torch.testing.assert_close(logits_V, expected[row][done[row] - 1], atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def test_wanted_hidden_and_routing_are_of_the_tokens_asked_for(model):
    ids = list(range(10, 40))
    chosen, hooks = [], []
    for layer in model.moe_layers()[: model.config.num_hidden_layers - model.config.first_k_dense_replace]:
        hooks.append(layer.gate.register_forward_hook(lambda _, __, routing: chosen.append(routing.experts_Nk)))
    full = model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    batch = FlatBatch.of([(ids, 0, [3, 1])], wanted=[4, 29, 4], hidden=True, routing=True)
    output = runner_of(model).forward(batch)
    torch.testing.assert_close(output.logits_RV, full.logits_BTV[0, [4, 29, 4]], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(output.hidden_ND, full.hidden_BTD[0], atol=2e-4, rtol=1e-4)
    assert output.routing_NLk is None if not chosen else torch.equal(output.routing_NLk.long(), torch.stack(chosen, 1))


@torch.inference_mode()
def test_draft_is_the_mtp_module_over_its_own_layer_of_the_cache(make_model, deepseek, tokenizer):
    model = make_model(deepseek(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1))
    ids = torch.randint(7, 290, (1, 25), generator=torch.Generator().manual_seed(0))
    full = model(ids, mtp=True)
    expected_TV = model.lm_logits(full.mtp_hidden_BTD)[0]
    runner, pages = runner_of(model), [5, 2]
    for first, end in ((0, 20), (20, 21), (21, 24)):
        main = runner.forward(FlatBatch.of([(ids[0, first:end].tolist(), first, pages)], hidden=True))
        following = FlatBatch.of([(ids[0, first + 1 : end + 1].tolist(), first, pages)], hidden=True)
        output = runner.draft(following, main.hidden_ND)
        torch.testing.assert_close(output.logits_RV[0], expected_TV[end - 1], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(output.hidden_ND, full.mtp_hidden_BTD[0, first:end], atol=2e-4, rtol=1e-4)
