"""What clients send of earlier turns: read as it was meant, so that the cache has its beginning."""

import httpx
import pytest

QUESTION = {"role": "user", "content": "What is 3+4-2? " * 5}
PAGE = 16  # tokens of a prompt that the cache has or has not


def asked(client, messages, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 12, "seed": 1} | more)


@pytest.mark.parametrize("resent", [False, True])
def test_a_conversation_is_computed_once_whether_its_reasoning_comes_back_or_not(client, resent):
    history, before = [QUESTION], 0
    for turn in range(3):
        answer = asked(client, history)
        usage = answer.usage
        assert turn == 0 or usage.prompt_tokens_details.cached_tokens > before - PAGE
        before = usage.prompt_tokens - 2  # "<think>\n" is not there in the next turn
        message = answer.choices[0].message.model_dump(exclude_none=True)
        if not resent:
            message.pop("reasoning_content", None)
        history += [{"content": ""} | message, {"role": "user", "content": f"And {turn}?"}]


def test_a_late_word_of_the_system_s_leaves_the_cached_beginning_as_it_was(says, tokenizer):
    client = says("7\n</think>\n\n5")
    first = [QUESTION, {"role": "assistant", "content": "5"}]
    asked(client, [*first, {"role": "user", "content": "Sure?"}])
    asked(client, [*first, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sure?"}])
    begun = tokenizer.encode_chat(first, add_generation_prompt=False)
    prompts = [list(its.prompt_ids) for its in client.backend.asked]
    assert all(prompt[: len(begun)] == begun for prompt in prompts)
    assert tokenizer.decode(prompts[1]).count("Be brief.\n\nSure?") == 1


def test_the_changing_header_of_an_agent_s_is_dropped_and_nothing_behind_it(says, tokenizer):
    client = says("7\n</think>\n\n5")
    header, rest = "x-anthropic-billing-header: cch={};", "You are an agent."
    for system in (
        f"{header.format('1a')}\n{rest}",
        f"{header.format('2b')}\n{rest}",
        [{"type": "text", "text": header.format("3c")}, {"type": "text", "text": rest}],
    ):
        body = {"model": "tiny", "messages": [QUESTION], "system": system, "max_tokens": 9}
        assert httpx.post(f"{client.base_url}messages", json=body).status_code == 200
    prompts = {its.prompt_ids for its in client.backend.asked}
    told = tokenizer.decode(list(prompts.pop()))
    assert not prompts and "You are an agent." in told and "cch" not in told


def test_an_answer_that_was_cut_in_its_reasoning_is_gone_on_from_as_it_came(says, tokenizer):
    client = says("3 plus 4 is 7.\n</think>\n\n5")
    cut = asked(client, [QUESTION], max_tokens=3).choices[0].message
    assert cut.content is None and cut.reasoning_content
    for told in (cut.model_dump(), {"role": "assistant", "content": "", "reasoning_content": "3 plus"}):
        asked(client, [QUESTION, told, QUESTION])
    first, second = (list(its.prompt_ids) for its in client.backend.asked[1:])
    assert first == second and first.count(tokenizer.think_id) == 1


def test_reasoning_that_a_client_put_into_the_content_is_not_read_again(says, tokenizer):
    client = says("7\n</think>\n\n5")
    for content in ("<think>\n3 plus\n</think>\n\n5", "<think>\n3 plus"):
        asked(client, [QUESTION, {"role": "assistant", "content": content}, QUESTION])
        prompt = tokenizer.decode(list(client.backend.asked[-1].prompt_ids))
        assert "3 plus" not in prompt and prompt.count("<think>") == 1
