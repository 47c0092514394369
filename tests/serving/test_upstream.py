import asyncio
import contextlib

import httpx
import pytest

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.vocabulary import Vocabulary
from slingshot.serving.backend import Generation
from slingshot.serving.errors import ApiError
from slingshot.serving.inference_servers import LlamaServer, VllmServer
from slingshot.serving.local import LocalBackend
from slingshot.serving.upstream import UpstreamBackend
from tests.serving.conftest import ScriptedBackend, ids_of, running, serving, talking
from tests.serving.fake_servers import fake_server

KINDS = ["vllm", "llama.cpp"]


@pytest.fixture
def upstream(tokenizer):
    """upstream([backends], kind, states): an UpstreamBackend before a server for each."""
    with contextlib.ExitStack() as stack:

        def make(backends, kind, states=None, **more):
            states, vocabulary = states or [{} for _ in backends], Vocabulary(tokenizer, tokenizer.vocab_size)
            apps = [fake_server(its, tokenizer, kind, state) for its, state in zip(backends, states, strict=True)]
            urls = [stack.enter_context(running(app)) for app in apps]
            servers = [VllmServer(url) if kind == "vllm" else LlamaServer(url, vocabulary) for url in urls]
            return UpstreamBackend(servers, tokenizer, **more)

        yield make


def gather(backend, generations):
    """[(ids, finish_reason, cached)] of the generations, or the errors they end with, one after the other."""

    async def one(generation):
        ids, last = [], None
        try:
            async for delta in backend.generate(generation):
                ids, last = ids + delta.token_ids, delta
        except ApiError as error:
            return error
        return ids, last.finish_reason, last.cached

    async def run():
        await backend.start()
        try:
            return [await one(generation) for generation in generations]
        finally:
            await backend.close()

    return asyncio.run(run())


def generation(tokenizer, text="What is 3+4-2?", **params):
    ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    return Generation(tuple(ids), SamplingParams(**{"max_tokens": 40, "seed": 3} | params), "0")


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_s_answer_is_the_one_it_made(upstream, engine, tokenizer, kind):
    asked = generation(tokenizer)
    if kind == "llama.cpp":  # which does not tell every id of bytes that are no text
        asked = Generation(tuple(tokenizer.encode("7")), SamplingParams(json_schema='{"enum": ["7+8", "8"]}'), "0")
    local = LocalBackend(engine)
    asyncio.run(local.start())
    [(ids, reason, _)] = gather(upstream([local], kind), [asked])
    own = engine.generate([list(asked.prompt_ids)], asked.params, ["0"])[0].outputs[0]
    assert (ids, reason) == (own.token_ids, own.finish_reason)
    asyncio.run(local.close())


@pytest.mark.parametrize("kind", KINDS)
def test_characters_of_several_tokens_arrive_whole_and_are_counted(upstream, tokenizer, kind):
    script = [*tokenizer.encode("7、\U0001f642ぬ😀7", continues=True), tokenizer.eos_id]
    backend = ScriptedBackend(script, eos_ids=tokenizer.eos_ids)
    [(ids, reason, _)] = gather(upstream([backend], kind), [generation(tokenizer)])
    assert (tokenizer.decode(ids[:-1]), len(ids), ids[-1], reason) == (
        "7、\U0001f642ぬ😀7",
        len(script),
        tokenizer.eos_id,
        "stop",
    )


def test_what_was_cached_is_in_the_usage_though_it_is_told_last(upstream, tokenizer):
    script = ScriptedBackend(tokenizer.encode("7 and 8", continues=True))
    with talking(tokenizer, upstream([script], "llama.cpp")) as client:
        answer = client.completions.create(model="tiny", prompt="What is 3+4-2?", max_tokens=20)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [None, 0])
def test_logprobs_are_computed_where_they_are_read(upstream, tokenizer, kind, asked):
    script, state = ScriptedBackend(tokenizer.encode("7 and 8", continues=True)), {}
    with talking(tokenizer, upstream([script], kind, [state])) as client:
        answer = client.completions.create(model="tiny", prompt="What is 3+4-2?", max_tokens=20, logprobs=asked)
    [body] = state["asked"]
    assert bool("logprobs" in body or body.get("n_probs")) == (asked is not None)
    told = answer.choices[0].logprobs
    assert told is None if asked is None else set(told.token_logprobs) == {-0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_one_question_are_asked_with_seeds_of_their_own(upstream, tokenizer, kind):
    script, state = ScriptedBackend(tokenizer.encode("7", continues=True)), {}
    with talking(tokenizer, upstream([script], kind, [state])) as client:
        for _ in range(2):
            client.completions.create(model="tiny", prompt="What is 3+4-2?", seed=5, n=3)
    seeds = [body["seed"] for body in state["asked"]]
    assert 5 in seeds and len(set(seeds)) == 3 and sorted(seeds[:3]) == sorted(seeds[3:])


@pytest.mark.parametrize(("code", "status"), [(400, 400), (500, 503)])
def test_an_error_told_within_an_answer(upstream, tokenizer, code, status):
    state = {"refuses": {"message": "out of vocabulary", "code": code}}
    script = ScriptedBackend(tokenizer.encode("7", continues=True))
    [error] = gather(upstream([script], "vllm", [state]), [generation(tokenizer)])
    assert error.status == status


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [{"prompt_logprobs": 1}, {"routed_experts": True}, {"bad_words": ((3, 4),)}])
def test_what_a_server_would_pass_over_is_refused(upstream, tokenizer, kind, asked):
    script = ScriptedBackend(tokenizer.encode("7", continues=True))
    [error] = gather(upstream([script], kind), [generation(tokenizer, **asked)])
    assert error.status == 400 and not script.asked


FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{"tool_choice": "required"}, {"strict": True}])
def test_a_call_that_a_server_cannot_be_held_to_is_refused_in_a_line(upstream, caller, kind, stream, more):
    script = ScriptedBackend(caller.encode("7", continues=True))
    function = FUNCTION | ({"strict": True} if "strict" in more else {})
    body = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "stream": stream}
    body |= {"tools": [{"type": "function", "function": function}], "tool_choice": more.get("tool_choice", "auto")}
    with serving(caller, upstream([script], kind)) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    told = answer.json()["error"]["message"]
    assert answer.status_code == 400 and "take tool_choice auto" in told and "\n" not in told and not script.asked


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_reasoning_is_kept_by_closing_it(upstream, tokenizer, kind):
    script = ScriptedBackend(tokenizer.encode("3 plus 4 is 7, 7 minus 2", continues=True))
    state = {}
    [(ids, _, _)] = gather(upstream([script], kind, [state]), [generation(tokenizer, thinking_budget=4)])
    assert ids[:4] == script.ids[:4] and ids.index(tokenizer.end_think_id) >= 4
    first, second = state["asked"]
    assert second["prompt"] == [*first["prompt"], *ids[: ids.index(script.ids[0], 4)]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_structure_binds_after_the_reasoning(upstream, tokenizer, kind):
    ids = ids_of(tokenizer, "3 plus 4.\n</think>\n\n7")
    state, schema = {}, '{"type": "integer"}'
    script = ScriptedBackend(ids)
    gather(upstream([script], kind, [state]), [generation(tokenizer, json_schema=schema)])
    bound = [bool(body.get("json_schema") or body.get("structured_outputs")) for body in state["asked"]]
    assert bound == [False, True]
    assert state["asked"][1]["prompt"][-1] == tokenizer.end_think_id


def test_what_has_not_begun_is_asked_of_another_replica(upstream, tokenizer):
    script = [*tokenizer.encode("7", continues=True), tokenizer.eos_id]
    states = [{"dies": 1}, {"dies": 1}, {}]
    replicas = [ScriptedBackend(script, eos_ids=tokenizer.eos_ids) for _ in states]
    assert gather(upstream(replicas, "vllm", states), [generation(tokenizer)]) == [(script, "stop", 0)]


def test_what_has_begun_ends_with_an_error(upstream, tokenizer):
    replicas = [ScriptedBackend(tokenizer.encode("3 plus 4 is 7", continues=True)) for _ in range(2)]
    [error] = gather(upstream(replicas, "vllm", [{"midway": 1}, {"midway": 1}]), [generation(tokenizer)])
    assert error.status == 503 and "ask again" in error.message


def test_prompts_with_one_beginning_go_to_one_replica(upstream, tokenizer):
    states = [{}, {}, {}]
    replicas = [ScriptedBackend(tokenizer.encode("7", continues=True)) for _ in states]
    texts = [f"{'abcdefghijkl'[place % 6] * 80} {place}" for place in range(24)]
    gather(upstream(replicas, "vllm", states), [generation(tokenizer, text) for text in texts])
    where = {}
    for number, state in enumerate(states):
        for body in state["asked"]:
            where.setdefault(tuple(body["prompt"][:64]), set()).add(number)
    assert all(len(numbers) == 1 for numbers in where.values()) and len(where) == 6


def test_a_replica_that_is_not_ready_gets_nothing(upstream, tokenizer):
    states = [{"ready": False}, {}]
    replicas = [ScriptedBackend(tokenizer.encode("7", continues=True)) for _ in states]
    gather(upstream(replicas, "vllm", states), [generation(tokenizer, text) for text in "abcdefgh"])
    assert [len(state["asked"]) for state in states] == [0, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_no_connection_is_used_twice_since_a_server_may_close_one_that_it_kept(upstream, tokenizer, kind):
    state = {}
    backend = upstream([ScriptedBackend(tokenizer.encode("7", continues=True))], kind, [state])
    gather(backend, [generation(tokenizer, text) for text in "abc"])
    assert len(set(state["ports"])) == len(state["ports"]) == 3


def test_no_server_at_all_is_said_in_one_line(tokenizer):
    with pytest.raises(SlingshotError, match=r"no server answers at http://127\.0\.0\.1:9; start one"):
        gather(UpstreamBackend([VllmServer("http://127.0.0.1:9")], tokenizer), [])


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr("slingshot.serving.upstream.CHECK", 0.05)


class Hangs(ScriptedBackend):
    """Its server hangs once it told so many tokens; the first of several alone, the one that is asked first."""

    hung = []

    def __init__(self, ids, state, after):
        super().__init__(ids)
        self.state, self.after = state, after

    async def generate(self, generation):
        told = 0
        async for delta in super().generate(generation):
            if told == self.after and not self.hung:
                self.hung.append(self)
                self.state["hangs"] = True
            told += len(delta.token_ids)
            yield delta


@pytest.fixture
def hangs(upstream, tokenizer, often):
    """hangs(count, after): what is told by an UpstreamBackend before so many servers, the first of which hangs."""
    Hangs.hung.clear()
    states = []

    def ask(count, after):
        states.extend({} for _ in range(count))
        ids = tokenizer.encode("3 plus 4 is 7", continues=True)
        backend = upstream([Hangs(ids, state, after) for state in states], "vllm", states, silence=0.3)
        [told] = gather(backend, [generation(tokenizer)])
        assert Hangs.hung
        return told

    yield ask
    for state in states:
        state["hangs"] = False


def test_what_a_silent_server_was_asked_is_asked_of_another(hangs, tokenizer):
    assert hangs(2, 0) == (tokenizer.encode("3 plus 4 is 7", continues=True), "length", 0)


def test_no_server_but_a_silent_one_is_said(hangs):
    assert hangs(1, 0).status == 503


def test_an_answer_whose_server_falls_silent_ends_with_an_error(hangs):
    error = hangs(2, 3)
    assert error.status == 503 and "midway" in error.message


def test_a_server_that_is_well_may_take_its_time(upstream, tokenizer, often):
    script = ScriptedBackend(tokenizer.encode("3 plus 4 is 7", continues=True)[:3])
    script.pause = 0.5  # before each token, its health being told meanwhile
    assert gather(upstream([script], "vllm", silence=0.3), [generation(tokenizer)]) == [(script.ids, "length", 0)]
