"""The torch runner over pages against the model's own forward pass."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.engine.batch import FlatBatch
from slingshot.engine.runner import TorchRunner

from .asking import logits_in_pieces, used_cache


def runner_of(model):
    return TorchRunner(model, used_cache(model, torch.float32))


@settings(max_examples=10)
@given(data=st.data())
def test_sequences_in_any_pieces_give_the_logits_of_a_full_forward_pass(model, data):
    for found_V, expected_V in logits_in_pieces(runner_of(model), model, data):
        torch.testing.assert_close(found_V, expected_V, atol=2e-4, rtol=1e-4)


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
