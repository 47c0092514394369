"""Penalties, biases, forbidden words and what is told of logprobs, against a plain reading of their definitions."""

from dataclasses import replace

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine
from slingshot.engine.row_sampler import RowSampler
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.sequence import Request

PROMPT = [20, 31, 31, 40, 7]


@torch.no_grad()
def full_logits(model, prompt, sampled):
    """Logits in the place of every sampled token, by one forward pass without a cache."""
    return model(torch.tensor([prompt + sampled])).logits_BTV[0, len(prompt) - 1 : -1]


def plainly(logits_V, params, prompt, sampled):
    """The logits that a token is drawn from, written as the definitions read."""
    logits_V = logits_V.clone()
    for token_id in {*prompt, *sampled}:
        logit, penalty = logits_V[token_id], params.repetition_penalty
        logits_V[token_id] = logit / penalty if logit > 0 else logit * penalty
    for token_id in set(sampled):
        logits_V[token_id] -= params.presence_penalty + params.frequency_penalty * sampled.count(token_id)
    for token_id, bias in params.logit_bias:
        logits_V[token_id] += bias
    for word in params.bad_words:
        if [*sampled, word[-1]][-len(word) :] == list(word):
            logits_V[word[-1]] = -torch.inf
    return logits_V


MIXTURE = [
    {}, {"repetition_penalty": 1.8}, {"repetition_penalty": 0.7, "presence_penalty": 1.5}, {"frequency_penalty": 0.9},
    {"frequency_penalty": -1.0, "logit_bias": {50: 9.0, 60: 8.5, 70: float("-inf")}}, {"logit_bias": {"33": 30}},
    {"bad_words": ((31,), (50, 51))}, {"presence_penalty": -2.0, "bad_words": ((40,),), "logit_bias": {40: 50.0}},
]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mixture_of_requests_follows_the_definitions(model, tokenizer, temperature):
    """Greedy tokens are the likeliest of the changed logits; logprobs are the model's own, unchanged."""
    params = [
        SamplingParams(24, temperature, seed=number, ignore_eos=True, **more) for number, more in enumerate(MIXTURE)
    ]
    outputs = Engine(model, tokenizer, max_batch=5).generate([PROMPT] * len(params), params)
    for output, its in zip(outputs, params, strict=True):
        (completion,) = output.outputs
        ids = completion.token_ids
        own_TV = full_logits(model, PROMPT, ids)
        expected = (own_TV / (temperature or 1.0)).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-4, rtol=1e-4)
        for place, token_id in enumerate(ids):
            logits_V = plainly(own_TV[place], its, PROMPT, ids[:place])
            assert logits_V[token_id] > (logits_V.max() - 1e-3 if temperature == 0 else -torch.inf)


def rows_of(vocabulary, *params):
    return [
        Request(number, PROMPT, its, str(number), 500, vocabulary, False).sequences[0]
        for number, its in enumerate(params)
    ]


def test_a_sample_that_is_taken_up_again_goes_on_as_if_it_had_never_stopped(dense_model, tokenizer):
    """Penalties and bad words know what it said before; its noise is that of its places."""
    engine, parted = Engine(dense_model, tokenizer), tokenizer.encode("7 minus 2")
    for more in [*MIXTURE, {"bad_words": ("us",), "logit_bias": dict.fromkeys(parted, 40.0)}]:
        params = SamplingParams(max_tokens=16, ignore_eos=True, seed=3, **more)
        (whole,) = engine.generate([PROMPT], params, keys=["a"])[0].outputs
        for size in (1, 7, 15):
            said = whole.token_ids[:size]
            request = engine.submit([*PROMPT, *said], replace(params, max_tokens=16 - size), "a", said=size)
            while request.result is None:
                engine.advance()
            assert request.result.outputs[0].token_ids == whole.token_ids[size:], (more, size)


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(vocabulary):
    """To the last bit, from the same logits: rows of 16 requests come and go and change places, and each alone."""
    drawn = [{**MIXTURE[row % 8], "top_logprobs": row % 3, "thinking_budget": (None, 4)[row % 2]} for row in range(16)]
    params = [
        SamplingParams(100, (0.0, 0.8, 1.3)[row % 3], (1.0, 0.9)[row // 8], **more) for row, more in enumerate(drawn)
    ]
    kept, alone = rows_of(vocabulary, *params), rows_of(vocabulary, *params)
    generator, sampler = torch.Generator().manual_seed(0), RowSampler()
    for _ in range(24):
        rows = torch.randperm(16, generator=generator)[: int(torch.randint(1, 17, (), generator=generator))].tolist()
        logits_RV = torch.randn(len(rows), vocabulary.size, generator=generator) * 3
        ids, logprobs = sampler.draw(logits_RV.clone(), [kept[row] for row in rows])
        for place, (row, token_id, logprob) in enumerate(zip(rows, ids, logprobs, strict=True)):
            assert RowSampler().draw(logits_RV[[place]], [alone[row]]) == ([token_id], [logprob])
            kept[row].push(token_id, logprob)
            alone[row].push(token_id, logprob)
    assert [sequence.top_logprobs for sequence in kept] == [sequence.top_logprobs for sequence in alone]


def test_rows_with_too_few_candidates_are_drawn_again(vocabulary):
    """On a GPU nobody waits to know how many a row has; a distribution so flat that three are never enough."""
    params = [SamplingParams(100, top_p=0.9), SamplingParams(100, top_k=2), SamplingParams(100, temperature=0)]
    rows, generator = rows_of(vocabulary, *params), torch.Generator().manual_seed(0)
    few, whole = RowSampler(candidates=3), RowSampler()
    for _ in range(5):
        logits_RV = torch.rand(3, vocabulary.size, generator=generator)
        (ids, logprobs), expected = few.draw(logits_RV, rows), whole.draw(logits_RV, rows)
        assert ids == expected[0] and logprobs == pytest.approx(expected[1], abs=1e-5)
    with pytest.raises(SlingshotError, match="not finite"):
        few.draw(logits_RV * torch.nan, rows)


def spellings(tokenizer, vocabulary, word):
    """Ways to write a word in tokens: as encoded, character by character, byte by byte, within longer tokens."""
    single = {spelt: token_id for token_id, spelt in enumerate(vocabulary.spelt) if len(spelt) == 1}
    yield tokenizer.encode(word)
    yield [token_id for character in word for token_id in tokenizer.encode(character)]
    yield [single[bytes([byte])] for byte in word.encode()]
    yield tokenizer.encode(f"the {word}d on")
    yield tokenizer.encode(f"{word[0]}{word}{word[0]}")


@pytest.mark.parametrize("word", ["e", "th", " 3", "足す", "😀", "en", "until"])
def test_a_bad_word_is_never_said_however_it_is_spelt(tokenizer, vocabulary, say, word):
    """Nothing else is forbidden: what leads up to it is said, up to the token that would complete it."""
    scripts = [[*tokenizer.encode("3 4 "), *ids] for ids in spellings(tokenizer, vocabulary, word)]
    free, held = (
        say([(PROMPT, ids, {"bad_words": words, "max_tokens": len(ids)}) for ids in scripts]) for words in ((), (word,))
    )
    for ids, said, instead in zip(scripts, free, held, strict=True):
        assert word in said.outputs[0].text and word not in instead.outputs[0].text
        whole = next(count for count in range(len(ids)) if word in tokenizer.decode(ids[: count + 1]))
        assert instead.outputs[0].token_ids[:whole] == ids[:whole]


def test_top_logprobs_are_the_models_own(model, tokenizer):
    """In every place, at the sampling temperature, whatever penalties and truncation did to the draw."""
    counts = [0, 1, 5, 1000]
    more = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.5, "max_tokens": 12}
    params = [SamplingParams(top_logprobs=count, seed=count, **more) for count in counts]
    for output, count in zip(Engine(model, tokenizer).generate([PROMPT] * 4, params), counts, strict=True):
        (completion,) = output.outputs
        if not count:
            assert completion.top_logprobs is None
            continue
        logprobs_TV = (full_logits(model, PROMPT, completion.token_ids) / 0.7).log_softmax(-1)
        assert len(completion.top_logprobs) == len(completion.token_ids)
        for place, told in enumerate(completion.top_logprobs):
            assert len(told) == min(count, tokenizer.vocab_size) and sorted(told.values(), reverse=True) == [
                *told.values()
            ]
            own = logprobs_TV[place]
            torch.testing.assert_close(own[list(told)], torch.tensor([*told.values()]), atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(own.topk(len(told)).values, own[list(told)], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"logit_bias": {9999: 1}}, "logit_bias names token id 9999, the model's vocabulary has"),
        ({"logit_bias": {-1: 1}}, "logit_bias names token id -1"),
        ({"bad_words": ((1, 9999),)}, "bad_words names token id 9999"),
        ({"stop_token_ids": (9999,)}, "stop_token_ids names token id 9999"),
    ],
)  # fmt: skip
def test_ids_beyond_the_vocabulary_are_refused_and_others_go_on(dense_model, tokenizer, params, named):
    engine = Engine(dense_model, tokenizer)
    running = engine.add(PROMPT, SamplingParams(max_tokens=3))
    with pytest.raises(SlingshotError, match=named):
        engine.add(PROMPT, SamplingParams(**params))
    outputs = [output for _ in range(5) for output in engine.step()]
    assert [output.request_id for output in outputs] == [running] and engine.unfinished == 0
