"""`slingshot chat PATH`: talk with a checkpoint in the terminal, its reasoning dimmed above the answer.

    chat(Engine.load("runs/tiny/rl_final"), Console())

Ctrl-C stops an answer, Ctrl-D leaves.
"""

from __future__ import annotations

import time
import unicodedata
from dataclasses import replace

from rich.console import Console

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine, Message
from slingshot.engine.sampling import SamplingParams

DEFAULT_PARAMS = SamplingParams(max_tokens=4096, temperature=0.6, top_p=0.95)  # R1's recommended temperature and top-p


def chat(engine: Engine, console: Console, params: SamplingParams = DEFAULT_PARAMS) -> None:
    """Read questions from the console and stream the answers, remembering the conversation, until end of input."""
    console.print("Ctrl-C stops an answer, Ctrl-D leaves.", style="dim")
    messages: list[Message] = []
    for turn in range(2**31):  # a seed of its own for each turn: the same question may get another answer
        try:
            question = console.input("\n[bold]> [/bold]").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            console.print()
            return
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _answer(engine, console, messages, replace(params, seed=params.seed + turn))
        except SlingshotError as error:
            forgotten = "\nThe conversation so far is forgotten; ask again." if len(messages) > 1 else ""
            console.print(f"{error}{forgotten}", style="red", markup=False, highlight=False)
            messages.clear()
        else:
            messages.append({"role": "assistant", "content": answer})


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
            console.print(
                _printable(text),
                end="",
                style="dim" if kind == "reasoning" else None,
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
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


def _printable(text: str) -> str:
    """Text without control characters: a model must not be able to move the cursor or retitle the terminal."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")
