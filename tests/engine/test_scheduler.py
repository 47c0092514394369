"""Who runs when: rows, chunks, shared prompts, prefixes, preemption. The tokens never change by it."""

import random
import time

import pytest

from slingshot.engine.engine import Engine
from slingshot.engine.kv_cache import CacheTooSmall, KVCache
from slingshot.engine.sampling import SamplingParams

from .asking import full_logprobs, prompts_of, token_ids


def page_bytes(model):
    return KVCache.page_bytes(model.config, next(model.parameters()).dtype)


def run(engine, prompts, params, abort=()):
    """Add one more request before every step, abort some, step until all is done: outputs by index."""
    requests, done = {}, {}
    while len(requests) < len(prompts) or engine.unfinished:
        if (index := len(requests)) < len(prompts):
            requests[engine.add(prompts[index], params[index])] = index
        for output in engine.step():
            done[requests[output.request_id]] = output
        for request_id, index in requests.items():
            if index in abort and engine.counters.steps > index + 5:
                engine.abort(request_id)
    return [done.get(index) for index in range(len(prompts))]


def test_rows_are_reused_and_never_idle(dense_model, tokenizer):
    """20 requests of 1 to 20 tokens in 4 rows: as many rows as could be filled decode at every step."""
    engine = Engine(dense_model, tokenizer, max_batch=4)
    params = [SamplingParams(max_tokens=1 + index, seed=index, ignore_eos=True) for index in range(20)]
    decoded = []
    for prompt, its in zip(prompts_of(*[5] * 20), params, strict=True):
        engine.add(prompt, its)
    while engine.unfinished:
        before = engine.counters
        engine.step()
        decoded.append(engine.counters.decoded - before.decoded)
        assert before.running <= 4 and engine.counters.waiting + engine.counters.running <= 20
    assert sum(decoded) == 210 and max(decoded) == 4
    full = next(index for index, count in enumerate(decoded) if count < 4)
    assert sum(decoded[full:]) <= 3 * 20  # only the last three ever run in a batch that is not full


def test_n_samples_share_the_prompts_pages_and_differ(dense_model, tokenizer):
    """The first page whole, the second copied by each before it writes there."""
    engine = Engine(dense_model, tokenizer)
    engine.add(prompts_of(20)[0], SamplingParams(max_tokens=8, n=6, ignore_eos=True, temperature=1.5))
    engine.step()
    assert (engine.counters.prefilled, engine.counters.decoded, engine.counters.pages_used) == (20, 6, 2)
    engine.step()
    assert (engine.counters.prefilled, engine.counters.decoded, engine.counters.pages_used) == (20, 12, 1 + 6)
    while not (outputs := engine.step()):
        pass
    assert len({tuple(ids) for ids in token_ids(outputs)[0]}) == 6 and engine.counters.pages_used == 0


def test_a_long_prompt_holds_the_rows_up_by_a_chunk_at_most(dense_model, tokenizer):
    engine = Engine(dense_model, tokenizer, step_tokens=20)
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    for prompt in prompts_of(5, 6, 7):
        engine.add(prompt, params)
    engine.step()
    engine.add(prompts_of(200)[0], params)
    steps = []
    while engine.counters.prefilled < 18 + 200:
        before = engine.counters
        engine.step()
        steps.append((engine.counters.prefilled - before.prefilled, engine.counters.decoded - before.decoded))
    assert steps == [(20, 3)] * 9 + [(20, 4)]


SLOW = pytest.mark.slow
SIX, SAMPLED = prompts_of(50, 3, 47, 20, 90, 33), SamplingParams(max_tokens=30, n=2, seed=8)


@pytest.fixture(scope="module")
def one_by_one(model, tokenizer):
    """Token ids of each of SIX in an engine of its own."""
    return token_ids([Engine(model, tokenizer).generate([prompt], SAMPLED)[0] for prompt in SIX])


@pytest.mark.parametrize(
    "options", [{"step_tokens": 7}, *(pytest.param(o, marks=SLOW) for o in ({"pages": 11}, {"max_batch": 3}))]
)
def test_chunks_rows_and_preemption_change_no_token(model, tokenizer, one_by_one, options):
    """Requests arriving while others run, a cache of 11 pages that holds one of them, or two."""
    pages = options.get("pages", 1000)
    engine_options = {key: value for key, value in options.items() if key != "pages"}
    engine = Engine(model, tokenizer, cache_bytes=(pages + 1) * page_bytes(model), **engine_options)
    assert token_ids(run(engine, SIX, [SAMPLED] * 6)) == one_by_one
    assert (engine.counters.preemptions > 0) == (pages == 11)
    assert engine.counters.pages_used == engine.counters.running == engine.counters.waiting == 0


def test_prefixes_are_reused_across_requests_until_the_weights_change(dense_model, tokenizer):
    engine, params = Engine(dense_model, tokenizer), SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    (prompt,) = prompts_of(50)
    (first,) = engine.generate([prompt], params)
    answer = first.outputs[0].token_ids
    assert (engine.counters.prefilled, engine.counters.cached) == (50, 0)
    (again,) = engine.generate([prompt], params)
    assert (engine.counters.prefilled, engine.counters.cached) == (50 + 2, 48)
    assert token_ids([again]) == token_ids([first])
    (turn,) = engine.generate([prompt + answer + [9, 10]], params)  # of 92 tokens, 89 had been computed: 5 pages
    assert (engine.counters.prefilled, engine.counters.cached) == (52 + 12, 48 + 80)
    assert token_ids([turn]) == token_ids(Engine(dense_model, tokenizer).generate([prompt + answer + [9, 10]], params))
    engine.update_weights(dense_model)
    engine.generate([prompt], params)
    assert (engine.counters.prefilled, engine.counters.cached) == (64 + 50, 128)


def test_prefixes_asked_for_longest_ago_give_way(dense_model, tokenizer):
    """16 pages; a prompt of 65 and its token take 5 and keep 4: the fourth prompt takes the place of the second."""
    engine = Engine(dense_model, tokenizer, cache_bytes=17 * page_bytes(dense_model))
    for index, cached in ((0, 0), (1, 0), (2, 0), (0, 64), (3, 0), (0, 64), (2, 64)):
        before = engine.counters.cached
        engine.generate([prompts_of(65, 65, 65, 65)[index]], SamplingParams(max_tokens=1))
        assert engine.counters.cached - before == cached, index


def test_a_cache_that_cannot_hold_one_sequence_is_refused_at_once(dense_model, tokenizer):
    size = page_bytes(dense_model)
    with pytest.raises(
        CacheTooSmall, match=rf"cache_bytes {3 * size}: one sequence of 40 tokens takes {4 * size}; raise"
    ):
        Engine(dense_model, tokenizer, max_length=40, cache_bytes=3 * size)
    with pytest.raises(CacheTooSmall, match="raise it"):
        Engine(dense_model, tokenizer, cache_bytes=size)
    assert Engine(dense_model, tokenizer, cache_bytes=3 * size).max_length == 32  # unless no length was asked for


@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=SLOW)])
def test_a_soak_of_random_adds_and_aborts_leaves_no_page_behind(model, tokenizer, seed):
    rng = random.Random(seed)
    shared = prompts_of(40)[0]
    prompts = [shared[: rng.choice([0, 16, 33, 40])] + its for its in prompts_of(*rng.choices(range(1, 60), k=10))]
    params = [SamplingParams(rng.randrange(1, 40), rng.choice([0.0, 1.0, 1.4]), n=rng.randrange(1, 4)) for _ in prompts]
    aborted = rng.sample(range(10), 3)
    engine = Engine(
        model, tokenizer, max_batch=rng.randrange(2, 9), step_tokens=rng.choice([5, 30, 500]),
        cache_bytes=rng.randrange(18, 60) * page_bytes(model), speculation=rng.choice(["off", "on"]),
    )  # fmt: skip
    outputs = run(engine, prompts, params, aborted)
    counters = engine.counters
    assert counters.pages_used == counters.running == counters.waiting == engine.unfinished == 0
    for index, output in enumerate(outputs):
        assert output is not None or index in aborted
        for completion in output.outputs if output else ():
            ids = completion.token_ids
            logprobs_TV = full_logprobs(model, prompts[index], ids, params[index].temperature)
            assert completion.logprobs == pytest.approx(logprobs_TV[range(len(ids)), ids].tolist(), abs=2e-4)
        if output is not None:
            assert token_ids([output]) == token_ids(Engine(model, tokenizer).generate([prompts[index]], params[index]))


def test_a_step_costs_the_same_however_many_wait(dense_model, tokenizer):
    fastest = {}
    for waiting in (10, 4000):
        engine, times = Engine(dense_model, tokenizer, max_batch=2), []
        for prompt in prompts_of(*[4] * waiting):
            engine.add(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
        for _ in range(30):
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        fastest[waiting] = min(times)
        assert engine.counters.waiting == waiting - 2
    assert fastest[4000] < 3 * fastest[10]
