"""The engine against full forward passes, and its scheduling against one request at a time."""

import copy
import itertools
import math
import threading
from functools import partial

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.engine.engine import Engine, PromptError
from slingshot.engine.sampling import SamplingParams

from .asking import CHAT, PROMPT, ask, full_logprobs, prompts_of, read, token_ids


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_sampler_logprobs_equal_a_full_forward_pass(model, tokenizer, temperature):
    """Greedy tokens are its argmax, with their log probabilities at temperature 1."""
    params = SamplingParams(max_tokens=24, temperature=temperature, top_p=0.9, n=3, seed=5)
    for output in Engine(model, tokenizer).generate(prompts_of(1, 4, 30, 31, 9), params):
        for completion in output.outputs:
            logprobs_TV = full_logprobs(model, output.prompt_token_ids, completion.token_ids, temperature)
            ids = torch.tensor(completion.token_ids)
            expected = logprobs_TV.gather(-1, ids[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-4, rtol=1e-4)
            assert temperature or torch.equal(ids, logprobs_TV.argmax(-1))


def test_batched_generation_equals_one_by_one(model, tokenizer):
    """Slots fewer than samples, lengths and budgets all different, so sequences leave and enter at every step."""
    prompts = prompts_of(3, 17, 1, 40, 8, 8, 25, 2, 11, 33)
    temperatures, top_ps = (0.0, 0.7, 1.3), (1.0, 0.9)
    params = [
        SamplingParams(3 + 5 * i % 23, temperatures[i % 3], top_ps[i % 2], 20 * (i % 4), n=1 + i % 3) for i in range(10)
    ]
    together = Engine(model, tokenizer, max_batch=4).generate(prompts, params)
    alone = [Engine(model, tokenizer).generate([one], its)[0] for one, its in zip(prompts, params, strict=True)]
    assert token_ids(together) == token_ids(alone)
    ours, theirs = ([one for output in outputs for one in output.outputs] for outputs in (together, alone))
    assert all(a.logprobs == pytest.approx(b.logprobs, abs=1e-4) for a, b in zip(ours, theirs, strict=True))
    assert len({len(completion.token_ids) for completion in ours}) > 5


def test_seed_sample_and_key_decide_the_tokens(dense_model, tokenizer):
    engine, prompts = Engine(dense_model, tokenizer), prompts_of(9)

    def run(n=2, key=None, **params):
        return token_ids(engine.generate(prompts, SamplingParams(max_tokens=16, n=n, **params), key and [key]))[0]

    assert run(seed=3) == run(seed=3)
    assert run(seed=3) != run(seed=4)
    assert run(n=5, seed=3)[:2] == run(n=2, seed=3)
    assert run(key="a") == run(key="a") != run(key="b")


def test_ends_at_eos_with_its_logprob_but_not_in_the_text(dense_model, tokenizer):
    completions = ask(Engine(dense_model, tokenizer), PROMPT, max_tokens=200, temperature=1.5, n=32)
    assert "stop" in {completion.finish_reason for completion in completions}
    for completion in completions:
        *before, last = ids = completion.token_ids
        assert tokenizer.eos_id not in before and len(completion.logprobs) == len(ids)
        stopped = completion.finish_reason == "stop"
        assert last == tokenizer.eos_id if stopped else len(ids) == 200
        assert completion.text == tokenizer.decode(before if stopped else ids)


def at_once(calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("interrupted", [False, True])
def test_threads_share_one_engine_and_each_gets_its_own(dense_model, tokenizer, interrupted):
    """Eight threads generate and stream at once, with fewer slots than samples; one more may be broken off."""
    prompts = prompts_of(*range(3, 11))
    params = [SamplingParams(max_tokens=10 + index, n=1 + index % 2) for index in range(8)]
    expected = token_ids(Engine(dense_model, tokenizer).generate(prompts, params))
    engine, found, start = Engine(dense_model, tokenizer, max_batch=5), {}, threading.Barrier(8 + interrupted)

    def work(index):
        start.wait()
        if index == 8:
            stream = engine.stream(prompts[0], SamplingParams(max_tokens=50))
            next(stream)
            stream.close()
        elif params[index].n > 1:
            (found[index],) = token_ids(engine.generate([prompts[index]], params[index]))
        else:
            found[index] = [read(engine.stream(prompts[index], params[index]))[1].token_ids]

    at_once(partial(work, index) for index in range(8 + interrupted))
    assert [found[index] for index in range(8)] == expected
    assert engine.unfinished == 0 and engine.step() == []


def test_threads_advance_each_others_requests(dense_model, tokenizer):
    """What one thread asks joins the batch that another steps: not as many steps as both would take alone."""
    engine, params = Engine(dense_model, tokenizer), SamplingParams(max_tokens=60, ignore_eos=True)
    asked = engine.add(prompts_of(1, seed=1)[0], params)
    at_once([partial(engine.generate, prompts_of(1, seed=2), params)])
    assert engine.counters.steps == 60
    assert [output.request_id for output in engine.step()] == [asked]


def test_an_aborted_request_comes_back_to_whoever_waits_for_it(dense_model, tokenizer):
    engine = Engine(dense_model, tokenizer)
    stream = engine.stream(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    output = engine.abort(0)
    _, completion = read(stream)
    assert completion.finish_reason == "abort" and completion.token_ids == output.outputs[0].token_ids


def test_abort_frees_the_slots_and_leaves_the_others_alone(model, tokenizer):
    prompts, params = prompts_of(5, 6, 7, 8), SamplingParams(max_tokens=20, temperature=1.2, n=2)
    expected = token_ids(Engine(model, tokenizer).generate(prompts, params))
    engine = Engine(model, tokenizer, max_batch=5)  # the last request waits with one sample in, one out
    ids = [engine.add(prompt, params) for prompt in prompts]
    outputs = [output for _ in range(4) for output in engine.step()]
    aborted = engine.abort(ids[1])
    assert [completion.finish_reason for completion in aborted.outputs] == ["abort", "abort"]
    assert [completion.token_ids for completion in aborted.outputs] == [ids[:4] for ids in expected[1]]
    assert engine.abort(ids[1]) is None
    waiting = engine.abort(ids[3])
    assert [completion.token_ids for completion in waiting.outputs] == [[], []]
    while engine.unfinished:
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {ids[0], ids[2]}
    assert token_ids(sorted(outputs, key=lambda output: output.request_id)) == [expected[0], expected[2]]
    assert engine.step() == []


def test_interrupted_generate_leaves_nothing_behind(dense_model, tokenizer):
    engine, steps = Engine(dense_model, tokenizer, native="off"), itertools.count()

    def interrupt(*_):
        if next(steps) == 4:
            raise KeyboardInterrupt

    handle = dense_model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts_of(4, 5), SamplingParams(max_tokens=10, temperature=0))
    handle.remove()
    assert engine.unfinished == 0
    fresh = Engine(dense_model, tokenizer, native="off")
    found, expected = (ask(one, PROMPT, max_tokens=5) for one in (engine, fresh))
    assert found == expected


def test_max_length_bounds_prompt_and_answer(scripted):
    engine = scripted([20] * 50, max_length=10)
    (completion,) = ask(engine, PROMPT, max_tokens=40)
    assert len(completion.token_ids) == 7 and completion.finish_reason == "length"
    (completion,) = ask(engine, [10] * 9, max_tokens=40)
    assert len(completion.token_ids) == 1
    with pytest.raises(SlingshotError, match="10 tokens, max_length is 10"):
        engine.generate([[10] * 10])
    with pytest.raises(SlingshotError, match="max_position_embeddings 256"):
        scripted([20], max_length=257)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], "empty"), ([5, 10_000], "10000"), ([-1], "-1"), (["text"], "a prompt is"),
        ([5, CHAT], "a prompt is"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named(dense_model, tokenizer, prompt, named):
    engine = Engine(dense_model, tokenizer)
    with pytest.raises(PromptError, match=named):
        engine.generate([PROMPT, prompt])
    assert engine.unfinished == 0
    going = engine.add(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    with pytest.raises(PromptError, match=named):
        engine.add(prompt)
    outputs = [output for _ in range(2) for output in engine.step()]
    assert [output.request_id for output in outputs] == [going] and len(outputs[0].outputs[0].token_ids) == 3


def test_prompts_as_text_ids_and_chat(dense_model, tokenizer):
    """Text is continued raw, messages go through the chat template, which `chat` also gives a single question."""
    engine, params, messages = Engine(dense_model, tokenizer), SamplingParams(max_tokens=4), [CHAT]
    raw, ids, chat = engine.generate(["3+4", tokenizer.encode_raw("3+4"), messages], params)
    assert raw.prompt_token_ids == ids.prompt_token_ids == [0, *tokenizer.encode("3+4")]
    assert token_ids([raw]) == token_ids([ids])
    assert engine.generate("3+4", params)[0].prompt_token_ids == raw.prompt_token_ids
    assert chat.prompt_token_ids == tokenizer.encode_chat(messages, add_generation_prompt=True)
    for output in (engine.chat("3+4", params), engine.chat(messages, params)):
        assert output.prompt_token_ids == chat.prompt_token_ids and token_ids([output]) == token_ids([chat])


def test_update_weights_reaches_copies_and_is_refused_in_flight(model, tokenizer):
    prompts, params = prompts_of(8), SamplingParams(max_tokens=12, temperature=0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    expected = token_ids(Engine(other, tokenizer).generate(prompts, params))
    shared = Engine(copy.deepcopy(model), tokenizer)
    own = Engine(model, tokenizer, dtype=torch.float32)
    before = token_ids(own.generate(prompts, params))
    assert before != expected
    for engine in (shared, own):
        engine.update_weights(other, version=7)
        assert engine.weights_version == 7
        assert token_ids(engine.generate(prompts, params)) == expected
    own.update_weights((name, tensor) for name, tensor in model.state_dict().items())
    assert token_ids(own.generate(prompts, params)) == before
    for state, wrong in (({}, "is missing"), ({"x": torch.zeros(1)}, r"of shape \(1,\) is not of this model")):
        with pytest.raises(SlingshotError, match=rf"update_weights: \S+ {wrong}"):
            own.update_weights(state)
    own.add(prompts[0], params)
    with pytest.raises(SlingshotError, match="1 requests are in flight"):
        own.update_weights(other)


def test_what_is_in_flight_goes_on_with_new_weights_where_asked_and_leaves_nothing_to_reuse(model, tokenizer):
    engine = Engine(model, tokenizer, dtype=torch.float32)
    prompt, params = [*range(3, 43)], SamplingParams(max_tokens=12, ignore_eos=True)
    uniform = pytest.approx(-math.log(model.config.vocab_size), abs=1e-4)
    engine.add(prompt, params)
    for _ in range(6):
        assert not engine.step()
    engine.update_weights({name: torch.zeros_like(each) for name, each in model.state_dict().items()}, keep=True)
    while not (outputs := engine.step()):
        pass
    logprobs = outputs[0].outputs[0].logprobs
    assert len(logprobs) == 12 and logprobs[:5] != [uniform] * 5 and logprobs[6:] == [uniform] * 6
    [again] = engine.generate([prompt], params)
    assert again.outputs[0].logprobs == [uniform] * 12 and not engine.counters.cached


def test_a_copy_in_bfloat16_keeps_float32_router_biases_and_leaves_the_model_alone(model, tokenizer):
    engine = Engine(model, tokenizer, dtype=torch.bfloat16)
    for name, parameter in engine.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("gate.weight") else torch.bfloat16)
    assert {buffer.dtype for buffer in engine.model.buffers()} <= {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    completions = ask(engine, PROMPT, max_tokens=8, n=2)
    assert all(-20 < logprob <= 0 for completion in completions for logprob in completion.logprobs)


@pytest.mark.parametrize("loaded", [False, True])
def test_sampler_and_trainer_route_alike_in_bfloat16(make_model, deepseek, tokenizer, tmp_path, loaded):
    """The trainer's float32 masters computing in bfloat16, the engine's bfloat16 weights: one choice of experts."""
    trainer = make_model(deepseek(vocab_size=tokenizer.vocab_size))
    trainer.compute_dtype = torch.bfloat16
    save_checkpoint(tmp_path, trainer, tokenizer)
    copied = Engine(trainer, tokenizer, dtype=torch.bfloat16)
    engine = Engine.load(tmp_path, dtype="bfloat16", device="cpu", native="off") if loaded else copied
    tokens_BT, results = torch.tensor(prompts_of(*[60] * 30)), []
    for network in (trainer, engine.model):
        chosen = []
        for layer in network.moe_layers():
            layer.gate.register_forward_hook(lambda _, __, routing, chosen=chosen: chosen.append(routing.experts_Nk))
        with torch.no_grad():
            logits_BTV = network(tokens_BT).logits_BTV
        results.append((torch.stack(chosen), logits_BTV))
    (ours_LNk, ours_BTV), (theirs_LNk, theirs_BTV) = results
    assert torch.equal(ours_LNk, theirs_LNk) and torch.equal(ours_BTV, theirs_BTV)
    rounded = engine.model.moe_layers()[0].gate.weight.bfloat16().float()
    assert not torch.equal(rounded, engine.model.moe_layers()[0].gate.weight)


def test_load_reads_a_checkpoint(model, tokenizer, tmp_path):
    save_checkpoint(tmp_path, model, tokenizer)
    engine = Engine.load(tmp_path, dtype="float32", device="cpu", max_batch=2)
    found, expected = (ask(one, "3+4", max_tokens=10, n=2) for one in (engine, Engine(model, tokenizer)))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    with pytest.raises(SlingshotError, match="float16"):
        Engine.load(tmp_path, dtype="float16")


def test_diverged_weights_are_reported(model, tokenizer):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(SlingshotError, match="not finite"):
        Engine(broken, tokenizer).generate(prompts_of(4))
