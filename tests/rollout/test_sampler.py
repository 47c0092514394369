"""Samplers: the engine beside a model in training, and the script that stands in for it."""

from dataclasses import replace

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.rollout.sampler import EngineSampler, SamplingConfig, ScriptedSampler
from slingshot.tasks.task import Solution

PROMPTS, KEYS = [[3, 45, 91], [3, 75]], ["a", "b"]


@pytest.fixture(scope="module")
def model(make_model, dense):
    return make_model(dense(vocab_size=300, max_position_embeddings=64))


THREE = SamplingParams(n=3, max_tokens=8)


def drawn(sampler, params=THREE):
    found = {(index, number): sampled for index, number, sampled in sampler.sample(PROMPTS, [params] * 2, KEYS)}
    return [[found[index, number] for number in range(params.n)] for index in range(2)]


def test_the_engine_gives_samples_as_they_end_and_goes_by_their_keys(model, tokenizer):
    sampler = EngineSampler(Engine(model, tokenizer))
    whole = Engine(model, tokenizer).generate(PROMPTS, THREE, KEYS)
    for samples, output in zip(drawn(sampler), whole, strict=True):
        expected = [(c.token_ids, c.logprobs, c.finish_reason) for c in output.outputs]
        assert [(s.ids, s.logprobs, s.finish_reason) for s in samples] == expected
    sizes = [SamplingParams(max_tokens=size, ignore_eos=True) for size in (9, 2)]
    assert [index for index, *_ in sampler.sample(PROMPTS, sizes, KEYS)] == [1, 0]
    many = SamplingParams(n=8, max_tokens=60)
    ended = [(len(each.ids), index) for index, _, each in sampler.sample(PROMPTS, [many] * 2, KEYS)]
    assert [length for length, _ in ended] == sorted(length for length, _ in ended) and ended[0][0] < ended[-1][0]
    assert len({index for _, index in ended[:8]}) == 2  # no group waits until it is whole
    broken_off = sampler.sample(PROMPTS, sizes, KEYS)
    next(broken_off)
    broken_off.close()
    sampler.update_weights(1, model.state_dict())  # refused while anything is under way


@pytest.mark.parametrize(("dtype", "alone"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_an_engine_beside_a_model_in_training(model, make_model, tokenizer, dtype, alone):
    """A lone float32 model shares its parameters and needs no copies; in all cases an update reaches the samples."""
    sampler = EngineSampler.beside(model, tokenizer, dtype, alone)
    greedy = SamplingParams(max_tokens=8, temperature=0)
    before = drawn(sampler, greedy)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        model.load_state_dict(make_model(model.config, seed=1).state_dict())
        shared = drawn(sampler, greedy) != before
        assert shared == (dtype == torch.float32 and alone)
        sampler.update_weights(1, model.state_dict())
        after = drawn(sampler, greedy)
        assert after != before
        if dtype == torch.float32:
            assert after == drawn(EngineSampler(Engine(model, tokenizer)), greedy)
    finally:
        model.load_state_dict(state)


def test_a_script_is_said_in_r1s_layout_or_as_it_stands(tokenizer, dense):
    script = {"a": [Solution("3 plus 4", "7"), "What", "What is 3+4? 3 plus 4 is 7." * 2]}
    sampler = ScriptedSampler(lambda key, index: script["a"][index], tokenizer, dense(max_position_embeddings=32))
    samples = [sampled for *_, sampled in sampler.sample(PROMPTS[:1], [SamplingParams(n=3, max_tokens=20)], KEYS[:1])]
    assert [s.finish_reason for s in samples] == ["stop", "stop", "length"] and len(samples[2].ids) == 20
    assert [tokenizer.decode(s.ids) for s in samples[:2]] == ["<think>\n3 plus 4\n</think>\n\n7", "What"]
    assert all(s.ids[-1] == tokenizer.eos_id and len(s.logprobs) == len(s.ids) for s in samples[:2])


def test_a_timed_script_takes_as_many_steps_as_it_has_tokens(model, tokenizer):
    asked = []

    class Recording(EngineSampler):
        def sample(self, *arguments):
            asked.append(arguments)
            return super().sample(*arguments)

    def script(key, index):
        return "What is 3+4?" if key == "a" else Solution("3 plus 4 is 7", "7" * index)

    untimed = ScriptedSampler(script, tokenizer, model.config)
    timed = ScriptedSampler(script, tokenizer, model.config, timed=Recording(Engine(model, tokenizer)))
    params = SamplingParams(n=2, max_tokens=32)
    assert drawn(timed, params) == drawn(untimed, params)
    longest = [max(len(s.ids) for s in samples) for samples in drawn(untimed, params)]
    assert asked[0][1] == [replace(params, max_tokens=size, ignore_eos=True) for size in longest]
    timed.update_weights(3, model.state_dict())
    with pytest.raises(SlingshotError, match="is missing"):
        timed.update_weights(4, {})


def test_impossible_sampling_is_refused():
    impossible = {"max_tokens": [0], "temperature": [-0.1, float("nan")], "top_p": [0.0], "top_k": [-1]}
    for key, value in ((key, value) for key, values in impossible.items() for value in values):
        with pytest.raises(SlingshotError, match=f"sampling.*{key}|{value}"):
            SamplingConfig.parse({key: value}, "sampling")
    assert SamplingConfig(max_tokens=3, top_k=2).params(4, 5) == SamplingParams(max_tokens=3, top_k=2, n=4, seed=5)
