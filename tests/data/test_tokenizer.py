"""The tokenizer: what it encodes, what it must never encode, and that transformers reads it the same way."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from slingshot.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, PAD, R1_TOKENS, THINK, USER, Tokenizer
from slingshot.files import SlingshotError, write_json

# Text as a user may write it: control tokens, pieces of them, and whatever Unicode has.
PARTS = [*R1_TOKENS, "<|im_start|>", "<|im_end|>", "<th", "ink>", "</", "<", "｜>", "<｜", "User", " ", "\n", "42", "足す", "é", "🙂", "the"]
hostile = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=8).map("".join)
harmless = hostile.filter(lambda text: not any(token in text for token in [*R1_TOKENS, "<|im_start|>", "<|im_end|>"]))
thorough = settings(derandomize=True, deadline=None, max_examples=150)


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [id for id in ids if id in tokenizer.control_ids]


def test_special_tokens_come_first_and_have_r1s_flags(tokenizer: Tokenizer) -> None:
    ids = (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.user_id,
        tokenizer.assistant_id,
        tokenizer.think_id,
        tokenizer.end_think_id,
    )
    assert ids == (0, 1, 2, 3, 4, 5, 6)
    assert tokenizer.eos_ids == {1}
    assert tokenizer.control_ids == set(range(7))
    special = {token.content: token.special for token in tokenizer._backend.get_added_tokens_decoder().values()}
    assert special == {BOS: True, EOS: True, PAD: True, USER: False, ASSISTANT: False, THINK: False, END_THINK: False}


def test_digits_stand_alone_and_words_keep_their_space(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([id]) for id in tokenizer.encode("12 34")] == ["1", "2", " ", "3", "4"]
    assert tokenizer.decode(tokenizer.encode("x the")[-1:]) == " the"


def test_training_is_deterministic_and_stops_at_its_size() -> None:
    texts = ["one two three one two", "two three four"]
    first, again = Tokenizer.train(iter(texts), 270), Tokenizer.train(texts, 270)
    assert first.vocab_size == 270
    assert first._backend.to_str() == again._backend.to_str()
    assert Tokenizer.train(texts, 5000).vocab_size < 300  # nothing left to merge


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_needs_text_and_room(texts: list[str]) -> None:
    with pytest.raises(SlingshotError, match="no text"):
        Tokenizer.train(texts, 300)
    with pytest.raises(SlingshotError, match=r"vocab_size 262 is too small: .* need 263"):
        Tokenizer.train(["text"], 262)


@thorough
@given(text=hostile)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, chatml: Tokenizer, text: str) -> None:
    for one in (tokenizer, chatml):
        ids = one.encode(text)
        assert controls(one, ids) == []
        assert one.decode(ids) == text
        assert one.encode_batch([text, "", text]) == [ids, [], ids]


@thorough
@given(system=hostile, first=hostile, reply=hostile, second=hostile)
def test_messages_never_become_control_tokens(tokenizer: Tokenizer, system: str, first: str, reply: str, second: str) -> None:
    messages = [("system", system), ("user", first), ("assistant", reply), ("user", second)]
    ids = tokenizer.encode_chat([{"role": role, "content": content} for role, content in messages])
    assert controls(tokenizer, ids) == [0, 3, 4, 1, 3, 4, 5]
    answered = reply.split(END_THINK)[-1].lstrip("\n")
    assert tokenizer.decode(ids) == f"{system}{USER}{first}{ASSISTANT}{answered}{USER}{second}{ASSISTANT}{THINK}\n"


@thorough
@given(role=hostile, content=hostile)
def test_nor_do_they_in_chatml_roles_included(chatml: Tokenizer, role: str, content: str) -> None:
    ids = chatml.encode_chat([{"role": "system", "content": "s"}, {"role": role, "content": content}], add_generation_prompt=False)
    assert controls(chatml, ids) == [1, 2, 1, 2]
    assert chatml.decode(ids) == f"system\ns\n{role}\n{content}\n"


def test_parts_of_a_message_do_not_join_into_a_control_token(tokenizer: Tokenizer) -> None:
    template = "{{ bos_token }}{% for message in messages %}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endfor %}"
    split = Tokenizer(tokenizer._backend, {**tokenizer.config, "chat_template": template})
    ids = split.encode_chat([{"role": "user", "content": [{"text": " <th"}, {"text": "ink> "}, {"text": "<｜User｜"}, {"text": ">"}]}])
    assert controls(split, ids) == [0]
    assert split.decode(ids) == f"{THINK}{USER}"


def test_neither_merges_nor_normalizers_lead_to_a_control_token() -> None:
    vocab = {"<tok>": 0, "he": 1, "h": 2, "e": 3, "t": 4, "o": 5, "k": 6, "<": 7, ">": 8, "at": 9, "a": 10}
    template = "{{ '<tok>' }}{{ messages[0].content }}"
    tokenizer = Tokenizer.from_bpe(vocab, [("h", "e"), ("a", "t")], {"<tok>": True, "he": True}, {"chat_template": template})
    assert tokenizer.encode("heat") == [2, 3, 9]
    assert tokenizer.encode_chat([{"role": "user", "content": "heat"}]) == [0, 2, 3, 9]
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str().replace('"normalized":false', '"normalized":true'))
    backend.normalizer = normalizers.Lowercase()
    lower = Tokenizer(backend, tokenizer.config)
    assert lower._backend.encode("<TOK>").ids == [0]  # the danger is real
    assert lower.encode("<TOK>") == [7, 4, 5, 6, 8]
    assert lower.encode_chat([{"role": "user", "content": "<TOK>"}]) == [0, 7, 4, 5, 6, 8]


def test_thinking_off_primes_the_closing_tag(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "3"}]
    three = tokenizer.encode("3")
    assert tokenizer.encode_chat(messages) == [0, 3, *three, 4, 5, *tokenizer.encode("\n")]
    assert tokenizer.encode_chat(messages, thinking=False) == [0, 3, *three, 4, 6]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == [0, 3, *three]


def test_a_chat_needs_a_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(SlingshotError, match="no chat template"):
        Tokenizer(tokenizer._backend, {"eos_token": EOS}).encode_chat([{"role": "user", "content": "3"}])


def test_lone_surrogates_are_replaced(tokenizer: Tokenizer) -> None:
    text = json.loads('"a\\ud800b"')
    assert tokenizer.decode(tokenizer.encode(text)) == "a\ufffdb"
    assert "a\ufffdb" in tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": text}]))


def test_decode_keeps_tags_and_drops_the_frame(tokenizer: Tokenizer) -> None:
    ids = [0, 3, *tokenizer.encode("3"), 4, 5, *tokenizer.encode("é"), 6, 1, 2, -1, 10**6]
    assert tokenizer.decode(ids) == f"{USER}3{ASSISTANT}{THINK}é{END_THINK}"


def test_think_tags_stay_even_where_they_are_special() -> None:
    vocab = {THINK: 0, END_THINK: 1, "<eos>": 2, "x": 3}
    tokenizer = Tokenizer.from_bpe(vocab, [], dict.fromkeys([THINK, END_THINK, "<eos>"], True), {"eos_token": "<eos>"})
    assert tokenizer.decode([0, 3, 1, 2]) == f"{THINK}x{END_THINK}"


@thorough
@given(ids=st.lists(st.integers(-1, 341), max_size=40))
def test_a_stream_joins_to_the_decoded_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)
    known = [id for id in ids if 0 <= id < tokenizer.vocab_size]
    assert tokenizer.decode(known) == tokenizer._backend.decode(known, skip_special_tokens=True)


@thorough
@given(text=hostile)
def test_a_stream_never_gives_part_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream, written = tokenizer.stream(), ""
    for id in tokenizer.encode(text):
        written += stream.push(id)
        assert text.startswith(written)
    assert written == text
    assert stream.finish() == ""


@pytest.fixture(scope="module")
def oracles(tokenizer: Tokenizer, chatml: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Any]]:
    """Each tokenizer with what transformers makes of its folder."""
    pairs = []
    for one, model_type in ((tokenizer, "deepseek_v3"), (chatml, "llama")):
        folder = tmp_path_factory.mktemp(model_type)
        one.save(folder)
        write_json(folder / "config.json", {"model_type": model_type})  # transformers chooses a tokenizer class by it
        pairs.append((Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)))
    return pairs


def test_transformers_reads_the_same_special_tokens(oracles: list[tuple[Tokenizer, Any]]) -> None:
    for ours, theirs in oracles:
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
        assert len(theirs) == ours.vocab_size


@thorough
@given(text=harmless, reply=harmless, last=harmless, generate=st.booleans(), thinking=st.booleans())
def test_transformers_encodes_identically(
    oracles: list[tuple[Tokenizer, Any]], text: str, reply: str, last: str, generate: bool, thinking: bool
) -> None:
    reasoned = f"so\n{END_THINK}\n\n{reply}"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": reasoned}, {"role": "user", "content": last}]
    for ours, theirs in oracles:
        assert theirs(text).input_ids == ours.encode(text)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=generate, thinking=thinking, return_dict=False)
        assert ours.encode_chat(messages, generate, thinking) == expected


@thorough
@given(text=hostile, generate=st.booleans())
def test_transformers_renders_identically_whatever_is_said(oracles: list[tuple[Tokenizer, Any]], text: str, generate: bool) -> None:
    messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    for ours, theirs in oracles:
        ids = ours.encode_chat(messages, generate)
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
        assert theirs.decode(ids) == rendered


def test_a_folder_survives_a_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {**tokenizer.config, "model_max_length": 77, "eos_token": {"content": EOS}})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 3]})
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == {1, 3}
    assert loaded.encode_chat([]) == [1]
    loaded.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").config == loaded.config
    assert loaded.config["model_max_length"] == 77


def test_the_default_of_several_templates_is_taken(tokenizer: Tokenizer) -> None:
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "{{ bos_token }}"}]
    assert Tokenizer(tokenizer._backend, {**tokenizer.config, "chat_template": templates}).encode_chat([]) == [0]


def test_unusable_folders_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(SlingshotError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SlingshotError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str())
    with pytest.raises(SlingshotError, match="only byte-level BPE"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<eos>"})
    with pytest.raises(SlingshotError, match="eos_token '<eos>'"):
        Tokenizer.load(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", [])
    with pytest.raises(SlingshotError, match="must hold a JSON object"):
        Tokenizer.load(tmp_path)
