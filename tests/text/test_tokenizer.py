"""The tokenizer: what it encodes, what it must never encode, and that transformers reads it the same way."""

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json
from slingshot.text.tokenizer import ASSISTANT, BOS, END_THINK, EOS, PAD, R1_TOKENS, THINK, USER, Tokenizer

# Text as a user may write it: control tokens, pieces of them, and whatever Unicode has.
PARTS = [
    *R1_TOKENS,
    *["<|im_start|>", "<|im_end|>", "<th", "ink>", "</", "<", "｜>", "<｜", "User", "42", "足す", "é", "🙂", "the"],
    *" \n",
]
hostile = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=8).map("".join)
harmless = hostile.filter(lambda text: not any(token in text for token in [*R1_TOKENS, "<|im_start|>", "<|im_end|>"]))


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [id for id in ids if id in tokenizer.control_ids]


def test_special_tokens_come_first_and_have_r1s_flags(tokenizer: Tokenizer) -> None:
    assert [tokenizer.control_id(token) for token in (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)] == [*range(7)]
    named = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.think_id, tokenizer.end_think_id
    assert named == (0, 1, 2, 5, 6)
    assert tokenizer.eos_ids == {1}
    assert tokenizer.control_ids == set(range(7))
    special = {token["content"]: token["special"] for token in tokenizer.description()["added_tokens"]}
    assert special == {BOS: True, EOS: True, PAD: True, USER: False, ASSISTANT: False, THINK: False, END_THINK: False}


def test_digits_stand_alone_and_words_keep_their_space(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([id]) for id in tokenizer.encode("12 34")] == ["1", "2", " ", "3", "4"]
    assert tokenizer.decode(tokenizer.encode("x the")[-1:]) == " the"


def test_training_is_deterministic_and_stops_at_its_size() -> None:
    texts = ["one two three one two", "two three four"]
    first, again = Tokenizer.train(iter(texts), 270), Tokenizer.train(texts, 270)
    assert first.vocab_size == 270
    assert first.description() == again.description()
    assert Tokenizer.train(texts, 5000).vocab_size < 300  # nothing left to merge


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_needs_text_and_room(texts: list[str]) -> None:
    with pytest.raises(SlingshotError, match="no text"):
        Tokenizer.train(texts, 300)
    with pytest.raises(SlingshotError, match=r"vocab_size 262 is too small: .* need 263"):
        Tokenizer.train(["text"], 262)


@given(text=hostile)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, chatml: Tokenizer, text: str) -> None:
    for one in (tokenizer, chatml):
        ids = one.encode(text)
        assert controls(one, ids) == []
        assert one.decode(ids) == text
        assert one.encode_batch([text, "", text]) == [ids, [], ids]
        stream, written = one.stream(), ""
        for id in ids:
            written += stream.push(id)
            assert text.startswith(written)  # never part of a character
        assert written == text and stream.finish() == ""


@given(system=hostile, first=hostile, reply=hostile, second=hostile)
def test_messages_never_become_control_tokens(
    tokenizer: Tokenizer, system: str, first: str, reply: str, second: str
) -> None:
    """But for the tags of a reply's own reasoning."""
    reply = f"{END_THINK}{reply}"
    messages = [("system", system), ("user", first), ("assistant", reply), ("user", second)]
    ids = tokenizer.encode_chat([{"role": role, "content": content} for role, content in messages])
    assert controls(tokenizer, ids) == [0, 3, 4, 1, 3, 4, 5]
    answered = reply.split(END_THINK)[-1]
    assert tokenizer.decode(ids) == f"{system}{USER}{first}{ASSISTANT}{answered}{USER}{second}{ASSISTANT}{THINK}\n"


@given(role=hostile, content=hostile)
def test_nor_do_they_in_chatml_roles_included(chatml: Tokenizer, role: str, content: str) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": role, "content": content}]
    ids = chatml.encode_chat(messages, add_generation_prompt=False)
    assert controls(chatml, ids) == [1, 2, 1, 2]
    assert chatml.decode(ids) == f"system\ns\n{role}\n{content}\n"


def test_neither_merges_nor_normalizers_lead_to_a_control_token() -> None:
    vocab = {"<tok>": 0, "he": 1, "h": 2, "e": 3, "t": 4, "o": 5, "k": 6, "<": 7, ">": 8, "at": 9, "a": 10}
    template = "{{ '<tok>' }}{{ messages[0].content }}"
    merges, added = [("h", "e"), ("a", "t")], {"<tok>": True, "he": True}
    tokenizer = Tokenizer.from_bpe(vocab, merges, added, {"chat_template": template})
    assert tokenizer.encode("heat") == [2, 3, 9]
    assert tokenizer.encode_chat([{"role": "user", "content": "heat"}]) == [0, 2, 3, 9]
    described = tokenizer._backend.to_str().replace('"normalized":false', '"normalized":true')
    backend = tokenizers.Tokenizer.from_str(described)
    backend.normalizer = normalizers.Lowercase()
    lower = Tokenizer(backend, tokenizer.config)
    assert lower._backend.encode("<TOK>").ids == [0]  # the danger is real
    assert lower.encode("<TOK>") == [7, 4, 5, 6, 8]
    assert lower.encode_chat([{"role": "user", "content": "<TOK>"}]) == [0, 7, 4, 5, 6, 8]


def test_what_a_chat_ends_with(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "3"}]
    three = tokenizer.encode("3")
    assert tokenizer.encode_chat(messages) == [0, 3, *three, 4, 5, *tokenizer.encode("\n")]
    assert tokenizer.encode_chat(messages, thinking=False) == [0, 3, *three, 4, 6]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == [0, 3, *three]
    messages.append({"role": "assistant", "content": "It is "})
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert ids == [0, 3, *three, 4, *tokenizer.encode("It is ")]


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


@given(ids=st.lists(st.integers(-1, 341), max_size=40))
def test_a_stream_joins_to_the_decoded_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)
    known = [id for id in ids if 0 <= id < tokenizer.vocab_size]
    assert tokenizer.decode(known) == tokenizer._backend.decode(known, skip_special_tokens=True)


@pytest.fixture(scope="module")
def oracles(
    tokenizer: Tokenizer, chatml: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Tokenizer, Any]]:
    """Each tokenizer with what transformers makes of its folder."""
    pairs = []
    for one, model_type in ((tokenizer, "deepseek_v3"), (chatml, "llama")):
        folder = tmp_path_factory.mktemp(model_type)
        one.save(folder)
        write_json(folder / "config.json", {"model_type": model_type})  # transformers chooses a tokenizer class by it
        pairs.append((Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)))
    return pairs


@given(text=harmless, reply=harmless, last=harmless, generate=st.booleans(), thinking=st.booleans())
def test_transformers_encodes_identically(
    oracles: list[tuple[Tokenizer, Any]], text: str, reply: str, last: str, generate: bool, thinking: bool
) -> None:
    reasoned = f"so\n{END_THINK}\n\n{reply}"
    said = [("user", text), ("assistant", reasoned), ("user", last)]
    messages = [{"role": role, "content": content} for role, content in said]
    for ours, theirs in oracles:
        assert theirs(text).input_ids == ours.encode_raw(text)
        asked = {"add_generation_prompt": generate, "thinking": thinking, "return_dict": False}
        assert ours.encode_chat(messages, generate, thinking) == theirs.apply_chat_template(messages, **asked)


def test_what_else_a_template_reads(tokenizer: Tokenizer) -> None:
    template = "{{ bos_token }}{{ tools[0].name }}{{ documents[0].text }}{{ effort }}{{ enable_thinking }}"
    told = Tokenizer(tokenizer._backend, {**tokenizer.config, "chat_template": template})
    more = {"documents": [{"text": EOS}], "effort": "<｜User｜>", "enable_thinking": "no"}
    ids = told.encode_chat([], tools=[{"name": "<think>"}], **more)
    assert controls(told, ids) == [0]
    assert told.decode(ids) == f"{THINK}{EOS}{USER}no"


def test_a_tokenizer_must_fit_its_model(tokenizer: Tokenizer) -> None:
    tokenizer.check_fits(tokenizer.vocab_size)
    tokenizer.check_fits(512)  # padded
    with pytest.raises(SlingshotError, match=r"the tokenizer has 325 ids, the model's vocabulary 324"):
        tokenizer.check_fits(324)


# How the splits of well-known tokenizers look in tokenizer.json.
DIGITS, CJK = {"Regex": r"\p{N}{1,3}"}, {"Regex": "[一-龥぀-ゟ゠-ヿ]+"}
PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
DEEPSEEK = {"Regex": PUNCTUATED + r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIPELINES = {
    "deepseek": ({"type": "Sequence", "normalizers": []}, [DIGITS, CJK, DEEPSEEK], False),
    "llama3": (None, [{"Regex": LLAMA}], True),
    "qwen": ({"type": "NFC"}, [{"Regex": LLAMA.replace("{1,3}", "")}], False),
}


@pytest.fixture(scope="module", params=PIPELINES)
def piped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer that splits text as a well-known one does, with every kind of added tokens, and transformers'."""
    normalizer, patterns, ignore_merges = PIPELINES[request.param]
    splits = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} for pattern in patterns]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = [pair.split() for pair in ["h e", "Ġ t", "Ġt he", "Ċ Ċ", "Ġ Ġ", "1 2", "12 3", "Ã ©", "' s", "l l", "o k"]]
    # `hello` can only be looked up whole
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges), "hello"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    plain: dict[str, Any] = {"special": False}
    added = {"<bos>": {}, "<eos>": {}, THINK: plain, END_THINK: plain, "<|end|>": {"rstrip": True}}
    added |= {"<|left|>": {"lstrip": True, "special": False}, "  \n  ": plain, "<|norm|>": {"normalized": True}}
    tokens = [{"content": token, **flags, **changed} for token, changed in added.items()]
    description = {
        "added_tokens": [{"id": id, **token} for id, token in enumerate(tokens, start=len(vocab))],
        "normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytewise]},
        "post_processor": bytewise, "decoder": bytewise,
        "model": {"type": "BPE", "ignore_merges": ignore_merges, "merges": merges},
    }  # fmt: skip
    description["model"]["vocab"] = {token: id for id, token in enumerate(vocab)}
    folder = tmp_path_factory.mktemp(request.param)
    write_json(folder / "tokenizer.json", description)
    template = "{{ bos_token }}{% for m in messages %}{{ 'the\x1c \u3000<|left|>' }}{{ m.content }}{{ '<|end|>\n' }}"
    config = {"bos_token": "<bos>", "eos_token": {"__type": "AddedToken", "content": "<eos>"}}
    config |= {"chat_template": template + "{% endfor %}{{ '<|norm|>' }}", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": "llama"})
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


SPOKEN = [
    "the", "hello", "é", "e\u0301", "がか\u3099", "中文", "ア", "한", "1", "12", "1234", "٣", "'s", "'S", "ok", "!?",
    "_",
]  # fmt: skip
SPACES = ["🙂", "\u200b", " ", "  ", "\n", "\r\n", "  \n  ", "\t", "\u3000", "\x1c", "\x85", "\u0301"]
spoken = st.lists(st.sampled_from(SPOKEN + SPACES) | st.text(max_size=3), max_size=10).map("".join)


@given(text=spoken, more=spoken)
def test_well_known_splits_and_forms(piped: tuple[Tokenizer, Any], text: str, more: str) -> None:
    ours, theirs = piped
    if "<" not in text + more:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        messages = [{"role": "user", "content": text}, {"role": "user", "content": more}]
        assert ours.encode_chat(messages) == theirs.apply_chat_template(messages, return_dict=False)
    normalized = text if ours._backend.normalizer is None else ours._backend.normalizer.normalize_str(text)
    assert ours.decode(ours.encode(text)) == normalized
    assert ours.encode_batch([text, more]) == [ours.encode(text), ours.encode(more)]


def test_added_tokens_that_are_spaces_are_text(piped: tuple[Tokenizer, Any]) -> None:
    ours, theirs = piped
    (id,) = theirs("  \n  ").input_ids
    assert ours.encode("the  \n  the") == [*ours.encode("the"), id, *ours.encode("the")]
    assert id not in ours.control_ids and ours.decode([id]) == "  \n  "


def test_added_tokens_swallow_the_spaces_beside_them(piped: tuple[Tokenizer, Any]) -> None:
    ours, theirs = piped
    left, end, norm, bos = map(theirs.convert_tokens_to_ids, ("<|left|>", "<|end|>", "<|norm|>", "<bos>"))
    ids = ours.encode_chat([{"role": "user", "content": "the\x1c \u3000"}, {"role": "user", "content": "  the"}])
    before = [*ours.encode("the\x1c"), left]
    assert ids == [bos, *before, *ours.encode("the\x1c \u3000"), end, *before, *ours.encode("  the"), end, norm]


def test_nothing_is_unknown_or_random() -> None:
    vocab = {"<unk>": 0, **{letter: id for id, letter in enumerate("abcd", start=1)}, "ab": 5, "abc": 6}
    description = Tokenizer.from_bpe(vocab, [("a", "b"), ("ab", "c")], {"<unk>": True}, {}).description()
    description["model"] |= {"unk_token": "<unk>", "dropout": 0.9}
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)), {})
    assert {tuple(tokenizer.encode("abcxd")) for _ in range(20)} == {(6, 4)}


def test_a_regular_expression_may_give_up(tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+c"}, "behavior": "Isolated", "invert": False}
    description = tokenizer.description()
    description["pre_tokenizer"]["pretokenizers"][0] = split
    slow = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)), tokenizer.config)
    for encode in (slow.encode, lambda text: slow.encode_batch([text])):
        with pytest.raises(SlingshotError, match="could not split the text"):
            encode("a" * 40 + "b")
    capfd.readouterr()  # the Rust side has printed where it gave up
