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
from slingshot.cli.tool_chat import ChatTools
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
    engine: Engine,
    console: Console,
    params: SamplingParams = DEFAULT_PARAMS,
    origin: Origin | None = None,
    tools: ChatTools | None = None,
) -> None:
    """Read questions from the console and stream the answers until end of input.

    A model of single turns (`origin`) is asked one question at a time; any other is told the conversation so far.
    With `tools` it may call them before it answers.
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
            its = replace(params, seed=params.seed + turn)
            with _typing_waits():
                if tools is None:
                    answer = _answer(engine, console, [*system, *history, asked], its)
                else:
                    answer = _answer_with(tools, engine, console, [*system, *history, asked], its)
        except SlingshotError as error:
            way_out = "; /new forgets the conversation so far" if history else ""
            console.print(f"{error}{way_out}", style="red", markup=False, highlight=False)
        else:
            history = [] if origin.single_turns else [*history, asked, {"role": "assistant", "content": answer}]


def _answer_with(
    tools: ChatTools, engine: Engine, console: Console, messages: list[Message], params: SamplingParams
) -> str:
    """Answers until one calls nothing, the calls and what they brought between them; the last of them is returned."""
    ids, answer = tools.prompt(messages), ""
    for _ in range(tools.max_turns):
        said: list[int] = []
        answer = _answer(engine, console, ids, params, said, tools.form.begin)
        if not (calls := tools.calls(ids, said)):
            break
        observations = []
        for call in calls:
            observations.append(tools.ask(call))
            shown = f"{call.name}({call.arguments})\n-> {observations[-1]}"
            console.print(_printable(shown), style="cyan", markup=False, highlight=False, soft_wrap=True)
        ids = tools.after([*ids, *said], calls, observations)
    return answer


def _answer(
    engine: Engine,
    console: Console,
    prompt: list[Message] | list[int],
    params: SamplingParams,
    said: list[int] | None = None,
    call: str = "",
) -> str:
    """Stream one answer to the console and return it, its ids in `said`. Ctrl-C ends it where it is.

    call: with what a call of a tool begins, which is not shown as the model spells it.
    """
    start, answer, last, calls = time.perf_counter(), "", "", False
    deltas = engine.stream(prompt, params)
    try:
        while True:
            kind, text = next(deltas)
            if kind == "answer":
                if last == "reasoning":
                    console.print("\n")
                answer += text
            last = kind
            if call:
                text, calls = "" if calls else text.partition(call)[0], calls or call in text
            style = "dim" if kind == "reasoning" else None
            console.print(_printable(text), end="", style=style, markup=False, highlight=False, soft_wrap=True)
    except StopIteration as stop:
        completion = stop.value
        speed = len(completion.token_ids) / (time.perf_counter() - start)
        cut = ", cut at the length limit" if completion.finish_reason == "length" else ""
        note = f"{len(completion.token_ids)} tokens, {speed:.0f} tokens/s{cut}"
        answer = completion.answer
        if said is not None and completion.finish_reason == "stop":
            said += completion.token_ids
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
