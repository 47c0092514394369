"""Responses read back into reasoning, answer and calls; calls written as each family of models writes them."""

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.text.chat_template import R1_TEMPLATE, TOOL_TEMPLATE
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import FORMATS, ToolCall, tool_format
from slingshot.text.turns import cut_text, encode_calls, encode_conversation, read_turn, told_calls, turn_suffix

CALLS = [ToolCall("add", '{"a": 1, "b": "<｜tool▁call▁end｜></tool_call>"}'), ToolCall("now", "{}")]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
USER, ANSWER = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}


@pytest.fixture(scope="module")
def calling():
    return Tokenizer.train(["add 3+4 7"], vocab_size=280, tools=True)


def test_a_new_model_for_tools_writes_deepseeks_calls(calling, tmp_path):
    assert tool_format(calling).name == "deepseek"
    calling.save(tmp_path)
    assert tool_format(Tokenizer.load(tmp_path)) == tool_format(calling)
    asked = [USER, {**ANSWER, "content": None, "tool_calls": told_calls(CALLS[1:])}, {"role": "tool", "content": "12"}]
    shown = calling.decode(calling.encode_chat(asked, tools=[TOOL]))
    assert shown == (
        '## Tools\n\n### add\nAdds.\nParameters: {"type": "object"}\n<｜User｜>3+4?<｜Assistant｜>'
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        "<｜tool▁output▁begin｜>12<｜tool▁output▁end｜><think>\n"
    )


def test_reasoning_stays_while_tools_are_called_and_goes_at_the_next_question(calling):
    called = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": told_calls(CALLS[1:])}
    loop = [USER, called, {"role": "tool", "content": "12"}]
    assert "<think>\nhm\n</think>" in calling.decode(calling.encode_chat(loop))
    assert "hm" not in calling.decode(calling.encode_chat([*loop, ANSWER, USER]))


@pytest.mark.parametrize("thinking", [True, False])
def test_without_tools_it_is_r1s_template(calling, thinking):
    plain = Tokenizer(calling._backend, calling.config | {"chat_template": R1_TEMPLATE})
    assert calling.chat_template == TOOL_TEMPLATE
    for chat in ([USER], [USER, ANSWER, USER], [{"role": "system", "content": "Be brief."}, USER, ANSWER]):
        for more in (True, False):
            given = {"add_generation_prompt": more, "thinking": thinking}
            assert calling.encode_chat(chat, **given) == plain.encode_chat(chat, **given)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_calls_are_read_back_as_they_were_written(calling, form):
    if form.name in ("llama", "kimi", "qwen-coder"):  # one at most; tags that are none here; arguments that are tags
        calls = [] if form.name == "qwen-coder" else CALLS[1:]
    else:
        calls = CALLS if form.name == "deepseek" else [ToolCall("add", '{"a": 1}'), CALLS[1]]
    ids = encode_calls(calling, form, calls)
    assert read_turn(ids, False, calling, form)[1] == calls


def test_a_response_without_a_form_is_parsed_as_ever(calling):
    ids = [*calling.encode("hm\n"), calling.end_think_id, *calling.encode("\n\n7"), calling.eos_id]
    for form in None, tool_format(calling):
        parsed, calls = read_turn(ids, True, calling, form)
        assert (parsed.reasoning, parsed.answer, parsed.closed, calls) == ("hm", "7", True, [])


@pytest.mark.parametrize("told", [[USER], [{"role": "tool", "content": "12"}, USER]])
def test_what_stands_between_two_turns_is_kept_to_the_last_newline(chatml, told):
    """ChatML writes one behind every end token: the ids are those of the whole chat."""
    said = [*chatml.encode("7"), chatml.eos_id]
    whole = chatml.encode_chat([USER, ANSWER, *told])
    assert chatml.encode_chat([USER]) + said + turn_suffix(chatml, told) == whole


@pytest.mark.parametrize("arguments", ["{", "[]", "nothing", '{"a": 1}', "[" * 50_000])
def test_what_follows_a_call_does_not_depend_on_how_it_was_written(calling, arguments):
    told = [{"role": "tool", "content": "12"}]
    suffix = turn_suffix(calling, told, [ToolCall("", arguments)])
    assert calling.decode(suffix) == "<｜tool▁output▁begin｜>12<｜tool▁output▁end｜><think>\n"


def test_a_long_observation_is_cut_and_says_so(calling):
    assert cut_text(calling, "word " * 100, None) == "word " * 100 and cut_text(calling, "7", 5) == "7"
    cut = cut_text(calling, "日本語" * 100, 10)
    assert cut.endswith(" ...") and len(calling.encode(cut)) < 16 and "\ufffd" not in cut


@pytest.mark.parametrize("silent", [False, True])
def test_a_conversation_is_its_turns_and_a_mask_of_what_the_assistant_says(calling, silent):
    call = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": told_calls(CALLS[1:])}
    chat = [USER, call, {"role": "tool", "content": "12"}, ANSWER]
    ids, mask = encode_conversation(calling, [*chat, USER], [TOOL], silent)
    assert calling.decode(ids) == calling.decode(calling.encode_chat([USER], tools=[TOOL])) + (
        "hm\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        "<｜tool▁output▁begin｜>12<｜tool▁output▁end｜>" + ("7" if silent else "<think>\n\n</think>\n\n7")
    )
    said = calling.decode(id for id, each in zip(ids, mask, strict=True) if each)
    assert len(ids) == len(mask) and said.startswith("hm\n</think>") and "12" not in said and "User" not in said
    assert [place for place, id in enumerate(ids) if id == calling.eos_id][1:] == [len(ids) - 1] and mask[-1] == 1


def test_calls_are_not_told_to_a_model_that_knows_none():
    plain = Tokenizer.train(["add 3+4 7"], vocab_size=280)
    call = {"role": "assistant", "content": "", "tool_calls": told_calls(CALLS[1:])}
    with pytest.raises(SlingshotError, match="chat template knows no tools, and the chat calls some"):
        encode_conversation(plain, [USER, call], [])
