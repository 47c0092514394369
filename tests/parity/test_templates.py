"""transformers is the oracle for chat templates: in every template of trl's every chat is the same text and ids.

trl is read as a folder of files; importing it takes long.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json
from slingshot.text.chat_template import R1_TEMPLATE, ControlTokens, render
from slingshot.text.tokenizer import R1_TOKENS, Tokenizer

_spec = importlib.util.find_spec("trl")
assert _spec is not None and _spec.submodule_search_locations is not None
TEMPLATES = {
    file.stem: file.read_text()
    for file in sorted((Path(_spec.submodule_search_locations[0]) / "chat_templates").glob("*.jinja"))
}

# The families that slingshot runs, each with how its tokenizers split text; these see every chat.
FAMILIES = dict.fromkeys(["deepseek_r1_distill", "deepseekv3"], "deepseek-v3") | dict.fromkeys(
    ["llama3", "llama3_1", "llama3_2"], "llama-bpe"
)
FAMILIES |= dict.fromkeys(["qwen2_5", "qwen3", "qwen3_training", "qwen3_instruct_2507"], "qwen2")
FAMILIES |= dict.fromkeys(["phi3", "glm4moe", "gptoss"], "smollm")

_CITY = {"type": "string", "description": 'A name, "北京" & <so on>'}
_PARAMETERS = {"type": "object", "properties": {"city": _CITY}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Weather", "parameters": _PARAMETERS}
_NUMBERS = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"enum": [1, None]}}}
TOOLS = [{"type": "function", "function": WEATHER}]
TOOLS += [{"type": "function", "function": {"name": "add", "description": "", "parameters": _NUMBERS}}]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "tools": TOOLS},
    {"tools": TOOLS[1:]},
    {"add_generation_prompt": True, "thinking": False, "enable_thinking": False},
    {"continue_final_message": True},
    {"add_generation_prompt": True, "documents": [{"title": "T", "text": "é"}], "reasoning_effort": "high"},
    {"date_string": "1 Jan 2025", "extra": [1]},
]


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def called(name: str, arguments: Any, content: Any = None, **more: Any) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return reply(content, tool_calls=[call], **more)


def told(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "call_1", "name": "weather"}


TWO_CALLS = [{"id": str(i), "type": "function", "function": {"name": "add", "arguments": {"a": i}}} for i in range(2)]
CHATS: list[list[dict[str, Any]]] = [
    [user("Hi")],
    [system("Be brief."), user("Hi")],
    [user("Hi"), reply("Hello!"), user("2+3?")],
    [system("S"), user("a"), reply("b"), user("c"), reply("d"), user("e")],
    [user("")],
    [user("  padded \n")],
    [user("line\nbreaks\r\n\ttabs")],
    [user("日本語 🙂 é e\u0301 \u200b ﷺ \ufdd0\uffff")],
    [user("\x00\x07\x1f\x7f 123 4567 it's I'LL")],
    [user("a"), reply("")],
    [user("a"), reply("  b  "), user("c")],
    [user("a"), reply("trailing\n")],
    [system(""), user("x")],
    [system("  s  "), user("x"), reply("y")],
    [user("a"), reply("<think>\nso\n</think>\n\nb"), user("c")],
    [user("a"), reply("so</think>b"), user("c")],
    [user("a"), reply("<think>only"), user("c")],
    [user("a"), reply("b", reasoning_content="because"), user("c"), reply("d", reasoning_content="since\n")],
    [user("a"), reply("b", reasoning="because"), user("c")],
    [user("a"), reply("b", thinking="because")],
    [user("a"), reply("<think>\nx\n</think>\n\nb")],
    [user("a"), reply("b", reasoning_content="")],
    [user("a"), reply("b", reasoning_content=None), user("c")],
    [user("w?"), called("weather", {"city": "Paris", "days": 2}), told("sunny"), reply("It is sunny."), user("and?")],
    [user("w?"), called("weather", {"city": "北京"}, "Let me see."), told('{"t": 3}')],
    [user("w?"), called("weather", '{"city": "Paris"}'), told("sunny")],
    [user("w?"), {"role": "assistant", "tool_calls": TWO_CALLS}, told("r"), told("3.5")],
    [user("w?"), called("weather", {}, ""), told("")],
    [
        user("w?"),
        called("weather", {"city": "P"}, "x", reasoning_content="need"),
        told("sun"),
        reply("ok", reasoning_content="got it"),
    ],
    [
        user("w?"),
        called("add", {"a": [1, {"b": None}], "b": True, "c": 'q"\\\n'}, ""),
        told("n"),
        user("more"),
        reply("k"),
    ],
    [user([{"type": "text", "text": "part one "}, {"type": "text", "text": "part two"}])],
    [user([{"type": "text", "text": "look"}, {"type": "image", "image": "x.png"}])],
    [
        system([{"type": "text", "text": "sys"}]),
        user([{"type": "text", "text": "hi"}]),
        reply([{"type": "text", "text": "yo"}]),
    ],
    [user(None)],
    [user("a"), reply(None), user("b")],
    [user("a"), user("b")],
    [reply("first")],
    [user("a"), reply("b"), reply("c")],
    [system("1"), system("2"), user("a")],
    [user("a"), system("late"), user("b")],
    [{"role": "developer", "content": "dev"}, user("x")],
    [{"role": "narrator", "content": "hm"}],
    [{"content": "no role"}],
    [{"role": "user"}],
    [user("{{ 7*7 }} {% raw %}")],
    [user("<tool_response>\nx\n</tool_response>"), reply("y")],
    [user("a"), reply("```\n<b>\n```"), user("'\"\\")],
    [user("/no_think hi")],
    [user("hi /nothink"), reply("b" * 300), user("c " * 100)],
    [told("orphan")],
    [user("w?"), called("weather", {"city": "x"}, weight=1), told({"temp": 3}), reply("z")],
    [user("x"), reply("y", name="n", refusal=None, tool_calls=[])],
    [user("x"), reply("y", tool_calls=None, annotations=[])],
    [user(3)],
    [user({"a": 1})],
    [user("CONTINUE_FINAL_MESSAGE_TAG "), reply("CONTINUE_FINAL_MESSAGE_TAG x")],
]
assert len(CHATS) > 50


def added_tokens(template: str) -> list[str]:
    """What a template writes that its tokenizer has as one token."""
    bars = r"<\|[^|<> ]{1,40}\|>|<｜[^｜]{1,40}｜>|<\|?[a-z_]{2,20}\|?>|\[gMASK\]"
    bars += "|</?(?:think|tools|tool_call|tool_response|arg_key|arg_value)>"
    return sorted({*re.findall(bars, template), "<bos>", "<eos>"})


Pair = tuple[Tokenizer, Any]
SLOW = pytest.mark.slow
composed = functools.partial(unicodedata.normalize, "NFC")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """both(name): a tokenizer with that template, and what transformers makes of its folder."""
    transformers.logging.set_verbosity_error()
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            added, folder = added_tokens(TEMPLATES[name]), tmp_path_factory.mktemp(name)
            merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ċ", "Ċ"), ("1", "2"), ("i", "n"), ("Ġ", "Ġ")]
            tokens = [*added, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
            config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
            flags = {token: "think" not in token for token in added}
            vocab = {token: id for id, token in enumerate(tokens)}
            config |= {"chat_template": TEMPLATES[name]}
            ours = Tokenizer.from_bpe(vocab, merges, flags, config, FAMILIES.get(name, "smollm"))
            ours.save(folder)
            write_json(folder / "config.json", {"model_type": "llama"})  # transformers chooses a tokenizer class by it
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            theirs.chat_control_tokens = added
            made[name] = ours, theirs
        return made[name]

    yield make
    transformers.logging.set_verbosity_warning()


def compare(pair: Pair, chat: list[dict[str, Any]], options: dict[str, Any]) -> bool:
    """The same text and ids, or refused by both; whether it was rendered."""
    ours, theirs = pair
    options = {"thinking": True, "enable_thinking": True, "add_generation_prompt": False, **options}
    try:
        expected = theirs_of(theirs, chat, options)
    except Exception:
        with pytest.raises(SlingshotError):
            ours.encode_chat(chat, **options)
        return False
    ids = ours.encode_chat(chat, **options)
    assert composed(theirs.decode(ids)) == composed(expected), (chat, options)
    if not any(token in repr([chat, options]) for token in theirs.chat_control_tokens):
        assert ids == theirs(expected, add_special_tokens=False).input_ids, (chat, options)
    return True


def theirs_of(theirs: Any, chat: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """transformers' text, but with nulls for templates that ask for them, and with typed control tokens as text."""
    typed = [message for message in chat if message.get("role") != "assistant"]
    if any(token in repr([typed, options]) for token in theirs.chat_control_tokens):
        return theirs.decode(
            theirs.apply_chat_template(chat, return_dict=False, sanitize_control_tokens=True, **options)
        )
    if re.search(r"\['content'\] is none", theirs.chat_template):
        chat = [{key: value for key, value in m.items() if value is not None or key == "content"} for m in chat]
        (text,), _ = render_jinja_template(
            [chat], chat_template=theirs.chat_template, **theirs.special_tokens_map, **options
        )
        return text
    return theirs.apply_chat_template(chat, tokenize=False, **options)


OTHERS = [name for name in TEMPLATES if name not in FAMILIES]


@pytest.mark.parametrize(
    "name", [*FAMILIES, *OTHERS[::4], *(pytest.param(each, marks=SLOW) for each in OTHERS if each not in OTHERS[::4])]
)
def test_transformers_renders_the_same(both: Callable[[str], Pair], name: str) -> None:
    """Every chat of the families in two options, which take turns; of other templates every ninth pair."""
    pairs = list(itertools.product(CHATS, OPTIONS))
    cases = pairs[:: len(OPTIONS) + 1]
    if name in FAMILIES:
        cases = [pairs[len(OPTIONS) * i + (i + turn) % len(OPTIONS)] for i in range(len(CHATS)) for turn in (0, 3)]
    assert sum(compare(both(name), chat, options) for chat, options in cases) > len(cases) / 6


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_renders_every_chat_with_every_option_the_same(both: Callable[[str], Pair], name: str) -> None:
    cases = list(itertools.product(CHATS, OPTIONS))
    assert sum(compare(both(name), chat, options) for chat, options in cases) > len(cases) / 6


TYPED = ["llama3_1", "qwen2_5", "qwen3_instruct_2507", "glm4moe", "phi3"]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", *(pytest.param(each, marks=SLOW) for each in TYPED)])
def test_control_tokens_that_are_typed_stay_text(both: Callable[[str], Pair], name: str) -> None:
    """The control tokens are those of the template alone, as with transformers' sanitize_control_tokens."""
    ours, theirs = both(name)
    generator = random.Random(name)
    parts = [*theirs.chat_control_tokens, "a", " ", "\n", "é", "</think>"]

    def typed() -> str:
        return "".join(generator.choices(parts, k=generator.randint(0, 4)))

    def controls(ids: list[int]) -> list[int]:
        return [id for id in ids if id in ours.control_ids]

    differ = 0
    for _ in range(60):
        said = generator.choice([reply("<think>so</think>b"), reply("b", reasoning_content=typed())])
        chat = [system(typed()), user(typed()), reply("b"), user(typed()), said, user(typed())][
            : generator.randint(1, 6)
        ]
        tools = [{"type": "function", "function": {"name": typed(), "description": typed(), "parameters": {}}}]
        options = {"add_generation_prompt": True, "tools": generator.choice([None, tools])}
        if compare((ours, theirs), chat, options):
            ids = ours.encode_chat(chat, **options)
            asked = {"return_dict": False, "thinking": True, "enable_thinking": True, **options}
            assert controls(ids) == controls(theirs.apply_chat_template(chat, sanitize_control_tokens=True, **asked))
            differ += controls(ids) != controls(theirs.apply_chat_template(chat, **asked))
    assert differ > 20


def test_r1_is_deepseeks_for_plain_chats() -> None:
    """V3's template differs from R1's in several system messages, which it joins; for one the two are the same."""
    special = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}

    def text(template: str, chat: list[dict[str, Any]], **options: Any) -> str:
        return "".join(render(template, chat, ControlTokens(R1_TOKENS), special, **options))

    plain = [
        chat for chat in CHATS if all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in chat)
    ]
    plain = [chat for chat in plain if {m["role"] for m in chat} <= {"system", "user", "assistant"}]
    assert len(plain) > 20
    for chat, add_generation_prompt in itertools.product(plain, (False, True)):
        ours = text(R1_TEMPLATE, chat, add_generation_prompt=add_generation_prompt)
        assert ours == text(TEMPLATES["deepseekv3"], chat, add_generation_prompt=add_generation_prompt)
        if [m["role"] for m in chat].count("system") < 2:
            assert ours == text(TEMPLATES["deepseek_r1_distill"], chat, add_generation_prompt=add_generation_prompt)
