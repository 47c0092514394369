"""How much a model reasons: switched, bounded, ended by whoever reads it, and never the whole of an answer."""

import asyncio
import contextlib

import httpx
import openai
import pytest

from slingshot.text.tokenizer import Tokenizer
from tests.serving.conftest import ScriptedBackend, ids_of, serving, talking

QUESTION = [{"role": "user", "content": "What is 3+4-2?"}]


class InTurns(ScriptedBackend):
    """Says the first of its scripts when it is asked first, and so on; `pause` seconds before each token."""

    def __init__(self, tokenizer, *texts, pause=0.0):
        super().__init__([], eos_ids=tokenizer.eos_ids)
        self.scripts = [[*ids_of(tokenizer, text), tokenizer.eos_id] for text in texts]
        self.pause = pause

    async def generate(self, generation):
        self.ids = self.scripts[len(self.asked)]
        async for delta in super().generate(generation):
            await asyncio.sleep(self.pause)
            yield delta


@pytest.fixture
def server(tokenizer):
    """server(backend, **options): an openai client of a server of the backend."""
    with contextlib.ExitStack() as stack:
        yield lambda backend, **options: stack.enter_context(talking(tokenizer, backend, **options))


def ask(client, **more):
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "seed": 1} | more)


@pytest.mark.parametrize("streamed", [False, True])
def test_who_ends_within_the_reasoning_answers_once(server, tokenizer, streamed):
    backend = InTurns(tokenizer, "3 plus 4", "5")
    client = server(backend)
    if streamed:
        chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        content = "".join(delta.content or "" for delta in deltas)
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        usage = chunks[-1].usage
    else:
        answer = ask(client)
        message, usage = answer.choices[0].message, answer.usage
        content, reasoning = message.content, message.reasoning_content
    assert (reasoning, content) == ("3 plus 4", "5")
    first, second = backend.asked
    thought, answered = backend.scripts
    closing = second.prompt_ids[len(first.prompt_ids) + len(thought) - 1 :]
    assert second.prompt_ids[: -len(closing)] == (*first.prompt_ids, *thought[:-1])
    assert tokenizer.decode(closing) == "\n</think>\n\n"
    assert usage.completion_tokens == len(thought) + len(closing) + len(answered)
    assert second.params.max_tokens == first.params.max_tokens - len(thought) - len(closing)
    assert (first.params.seed, first.key) == (second.params.seed, second.key) == (1, "0")
    assert (first.said, second.said) == (0, len(thought) - 1 + len(closing))  # penalties count them as said


def test_a_second_end_within_the_reasoning_is_the_end(server, tokenizer):
    answer = ask(server(InTurns(tokenizer, "3 plus 4", "")))
    assert answer.choices[0].message.content is None and answer.choices[0].finish_reason == "stop"


def test_a_reader_who_has_read_enough_gets_the_answer_now(server, tokenizer):
    backend = InTurns(tokenizer, "3 plus 4 is 7, " * 100, "5", pause=0.005)
    client = server(backend)
    content, control = "", None
    for chunk in ask(client, stream=True):
        content += chunk.choices[0].delta.content or ""
        if control is None and getattr(chunk.choices[0].delta, "reasoning_content", None):
            order = {"id": chunk.id, "action": "reasoning_end"}
            control = httpx.post(f"{client.base_url}chat/completions/control", json=order)
    assert control.json()["closed"] == 1 and content == "5"
    assert len(backend.asked[1].prompt_ids) < len(backend.scripts[0])
    again = httpx.post(f"{client.base_url}chat/completions/control", json=order)
    assert again.status_code == 404 and "running" in again.json()["error"]["message"]


@pytest.mark.parametrize(
    "asked, reasons, budget",
    [
        ({}, True, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "adaptive"}}, True, None),
        ({"reasoning_effort": "none"}, False, None),
        ({"reasoning_effort": "minimal"}, True, 25),
        ({"reasoning_effort": "xhigh"}, True, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, True, 7),
        ({"thinking_token_budget": -1}, True, None),
        ({"thinking_budget": 5}, True, 5),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, None),
        ({"enable_thinking": False}, False, None),
        ({"think": False}, False, None),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, None, None),
        ({"reasoning_effort": "enormous"}, None, None),
    ],
)
def test_the_switches_of_the_known_apis_are_heard(says, tokenizer, asked, reasons, budget):
    client = says("3 plus 4 is 7.\n</think>\n\n5")
    if reasons is None:
        with pytest.raises(openai.BadRequestError):
            ask(client, extra_body=asked)
        return
    ask(client, max_tokens=100, extra_body=asked)
    [generation] = client.backend.asked
    assert (tokenizer.end_think_id in generation.prompt_ids) != reasons
    assert generation.params.thinking_budget == budget


def test_where_the_template_cannot_choose_the_reasoning_is_closed_at_once(tokenizer):
    fixed = tokenizer.chat_template.replace("thinking is not defined or thinking", "true")
    stubborn = Tokenizer.from_bpe(**_tables(tokenizer), config=tokenizer.config | {"chat_template": fixed})
    backend = ScriptedBackend([*ids_of(stubborn, "5"), stubborn.eos_id], eos_ids=stubborn.eos_ids)
    with serving(stubborn, backend) as url:
        ask(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), reasoning_effort="none")
    assert backend.asked[0].params.thinking_budget == 0


def _tables(tokenizer):
    description = tokenizer.description()
    added = {token["content"]: token["special"] for token in description["added_tokens"]}
    ids = {token["content"]: token["id"] for token in description["added_tokens"]}
    model = description["model"]
    return {"vocab": model["vocab"] | ids, "merges": [tuple(merge) for merge in model["merges"]], "added": added}


def test_a_begun_answer_is_gone_on_with_its_reasoning_too(says, tokenizer):
    client = says("7.")
    begun = {"role": "assistant", "content": "It is ", "reasoning_content": "3 plus 4", "prefix": True}
    assert ask(client, messages=[*QUESTION, begun]).choices[0].message.content == "7."
    asked = client.backend.asked[0].prompt_ids
    assert tokenizer.decode(asked).endswith("<think>\n3 plus 4\n</think>\n\nIt is ")
    del begun["reasoning_content"]
    ask(client, messages=[*QUESTION, begun])
    assert tokenizer.decode(client.backend.asked[1].prompt_ids).endswith("<｜Assistant｜>It is ")
    with pytest.raises(openai.BadRequestError):
        ask(client, messages=[QUESTION[0] | {"prefix": True}])


def test_reasoning_goes_by_both_names(server, tokenizer):
    client = server(InTurns(tokenizer, "3 plus 4\n</think>\n\n5"), also_reasoning=True)
    history = [*QUESTION, {"role": "assistant", "content": "5", "reasoning": "3 plus 4"}, *QUESTION]
    message = ask(client, messages=history).choices[0].message
    assert message.reasoning == message.reasoning_content == "3 plus 4"


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "add"}]}, "functions"),
        ({"min_tokens": 7}, "min_tokens"),
        ({"num_ctx": 4096}, "num_ctx"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text only"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "narrator"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "give one"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(client, wrong, said):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body=wrong)
    assert said in caught.value.body["message"]


def test_what_changes_nothing_is_tolerated(says):
    more = {"prompt_cache_key": "a", "store": False, "metadata": {"a": "b"}, "modalities": ["text"], "logit_bias": None}
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "3+4-2?"}]
    messages = [{"role": "developer", "content": "Add."}, {"role": "user", "content": parts}]
    assert ask(says("</think>5"), messages=messages, extra_body=more).choices[0].message.content == "5"
