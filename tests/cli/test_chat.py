"""The terminal chat against a scripted engine: what is shown, what is remembered, how it is left."""

import io
import os
import pty
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json
from slingshot.cli.chat import chat
from slingshot.cost.receipt import Meter
from slingshot.engine.sampling import SamplingParams
from slingshot.machine.machine import Machine
from slingshot.recipe.origin import Origin, last_task


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


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
        reason = "length" if answer == "cut" else "stop"
        return SimpleNamespace(token_ids=[1, 2, 3], answer=answer, finish_reason=reason)


def talk(monkeypatch, engine, *lines, origin=None):
    """Run a chat whose user types these lines (or raises them), then leaves by Ctrl-D; what the terminal shows."""
    script = iter([*lines, EOFError()])

    def typed(self, prompt=""):
        line = next(script)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(Console, "input", typed)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="standard")
    chat(engine, console, SamplingParams(seed=7), origin)
    return console.file.getvalue()


def test_reasoning_is_dim_above_a_plain_answer(monkeypatch):
    engine = ScriptedEngine([("reasoning", "3 plus 4"), ("reasoning", " is 7"), ("answer", "[7]")])
    shown = talk(monkeypatch, engine, "3+4?")
    assert "\x1b[2m3 plus 4\x1b[0m\x1b[2m is 7\x1b[0m\n\n[7]\n" in shown
    assert "3 tokens" in shown
    assert "cut at the length limit" in talk(monkeypatch, ScriptedEngine([("answer", "cut")]), "a")


def test_conversation_is_remembered_without_its_reasoning(monkeypatch):
    engine = ScriptedEngine([("reasoning", "hm"), ("answer", "7")], [("answer", "8")])
    talk(monkeypatch, engine, "3+4?", "  ", "and 1 more?")
    assert engine.asked[0][0] == [user("3+4?")]
    assert engine.asked[1][0] == [user("3+4?"), reply("7"), user("and 1 more?")]
    assert engine.asked[0][1].seed != engine.asked[1][1].seed


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch):
    engine = ScriptedEngine([("answer", "1, 2"), KeyboardInterrupt(), ("answer", ", 3")], [("answer", "yes")])
    shown = talk(monkeypatch, engine, "count", KeyboardInterrupt(), "go on")
    assert "stopped" in shown
    assert "1, 2, 3" not in shown
    assert engine.asked[1][0][1] == {"role": "assistant", "content": "1, 2"}
    assert engine.closed == 2


def test_an_error_is_one_line_and_costs_the_question_alone(monkeypatch):
    """A prompt that is too long leaves the conversation before it as it was."""
    too_long = SlingshotError("the prompt has 9 tokens [too many]")
    engine = ScriptedEngine([("answer", "first")], [too_long], [("answer", "again")])
    shown = talk(monkeypatch, engine, "a", "b", "c")
    assert "the prompt has 9 tokens [too many]; /new forgets the conversation so far" in shown
    assert engine.asked[2][0] == [user("a"), reply("first"), user("c")]
    assert "again" in shown


def test_a_model_of_single_turns_is_asked_one_question_at_a_time(monkeypatch):
    engine = ScriptedEngine([("answer", "10")], [("answer", "8")])
    origin = Origin(("arithmetic",), single_turns=True, example="What is 3+4-2+5?")
    shown = talk(monkeypatch, engine, "What is 3+4-2+5?", "What is 2+2+2+2?", origin=origin)
    assert "Trained on arithmetic; every question stands alone. Try: What is 3+4-2+5?" in shown
    assert engine.asked[1][0] == [user("What is 2+2+2+2?")]


def test_commands_of_the_chat(monkeypatch):
    engine = ScriptedEngine(*([("answer", str(number))] for number in range(5)))
    shown = talk(monkeypatch, engine, "/help", "/retry", "a", "/retry", "/system be brief", "b", "/new", "c", "/neww",
                 "/system", "d")  # fmt: skip
    asked = [messages for messages, _ in engine.asked]
    assert asked[:2] == [[user("a")], [user("a")]]
    assert engine.asked[0][1].seed != engine.asked[1][1].seed  # another answer to the same question
    told = {"role": "system", "content": "be brief"}
    assert asked[2] == [told, user("a"), reply("1"), user("b")]
    assert asked[3] == [told, user("c")]
    assert asked[4] == [user("c"), reply("3"), user("d")]
    assert "asks the last question again" in shown and "did you mean /new?" in shown


SLOW = """
import time
from types import SimpleNamespace
from rich.console import Console
from slingshot.cli.chat import chat
class Slow:
    def stream(self, messages, params):
        yield 'answer', 'begin'
        time.sleep(1.0)
        yield 'answer', 'end:' + messages[-1]['content']
        return SimpleNamespace(token_ids=[1], answer='x', finish_reason='stop')
chat(Slow(), Console())
"""


@pytest.mark.slow
def test_what_is_typed_during_an_answer_waits_for_the_next_prompt(tmp_path):
    """In a terminal: it does not show within the answer, and is the next question."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", SLOW])
    shown = ""

    def until(text):
        nonlocal shown
        while text not in shown:
            shown += os.read(terminal, 4096).decode(errors="replace")

    for seen, typed in (("> ", b"one\n"), ("begin", b"two\n"), ("end:two", b"\x04")):
        until(seen)
        os.write(terminal, typed)
    os.waitpid(pid, 0)
    assert "two" not in shown[shown.index("begin") : shown.index("end:one")]


def test_what_a_model_was_trained_on_is_read_from_its_receipts(tmp_path):
    machine = Machine(cpu="none", cores=1, memory_bytes=1)
    task = {"name": "arithmetic", "weight": 1.0, "params": {}}
    for name, kind, parents, config in (
        ("base", "pretrain", [], {"documents": {"tasks": [task | {"styles": {"steps": 1.0}}]}}),
        ("rl", "rl", [tmp_path / "base"], {"tasks": [task, task | {"name": "hhmm.py"}]}),
        ("foreign", "rl", [], {"tasks": [task]}),
        ("set", "sample", [tmp_path / "rl"], {"tasks": [task | {"name": "mine.py"}]}),
        ("tuned", "sft", [tmp_path / "base", tmp_path / "set"], {"tasks": [], "data": ["set"]}),
        ("text", "pretrain", [], {"documents": None}),
    ):
        write_json(tmp_path / name / "content.json", name)
        Meter().receipt(kind, name, config, parents, tmp_path / name, machine).write(tmp_path / name)
    solved = {"prompt": "What is 1+1?", "answer": "2", "correct": True}
    examples = {"arithmetic": [solved, solved | {"prompt": "1?", "correct": False}]}
    write_json(tmp_path / "evaluations" / "rl" / "evaluation.json", {"tasks": {}, "examples": examples})
    assert Origin.of(tmp_path / "rl") == Origin(("arithmetic", "hhmm.py"), True, "What is 1+1?")
    assert Origin.of(tmp_path / "foreign") == Origin(("arithmetic",), False, "")  # whatever it was before, it talked
    assert Origin.of(tmp_path / "none") == Origin() and not Origin().introduction
    assert last_task(tmp_path / "tuned")["name"] == "mine.py"  # of its data, before what its model had learnt
    assert last_task(tmp_path / "base") == task and last_task(tmp_path / "text") is None


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "\x1b[2J", "a\rb", "\x9b2J"])
def test_model_text_cannot_steer_the_terminal(monkeypatch, text):
    shown = talk(monkeypatch, ScriptedEngine([("answer", text)]), "a")
    assert text not in shown
    assert "".join(character for character in text if character.isprintable()) in shown
