"""Guessed tokens change nothing but the number of steps."""

import pytest
import torch

from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.speculation import AGAIN, TRIAL, NgramIndex, Payoff

from .asking import prompts_of, token_ids
from .test_scheduler import run


def both_ways(model, tokenizer, prompts, params, **options):
    """Outputs without and with guesses, and the counters of the latter."""
    plain = run(Engine(model, tokenizer, **options), prompts, params)
    engine = Engine(model, tokenizer, speculation="on", **options)
    guessed = run(engine, prompts, params)
    assert engine.counters.pages_used == engine.counters.running == 0
    return plain, guessed, engine.counters


@pytest.mark.parametrize(
    ("temperature", "options"),
    [
        (0.0, {}), pytest.param(0.8, {"max_batch": 2, "step_tokens": 9}, marks=pytest.mark.slow),
        pytest.param(0.8, {"cache_bytes": 38_000}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_tokens_are_those_of_plain_decoding(guesser, tokenizer, temperature, options):
    """Prompts of all lengths, some with a prefix in common, n samples, stops and limits inside of accepted guesses."""
    shared, sure = prompts_of(40)[0], SamplingParams(40, temperature, seed=3, ignore_eos=True)
    prompts = [*prompts_of(3, 17, 50), shared, [*shared[:35], 9]]
    twice, stopped = SamplingParams(40, temperature, n=2), SamplingParams(40, temperature, stop=("e",))
    params = [sure, twice, sure, stopped, sure]
    plain, guessed, counters = both_ways(guesser, tokenizer, prompts, params, **options)
    assert token_ids(guessed) == token_ids(plain)
    for ours, theirs in zip(guessed, plain, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4) and one.text == other.text
    assert counters.drafted > 50 and 0.1 < counters.accepted / counters.drafted < 1
    sampled = sum(len(ids) for output in token_ids(guessed) for ids in output)
    assert counters.decoded == sampled and counters.steps < sampled


def test_a_module_that_is_always_right_saves_most_steps(guesser, tokenizer, monkeypatch):
    """Each step gives one token more than the last, up to all guesses and one."""
    monkeypatch.setattr(guesser, "sure", 1.0)
    params = [SamplingParams(45, 1.0, seed=1, ignore_eos=True)]
    plain, guessed, counters = both_ways(guesser, tokenizer, prompts_of(20), params)
    assert token_ids(guessed) == token_ids(plain)
    assert counters.accepted == counters.drafted and counters.steps < 45 / 3


def test_rows_that_need_more_than_the_plain_sampler_are_not_guessed_for(guesser, tokenizer):
    prompts, params = prompts_of(9, 10), [SamplingParams(40, 0.7, presence_penalty=1.0, ignore_eos=True)] * 2
    plain, guessed, counters = both_ways(guesser, tokenizer, prompts, params)
    assert token_ids(guessed) == token_ids(plain) and counters.drafted == 0


def test_what_stood_there_before_is_guessed_where_there_is_no_module(dense_model, tokenizer):
    """Greedy decoding of a random model runs in circles sooner or later."""
    params = [SamplingParams(150, 0.0, ignore_eos=True)] * 2
    plain, guessed, counters = both_ways(dense_model, tokenizer, prompts_of(5, 20), params)
    assert token_ids(guessed) == token_ids(plain)
    assert counters.accepted > 50 and counters.steps < 2 * 150 - counters.accepted / 2


def test_an_ngram_is_continued_as_it_was_the_last_time():
    index = NgramIndex()
    assert index.guess([1, 2, 3, 4, 1, 2], 3) == []
    assert index.guess([1, 2, 3, 4, 1, 2, 3], 3) == [4, 1, 2]
    assert index.guess([1, 2, 3, 4, 1, 2, 3, 5], 3) == []
    assert index.guess([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 2) == [5, 1]
    assert NgramIndex().guess([7] * 10, 2) == [7]


@pytest.mark.slow
def test_sampled_pairs_follow_the_models_distribution(guesser, tokenizer):
    """800 samples, their tokens guessed right or wrong from the next page on, against a full pass's probabilities."""
    prompt, temperature = prompts_of(31)[0], 0.5
    engine = Engine(guesser, tokenizer, speculation="on")
    (output,) = engine.generate([prompt], SamplingParams(8, temperature, n=800, ignore_eos=True))
    assert engine.counters.accepted > 300
    texts = torch.tensor([completion.token_ids for completion in output.outputs])
    contexts = torch.cat((torch.tensor(prompt).expand(800, -1), texts), dim=1)
    with torch.inference_mode():
        probabilities = (guesser(contexts).logits_BTV[:, len(prompt) - 1 : -1] / temperature).softmax(-1)
    for token_id in probabilities.mean((0, 1)).topk(8).indices.tolist():
        # At each place the number of times a token came minus its probabilities is a sum of martingale differences.
        difference = ((texts == token_id).float() - probabilities[..., token_id]).sum(0)
        deviation = (probabilities[..., token_id] * (1 - probabilities[..., token_id])).sum(0).sqrt()
        assert (difference / deviation).abs().max() < 4.7  # once in 6000 for 64 numbers


def test_guessing_goes_on_where_it_pays_and_is_tried_again():
    payoff = Payoff()

    def steps(count, rows, seconds):
        chosen = []
        for _ in range(count):
            chosen.append(payoff.pays(rows))
            payoff.note(rows, chosen[-1], 2 * rows if chosen[-1] else rows, seconds(chosen[-1]))
        return chosen

    few = steps(500, 1, lambda guessing: 1.3 if guessing else 1.0)
    many = steps(500, 100, lambda guessing: 2.5 if guessing else 1.0)
    assert all(few[2 * TRIAL :]) and not any(many[2 * TRIAL :])
    assert sum(steps(3 * AGAIN, 100, lambda guessing: 2.5 if guessing else 1.0)) in range(2 * TRIAL // 2, 4 * TRIAL)
    assert all(steps(100 + TRIAL + AGAIN, 100, lambda guessing: 1.5 if guessing else 1.0)[-100:])
