"""The terminal chat against a scripted engine: what is shown, what is remembered, how it is left."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from slingshot.base.errors import SlingshotError
from slingshot.cli.chat import chat
from slingshot.engine.sampling import SamplingParams


class ScriptedEngine:
    """Streams given deltas, one list per question; an exception among them is raised there."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.closed = 0

    def stream(self, messages, params):
        self.asked.append(([dict(message) for message in messages], params))
        answer = ""
        try:
            for delta in self.answers.pop(0):
                if isinstance(delta, BaseException):
                    raise delta
                if delta[0] == "answer":
                    answer += delta[1]
                yield delta
        finally:
            self.closed += 1
        return SimpleNamespace(
            token_ids=[1, 2, 3], answer=answer, finish_reason="length" if answer == "cut" else "stop"
        )


def talk(monkeypatch, engine, *lines):
    """Run a chat whose user types these lines (or raises them), then leaves by Ctrl-D; return what the terminal shows."""
    script = iter([*lines, EOFError()])

    def typed(self, prompt=""):
        line = next(script)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(Console, "input", typed)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="standard")
    chat(engine, console, SamplingParams(seed=7))
    return console.file.getvalue()


def test_reasoning_is_dim_above_a_plain_answer(monkeypatch):
    shown = talk(
        monkeypatch, ScriptedEngine([("reasoning", "3 plus 4"), ("reasoning", " is 7"), ("answer", "[7]")]), "3+4?"
    )
    assert "\x1b[2m3 plus 4\x1b[0m\x1b[2m is 7\x1b[0m\n\n[7]\n" in shown
    assert "3 tokens" in shown


def test_conversation_is_remembered_without_its_reasoning(monkeypatch):
    engine = ScriptedEngine([("reasoning", "hm"), ("answer", "7")], [("answer", "8")])
    talk(monkeypatch, engine, "3+4?", "  ", "and 1 more?")
    user, reply = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}
    assert engine.asked[0][0] == [user]
    assert engine.asked[1][0] == [user, reply, {"role": "user", "content": "and 1 more?"}]
    assert engine.asked[0][1].seed != engine.asked[1][1].seed


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch):
    engine = ScriptedEngine([("answer", "1, 2"), KeyboardInterrupt(), ("answer", ", 3")], [("answer", "yes")])
    shown = talk(monkeypatch, engine, "count", KeyboardInterrupt(), "go on")
    assert "stopped" in shown
    assert ", 3" not in shown
    assert engine.asked[1][0][1] == {"role": "assistant", "content": "1, 2"}
    assert engine.closed == 2


def test_an_error_is_one_line_and_the_chat_goes_on(monkeypatch):
    engine = ScriptedEngine(
        [("answer", "first")], [SlingshotError("the prompt has 9 tokens [too many]")], [("answer", "again")]
    )
    shown = talk(monkeypatch, engine, "a", "b", "c")
    assert "the prompt has 9 tokens [too many]" in shown
    assert engine.asked[2][0] == [{"role": "user", "content": "c"}]
    assert "again" in shown


def test_cut_answers_say_so(monkeypatch):
    assert "cut at the length limit" in talk(monkeypatch, ScriptedEngine([("answer", "cut")]), "a")


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "\x1b[2J", "a\rb", "\x9b2J"])
def test_model_text_cannot_steer_the_terminal(monkeypatch, text):
    shown = talk(monkeypatch, ScriptedEngine([("answer", text)]), "a")
    assert text not in shown
    assert "".join(character for character in text if character.isprintable()) in shown
