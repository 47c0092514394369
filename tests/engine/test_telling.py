"""What is told of a forward pass: logprobs of prompts and routed experts, against one pass without a cache."""

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.rollout.sampler import EngineSampler


def prompt_of(size, seed):
    return torch.randint(7, 290, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def moe_model(tokenizer, make_model, deepseek):
    return make_model(deepseek(vocab_size=tokenizer.vocab_size, max_position_embeddings=512))


@torch.no_grad()
def full_pass(model, ids):
    """Logits of all tokens and the experts of every MoE layer by one forward pass: [T, V], [T, L, k]."""
    chosen, layers = [], [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda _, __, routing: chosen.append(routing.experts_Nk)) for gate in layers]
    try:
        return model(torch.tensor([ids])).logits_BTV[0], torch.stack(chosen, dim=1) if chosen else None
    finally:
        for hook in hooks:
            hook.remove()


WANTED = [{"prompt_logprobs": 0}, {}, {"prompt_logprobs": 3, "n": 3}, {"prompt_logprobs": 2}, {"prompt_logprobs": 1},
          {"n": 2}]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"step_tokens": 48, "max_batch": 4}])
def test_prompt_logprobs_are_those_of_a_full_pass(model, tokenizer, options):
    """In chunks, among requests that ask for none, for prompts whose beginning is in the cache."""
    engine = Engine(model, tokenizer, max_length=256, **options)
    first = prompt_of(220, 1)
    prompts = [first, prompt_of(40, 2), first[:33], first, [9], first[:17]]
    params = [SamplingParams(max_tokens=6, temperature=0.5, **more) for more in WANTED]
    for _ in range(2):
        outputs = engine.generate(prompts, params)
        for prompt, its, output in zip(prompts, params, outputs, strict=True):
            if its.prompt_logprobs is None:
                assert output.prompt_logprobs is None and output.prompt_top_logprobs is None
                continue
            own_TV = full_pass(model, prompt)[0].log_softmax(-1)
            told = output.prompt_logprobs
            assert told[0] is None and len(told) == len(prompt)
            expected = own_TV[:-1].gather(-1, torch.tensor(prompt)[1:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(told[1:]), expected, atol=2e-4, rtol=1e-4)
            if not its.prompt_logprobs:
                assert output.prompt_top_logprobs is None
                continue
            assert output.prompt_top_logprobs[0] is None
            for row_V, top in zip(own_TV, output.prompt_top_logprobs[1:], strict=False):
                best = row_V.topk(its.prompt_logprobs).values
                torch.testing.assert_close(torch.tensor([*top.values()]), best, atol=2e-4, rtol=1e-4)
                torch.testing.assert_close(row_V[[*top]], best, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"cache_bytes": 80_000}, pytest.param({"step_tokens": 20, "max_batch": 3}, marks=pytest.mark.slow)]
)
def test_routed_experts_are_those_of_a_full_pass(moe_model, tokenizer, options):
    """Of prompt and sample, for samples that share a prompt, run in chunks, or gave their pages up on the way."""
    engine = Engine(moe_model, tokenizer, max_length=128, **options)
    prompts = [prompt_of(size, 3)[:size] for size in (60, 60, 1, 33, 17)]
    params = [SamplingParams(max_tokens=30, n=1 + row % 3, routed_experts=row != 3, seed=row) for row in range(5)]
    different = total = 0
    for prompt, its, output in zip(prompts, params, engine.generate(prompts, params), strict=True):
        for completion in output.outputs:
            if not its.routed_experts:
                assert completion.routed_experts is None
                continue
            ids = prompt + completion.token_ids
            _, expected = full_pass(moe_model, ids)
            assert completion.routed_experts.shape == (len(ids) - 1, *expected.shape[1:])
            told, own = completion.routed_experts.long().sort(-1).values, expected[:-1].sort(-1).values
            different, total = different + (told != own).any(-1).sum().item(), total + told.shape[0] * told.shape[1]
    assert total > 500 and different <= 0.01 * total  # where two scores are nearly equal
    if "cache_bytes" in options:
        assert engine.counters.preemptions > 0


@pytest.mark.parametrize(
    "options", [{"max_batch": 2, "step_tokens": 9}, pytest.param({"cache_bytes": 38_000}, marks=pytest.mark.slow)]
)
def test_guessing_changes_nothing_of_what_is_told(guesser, tokenizer, options):
    """Likeliest tokens and experts of traced requests, and which tokens had been guessed."""
    told, prompts = [], [prompt_of(size, size)[:size] for size in (3, 17, 40)]
    params = SamplingParams(24, 0.8, seed=3, ignore_eos=True, top_logprobs=3)
    for speculation in ("off", "on"):
        engine = Engine(guesser, tokenizer, speculation=speculation, **options)
        requests = [engine.submit(prompt, params, traced=True) for prompt in prompts]
        while engine.unfinished:
            engine.advance()
        told.append([request.sequences[0] for request in requests])
        accepted = sum(len(sequence.accepted) for sequence in told[-1])
        assert accepted == engine.counters.accepted and (accepted > 12) == (speculation == "on")
    for plain, guessed in zip(*told, strict=True):
        assert guessed.token_ids == plain.token_ids and guessed.accepted <= set(range(24))
        assert [[*top] for top in guessed.top_logprobs] == [[*top] for top in plain.top_logprobs]
        assert guessed.experts_of(0, 24) == plain.experts_of(0, 24)


def test_a_traced_request_finds_its_prompt_in_the_cache(moe_model, tokenizer):
    engine, prompt = Engine(moe_model, tokenizer, max_length=128), prompt_of(50, 5)
    first, again = (engine.submit(prompt, SamplingParams(9, seed=1), traced=True) for _ in range(2))
    while engine.unfinished:
        engine.advance()
    later = engine.submit(prompt, SamplingParams(9, seed=1), traced=True)
    while engine.unfinished:
        engine.advance()
    assert later.cached == 48 and first.cached == 0
    told = [request.sequences[0].experts_of(0, 9) for request in (first, again, later)]
    assert len(told[0]) == 9 and told[0] == told[1] == told[2]


def test_the_sampler_hands_them_on(moe_model, tokenizer):
    params = [SamplingParams(max_tokens=5, n=2, routed_experts=row == 0) for row in range(2)]
    found = list(EngineSampler(Engine(moe_model, tokenizer)).sample([[9, 10, 11]] * 2, params, ["a", "b"]))
    assert len(found) == 4
    for index, _, sampled in found:
        assert (sampled.routed_experts is None) if index else len(sampled.routed_experts) == 2 + len(sampled.ids)


def test_a_model_without_experts_is_told_so(dense_model, tokenizer):
    with pytest.raises(SlingshotError, match="routed_experts: this model has none"):
        Engine(dense_model, tokenizer).add([9], SamplingParams(routed_experts=True))
