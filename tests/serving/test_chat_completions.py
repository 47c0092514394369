import httpx
import openai
import pytest

from slingshot.engine.engine import Engine
from slingshot.serving.local import LocalBackend
from tests.serving.conftest import talking

QUESTION = [{"role": "user", "content": "What is 3+4-2?"}]


def ask(client, **more):
    return client.chat.completions.create(model="tiny", messages=QUESTION, **more)


def joined(stream):
    """What a stream's chunks say together, and whether one of them held both kinds of text."""
    parts, mixed = {"reasoning_content": "", "content": ""}, False
    for chunk in stream:
        for choice in chunk.choices:
            said = {name: getattr(choice.delta, name, None) for name in parts}
            mixed |= all(said.values())
            parts = {name: parts[name] + (said[name] or "") for name in parts}
    return *parts.values(), mixed


def test_reasoning_and_answer_are_told_apart(says, tokenizer):
    client = says("3 plus 4 is 7.\n</think>\n\n5")
    answer = ask(client)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("3 plus 4 is 7.", "5")
    assert answer.choices[0].finish_reason == "stop"
    ids = client.backend.ids
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.completion_tokens_details.reasoning_tokens == ids.index(tokenizer.end_think_id) + 1


@pytest.mark.parametrize("chunk", [1, 3])
def test_no_chunk_holds_two_kinds_of_text(says, chunk):
    stream = ask(says("3 plus 4 is 7.\n</think>\n\n5", chunk=chunk), stream=True)
    assert joined(stream) == ("3 plus 4 is 7.", "5", False)


def test_with_glass_every_token_says_whether_it_was_drafted(tokenizer, make_model, dense):
    """Greedy decoding of a random model runs in circles, which are guessed."""
    model = make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256))
    backend = LocalBackend(Engine(model, tokenizer, speculation="on"))
    with talking(tokenizer, backend) as client:
        asked = {"max_tokens": 200, "temperature": 0, "logprobs": True, "extra_body": {"glass": True}}
        (choice,) = ask(client, **asked).choices
        told = [chunk.choices[0] for chunk in ask(client, stream=True, **asked) if chunk.choices]
    drafted = choice.glass["drafted"]
    assert len(drafted) == sum(len(choice.logprobs.to_dict()[kind]) for kind in ("content", "reasoning_content")) == 200
    assert backend.counters.accepted >= 2 * sum(drafted) > 100
    assert [flag for its in told for flag in getattr(its, "glass", {"drafted": []})["drafted"]] == drafted


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"model": "big"}, "there is no model 'big'"),
        ({"messages": [{"role": "user", "content": "7" * 300}]}, "context 256"),
        ({"stop": "7" * 5000}, "stop: at most 128 strings, of 4096 characters"),
        ({"extra_body": {"bad_words": ["7"] * 129}}, "bad_words: at most 128 strings"),
        ({"messages": [{"role": "user"}]}, "no content"),
    ],
)
def test_an_impossible_request_is_refused_with_what_is_wrong(client, wrong, said):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": QUESTION} | wrong)
    assert caught.value.status_code in (400, 404) and said in caught.value.body["message"]


@pytest.mark.parametrize("chunk", [1, 3])
def test_characters_of_several_tokens_come_whole_streamed_or_not(says, tokenizer, chunk):
    """Alone and side by side, in the reasoning and in the answer; each is several tokens of this vocabulary."""
    assert len(tokenizer.encode("🙂")) > 1
    client = says("🙂 足🙂🙂.\n</think>\n\n🙂é🙂", chunk=chunk)
    message = ask(client).choices[0].message
    assert (message.reasoning_content, message.content) == ("🙂 足🙂🙂.", "🙂é🙂")
    parts = [choice.delta for event in ask(client, stream=True) for choice in event.choices]
    assert not any("\ufffd" in str(part) for part in parts)
    assert "".join(part.content or "" for part in parts) == "🙂é🙂"


@pytest.mark.parametrize("most", [1, 5])
def test_reasoning_that_is_cut_anywhere_leaks_nothing_into_the_content(says, tokenizer, most):
    client = says("3 plus 4 is 7, 7 minus 2 is 5.\n" * 3 + "</think>\n\n5")
    answer = ask(client, max_tokens=most)
    message, usage = answer.choices[0].message, answer.usage
    assert message.content is None and answer.choices[0].finish_reason == "length"
    assert usage.completion_tokens == usage.completion_tokens_details.reasoning_tokens == most
    reasoning, content, _ = joined(ask(client, max_tokens=most, stream=True))
    assert (reasoning, content) == (message.reasoning_content, "")


def test_tags_quoted_in_the_reasoning_part_nothing_and_the_next_prompt_holds_them_as_text(says, tokenizer):
    """Control tokens decide, not their names: </think> and the end token, spelt in characters, are words."""
    quoted = "R1 ends with </think> and <｜end▁of▁sentence｜>"
    spelt = tokenizer.encode(quoted, continues=True)
    assert not {tokenizer.end_think_id, tokenizer.eos_id} & set(spelt)
    ids = [*spelt, tokenizer.end_think_id, *spelt, tokenizer.eos_id]
    client = says(ids)
    answer = ask(client)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (quoted, quoted)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", len(ids))
    assert joined(ask(client, stream=True)) == (quoted, quoted, False)
    said = {"role": "assistant", "content": "Its tag closes.", "reasoning_content": quoted}
    client.chat.completions.create(model="tiny", messages=[*QUESTION, said, *QUESTION])
    told = client.backend.asked[-1].prompt_ids
    assert told.count(tokenizer.end_think_id) == 0 and told.count(tokenizer.eos_id) == 1


def test_a_stop_string_in_the_question_and_in_the_reasoning_stops_nothing_there(says):
    client = says("四 of them: 四人.\n</think>\n\n关汉卿, 四 others, 四")
    for stop in ("四", ["no", "四"]):
        choice = ask(client, stop=stop).choices[0]
        assert (choice.message.reasoning_content, choice.message.content) == ("四 of them: 四人.", "关汉卿, ")
        assert choice.finish_reason == "stop"
    assert joined(ask(client, stop="四", stream=True)) == ("四 of them: 四人.", "关汉卿, ", False)


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [-0.1, 2.1, "hot", float("1e-9")]), ("top_p", [0, -1, 1.1]), ("top_k", [-2, 1.5, 2**31]),
        ("min_p", [-0.1, 1.1]), ("n", [0, 129, 1.5]), ("seed", [2**63, 1.5, "x"]), ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]), ("repetition_penalty", [0, -1, 11]), ("logit_bias", [{"x": 1}, {"999": 1}]),
        ("logprobs", ["many", 3]), ("top_logprobs", [-1, 21, 3]), ("max_tokens", [0, -1, 1.5]), ("stop", [[""], 3]),
        ("stop_token_ids", [[9999], ["x"]]), ("bad_words", [[""], [3]]), ("min_tokens", [3]), ("best_of", [3]),
        ("truncate_prompt_tokens", [5]), ("thinking_token_budget", [-2]), ("thinking_budget", [-2, "x"]),
        ("reasoning_effort", ["enormous"]), ("response_format", [{"type": "xml"}, "json"]),
        ("structured_outputs", [{"xml": "a"}, {"regex": 3}]), ("use_beam_search", [True]), ("typical_p", [0.5]),
        ("stream_options", [{"include_usage": True}]), ("ignore_eos", ["perhaps"]), ("glass", ["full"]),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_field(served, name, values):
    for value in values:
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 2} | {name: value}
        answer = httpx.post(f"{served}/v1/chat/completions", json=body, timeout=60)
        message = answer.json().get("error", {}).get("message", "")
        assert answer.status_code == 400 and "\n" not in message, (value, answer.text)
        assert name in message or (name, "empty" in message) in (("stop", True), ("bad_words", True)), (value, message)
