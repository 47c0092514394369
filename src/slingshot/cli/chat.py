"""`slingshot chat PATH`: talk with a checkpoint in the terminal, its reasoning dimmed above the answer.

chat(Engine.load("runs/tiny/rl_final"), Console(), origin=Origin.of(Path("runs/tiny/rl_final")))
"""

from __future__ import annotations

import contextlib
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean
from slingshot.engine.engine import Engine, Message
from slingshot.engine.sampling import SamplingParams
from slingshot.recipe.origin import Origin

DEFAULT_PARAMS = SamplingParams(max_tokens=4096, temperature=0.6, top_p=0.95)  # R1's recommended temperature and top-p

COMMANDS = {
    "/new": "forgets the conversation",
    "/retry": "asks the last question again",
    "/system TEXT": "tells the model TEXT before every conversation; without TEXT nothing",
    "/help": "shows this",
}


def chat(
    engine: Engine, console: Console, params: SamplingParams = DEFAULT_PARAMS, origin: Origin | None = None
) -> None:
    """Read questions from the console and stream the answers until end of input.

    A model of single turns (`origin`) is asked one question at a time; any other is told the conversation so far.
    """
    origin = origin or Origin()
    if origin.introduction:
        console.print(origin.introduction, markup=False, highlight=False, soft_wrap=True)
    console.print("Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.", style="dim", highlight=False)
    system, history, question = list[Message](), list[Message](), ""
    for turn in range(2**31):  # a seed of its own for each turn: the same question may get another answer
        try:
            typed = console.input("\n[bold]> [/bold]").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            console.print()
            return
        command, _, rest = typed.partition(" ")
        if command == "/retry" and question:
            history = history[:-2]
        elif command == "/new":
            history = []
        elif command == "/system":
            system = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
        elif command == "/help":
            for name, what in COMMANDS.items():
                console.print(f"{name}  {what}", style="dim", markup=False, highlight=False)
        elif typed.startswith("/") and "\n" not in typed:
            hint = did_you_mean(command, [name.split()[0] for name in COMMANDS])
            wrong = f"{command}: no such command, or nothing to do; {hint}"
            console.print(wrong, style="red", markup=False, highlight=False)
        if not typed or (typed.startswith("/") and not (command == "/retry" and question)):
            continue
        question = question if command == "/retry" else typed
        asked: Message = {"role": "user", "content": question}
        try:
            with _typing_waits():
                answer = _answer(engine, console, [*system, *history, asked], replace(params, seed=params.seed + turn))
        except SlingshotError as error:
            way_out = "; /new forgets the conversation so far" if history else ""
            console.print(f"{error}{way_out}", style="red", markup=False, highlight=False)
        else:
            history = [] if origin.single_turns else [*history, asked, {"role": "assistant", "content": answer}]


def _answer(engine: Engine, console: Console, messages: list[Message], params: SamplingParams) -> str:
    """Stream one answer to the console and return it. Ctrl-C ends it where it is."""
    start, answer, last = time.perf_counter(), "", ""
    deltas = engine.stream(messages, params)
    try:
        while True:
            kind, text = next(deltas)
            if kind == "answer":
                if last == "reasoning":
                    console.print("\n")
                answer += text
            last = kind
            style = "dim" if kind == "reasoning" else None
            console.print(_printable(text), end="", style=style, markup=False, highlight=False, soft_wrap=True)
    except StopIteration as stop:
        completion = stop.value
        speed = len(completion.token_ids) / (time.perf_counter() - start)
        cut = ", cut at the length limit" if completion.finish_reason == "length" else ""
        note = f"{len(completion.token_ids)} tokens, {speed:.0f} tokens/s{cut}"
        answer = completion.answer
    except KeyboardInterrupt:
        note = "stopped"
    finally:
        deltas.close()
    console.print(f"\n{note}", style="dim", highlight=False)
    return answer


@contextlib.contextmanager
def _typing_waits() -> Iterator[None]:
    """What is typed meanwhile does not show within the answer; it waits for the next prompt."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _printable(text: str) -> str:
    """Text without control characters: a model must not be able to move the cursor or retitle the terminal."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")
