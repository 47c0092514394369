"""The terminal chat with tools, against a scripted engine: calls, what they bring, and what the model goes on from."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from slingshot.base.errors import SlingshotError
from slingshot.cli.chat import chat
from slingshot.cli.tool_chat import ChatTools
from slingshot.engine.sampling import SamplingParams
from slingshot.text.reasoning import parse
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import ToolCall, tool_format
from slingshot.text.turns import encode_calls

WORDS = ["What is 6*7? calculator"]


def typed():
    yield "What is 6*7?"
    raise EOFError


class CallingEngine:
    """Answers ids with the next of its responses."""

    def __init__(self, tokenizer, *responses):
        self.tokenizer, self.responses, self.asked = tokenizer, list(responses), []

    def stream(self, ids, params):
        self.asked.append(ids)
        said = self.responses.pop(0)
        parsed = parse(said, True, self.tokenizer)
        yield "reasoning", parsed.reasoning
        yield "answer", parsed.answer
        return SimpleNamespace(token_ids=said, answer=parsed.answer, finish_reason="stop")


def test_a_call_is_run_and_shown_and_the_answer_follows_what_was_said(monkeypatch):
    tokenizer = Tokenizer.train(WORDS, vocab_size=280, tools=True)
    lines = typed()
    monkeypatch.setattr(Console, "input", lambda self, prompt="": next(lines))
    call = ToolCall("calculator", '{"expression": "6*7"}')
    close = [tokenizer.end_think_id, *tokenizer.encode("\n\n")]
    first = [*tokenizer.encode("hard\n"), *close, *encode_calls(tokenizer, tool_format(tokenizer), [call]), 1]
    engine = CallingEngine(tokenizer, first, [*close, *tokenizer.encode("It is 42."), 1])
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    chat(engine, console, SamplingParams(), tools=ChatTools.open("calculator,python", tokenizer))
    shown = console.file.getvalue()
    assert 'calculator({"expression": "6*7"})' in shown and "-> 42" in shown and "It is 42." in shown
    assert "tool▁call" not in shown
    before, after = engine.asked
    assert "### python" in tokenizer.decode(before) and after[: len(before) + len(first)] == [*before, *first]
    told = tokenizer.decode(after[len(before) + len(first) :])
    assert told == "<｜tool▁output▁begin｜>42<｜tool▁output▁end｜><think>\n"


def test_tools_that_are_not_to_be_had_are_refused_in_a_line():
    with pytest.raises(SlingshotError, match="--tools: tool 'calculater' is unknown; did you mean calculator"):
        ChatTools.open("calculater", Tokenizer.train(WORDS, vocab_size=280, tools=True))
    with pytest.raises(SlingshotError, match="knows no tools"):
        ChatTools.open("calculator", Tokenizer.train(WORDS, vocab_size=280))
