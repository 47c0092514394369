"""`slingshot generate CHECKPOINT`: completions of many prompts, in order, on standard output or in a file.

    slingshot generate runs/tiny/rl_final --prompts prompts.jsonl --out completions.jsonl -n 8

A line of the file is one completion, written as soon as all before it are there. A run that was killed goes on behind
the last whole line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from slingshot.base.errors import SlingshotError
from slingshot.base.files import digest, jsonl_rows, os_errors, parse_json, read_text
from slingshot.base.names import closest
from slingshot.base.progress import Progress
from slingshot.base.quantity import plural, show_count
from slingshot.cost.receipt import artifact_digest

if TYPE_CHECKING:
    from slingshot.engine.engine import Engine
    from slingshot.engine.sampling import SamplingParams
    from slingshot.engine.sequence import Completion, RequestOutput

_IN_FLIGHT = 512  # samples running or queued: all that a kill can lose, but for what waits for a longer one before it

_FORM = 'a row is an object with "prompt" (text, or a chat) or "messages"; "id" and sampling parameters may stand there'


@dataclass(frozen=True)
class PromptRow:
    """One prompt: a text or a chat, where it stands, how it is sampled, and its id where it has one."""

    where: str
    prompt: str | list[dict[str, Any]]
    params: SamplingParams
    id: Any = None

    @classmethod
    def read(cls, row: Any, where: str, given: Mapping[str, Any]) -> PromptRow:
        """A row of JSONL, whose own sampling parameters win over those `given`. Other columns do not matter."""
        from slingshot.engine.sampling import SamplingParams

        prompts = [row[key] for key in ("prompt", "messages") if key in row] if isinstance(row, dict) else []
        prompt = prompts[0] if len(prompts) == 1 else None
        chat = isinstance(prompt, list) and all(isinstance(part, dict) and "role" in part for part in prompt)
        if not prompt or not (chat or (isinstance(prompt, str) and "prompt" in row)):
            raise SlingshotError(f"{where}: {_FORM}")
        names = [field.name for field in fields(SamplingParams)]
        for key in row.keys() - {"prompt", "messages", "id", *names}:
            if meant := closest(key, names, cutoff=0.8):
                raise SlingshotError(f"{where}: {key!r} is no sampling parameter; did you mean {meant}?")
        try:
            params = SamplingParams(**{**given, **{name: row[name] for name in names if name in row}})
        except SlingshotError as error:
            raise SlingshotError(f"{where}: {error}") from error
        return cls(where, prompt, params, row.get("id"))

    def lines(self, output: RequestOutput, settings: str | None) -> Iterator[str]:
        """One line of JSON a completion, in the forms that `slingshot sft` reads: a chat goes on with the reply."""
        for sample, completion in enumerate(output.outputs):
            row: dict[str, Any] = {} if self.id is None else {"id": self.id}
            if isinstance(self.prompt, str):
                row |= {"prompt": self.prompt, "reasoning": completion.reasoning, "answer": completion.answer}
            else:
                thought = {} if completion.reasoning is None else {"reasoning_content": completion.reasoning}
                row["messages"] = [*self.prompt, {"role": "assistant", **thought, "content": completion.answer}]
            row |= {"sample": sample, "finish_reason": completion.finish_reason, "tokens": len(completion.token_ids)}
            row |= self._told(output, completion)
            yield json.dumps(row | ({"settings": settings} if settings else {}), ensure_ascii=False) + "\n"

    def _told(self, output: RequestOutput, completion: Completion) -> dict[str, Any]:
        """What else it asked for, and why it could not go on."""
        told: dict[str, Any] = {}
        if completion.top_logprobs is not None:
            names = ("token_ids", "logprobs", "top_logprobs")
            told |= {name: getattr(completion, name) for name in names}
        if output.prompt_logprobs is not None:
            told |= {"prompt_token_ids": output.prompt_token_ids, "prompt_logprobs": output.prompt_logprobs}
            told |= {"prompt_top_logprobs": output.prompt_top_logprobs} if output.prompt_top_logprobs else {}
        if completion.routed_experts is not None:
            told["routed_experts"] = completion.routed_experts.tolist()
        return told | ({"error": str(output.error)} if completion.finish_reason == "error" else {})

    def answered_by(self, row: Any, settings: str) -> str:
        """Empty where `row` is a completion of this prompt made with these settings, else what differs."""
        chat = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(row, dict) or (chat[:-1] if isinstance(chat, list) else row.get("prompt")) != self.prompt:
            return "answers another prompt"
        return "" if row.get("settings") == settings else "was made with another checkpoint or other sampling"


def read_prompts(path: Path, given: Mapping[str, Any]) -> list[PromptRow]:
    """The prompts of a file: rows of .jsonl, else the lines of a text. SlingshotError names file and line."""
    lines = read_text(path).split("\n")
    if path.suffix == ".jsonl":
        return [PromptRow.read(row, where, given) for where, row in jsonl_rows(path, lines)]
    texts = ((f"{path} line {number}", line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip())
    return [PromptRow.read({"prompt": text}, where, given) for where, text in texts]


def complete(engine: Engine, rows: Sequence[PromptRow], raw: bool) -> Iterator[RequestOutput]:
    """Every row's completions, in order; `raw` continues a text without the chat template.

    A row that cannot be asked is an error that names it, before anything runs.
    """

    def add(row: PromptRow) -> int:
        alone = isinstance(row.prompt, str) and not raw
        try:
            prompt = [{"role": "user", "content": row.prompt}] if alone else row.prompt
            return engine.add(prompt, row.params)  # type: ignore[arg-type]
        except SlingshotError as error:
            raise SlingshotError(f"{row.where}: {error}") from error

    for row in rows:
        engine.abort(add(row))
    running: dict[int, int] = {}  # request -> row
    done: dict[int, RequestOutput] = {}
    asked, told = 0, 0
    try:
        while told < len(rows):
            while asked < len(rows) and sum(rows[at].params.n for at in running.values()) < _IN_FLIGHT:
                running[add(rows[asked])] = asked
                asked += 1
            for output in engine.step():
                done[running.pop(output.request_id)] = output
            while told in done:
                yield done.pop(told)
                told += 1
    finally:
        for request_id in running:
            engine.abort(request_id)


@contextlib.contextmanager
def _continued(out: Path, rows: Sequence[PromptRow], settings: Sequence[str]) -> Iterator[tuple[IO[str], int]]:
    """The file to append to, locked, and how many completions it holds; a torn last line is cut off.

    SlingshotError where it holds anything but the first completions of these rows.
    """
    if out.exists() and not out.is_file():  # /dev/full has no end, /dev/null keeps nothing
        raise SlingshotError(f"{out} is no plain file; choose another --out")
    with os_errors(f"cannot write {out}", "; choose another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("a+", encoding="utf-8", errors="backslashreplace", newline="\n")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SlingshotError(f"another slingshot is writing {out}; wait for it or choose another --out") from error
        read_text(out)  # whether it is text at all
        content = out.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        wanted = ((row, its) for row, its in zip(rows, settings, strict=True) for _ in range(row.params.n))
        lines = whole.decode().split("\n")[:-1]  # JSON may hold other line breaks
        for number, line in enumerate(lines, start=1):
            row, its = next(wanted, (None, ""))
            wrong = row.answered_by(parse_json(line, f"{out} line {number}"), its) if row else "answers no prompt"
            if wrong:
                raise SlingshotError(f"{out} line {number} {wrong}; remove the file or choose another --out")
        file.truncate(len(whole))
        yield file, len(lines)


def generate(
    path: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder, a .gguf file or a hub name.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="To answer; - reads lines from standard input.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", "--file", help="One a line; .jsonl: under prompt or messages.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The .jsonl file to make, or to go on with.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Samples per prompt.")] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Continue a text, without the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Of a completion, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.6,  # and top-p: R1's
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Keep as many of the likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the noise; the same seed gives the same tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="End with this token; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    min_p: Annotated[float, typer.Option(help="Keep tokens so probable as this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides logits of tokens seen; 1: none.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Off the logits of tokens sampled.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Off them for each time.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit; -inf forbids it.")
    ] = None,
    bad_word: Annotated[list[str] | None, typer.Option(help="Never say this; may be repeated.")] = None,
    thinking_budget: Annotated[int | None, typer.Option(help="Tokens of reasoning, at most.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="The answer is such JSON: a schema, or its file.")] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches this.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="The answer is one of these; repeat it.")] = None,
    grammar: Annotated[str | None, typer.Option(help="The answer is of this EBNF, or its file's.")] = None,
    top_logprobs: Annotated[int, typer.Option(help="Tell logprobs, and of so many likeliest tokens.")] = 0,
    prompt_logprobs: Annotated[int | None, typer.Option(help="The same of the prompt; 0: its own alone.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16: of weights and activations.")] = "auto",
) -> None:
    """Complete prompts, in order: a line of JSON each, on standard output or in a file a killed run goes on with."""
    from slingshot.engine.engine import Engine

    given = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "n": n, "seed": seed,
        "stop": tuple(stop or ()), "stop_token_ids": tuple(stop_token_id or ()), "ignore_eos": ignore_eos,
        "min_p": min_p, "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "logit_bias": [text.split("=", 1) for text in logit_bias or ()],
        "bad_words": bad_word, "thinking_budget": thinking_budget, "json_schema": _text_or_file(json_schema),
        "regex": regex, "choice": choice, "grammar": _text_or_file(grammar), "top_logprobs": top_logprobs,
        "prompt_logprobs": prompt_logprobs,
    }  # fmt: skip
    texts = [line for text in texts or [] for line in (_standard_input() if text == "-" else [text])]
    rows = [
        PromptRow.read({"prompt": _utf8(text, "the prompt")}, "the prompt", given) for text in texts if text.strip()
    ]
    rows += read_prompts(prompts, given) if prompts else []
    if not rows:
        raise SlingshotError("no prompts; give them as arguments, by --prompts, or - with text on standard input")
    if out is None:
        failed = 0
        for row, output in zip(rows, complete(Engine.load(path, dtype), rows, raw), strict=True):
            sys.stdout.writelines(row.lines(output, None))
            sys.stdout.flush()
            failed += output.error is not None
        return _tell_failed(failed)
    model = artifact_digest(Path(path)) if Path(path).exists() else path  # wherever it lies
    settings = [digest({"checkpoint": model, "dtype": dtype, "raw": raw, **asdict(row.params)}) for row in rows]
    with _continued(out, rows, settings) as (file, kept):
        made, spent, failed = _write(lambda: Engine.load(path, dtype), rows, settings, file, kept, raw)
    _tell_failed(failed)
    speed = f", {show_count(made)} tokens now at {made / spent:,.0f} tokens/s" if made else ""
    total = sum(row.params.n for row in rows)
    print(f"made {out}: {plural(total, 'completion')} of {plural(len(rows), 'prompt')}{speed}")
    print(f"next: slingshot sft MODEL data={out} --out {out.with_suffix('')}-sft")


def _tell_failed(count: int) -> None:
    if count:
        why = "`error` in the row says why"
        print(f"slingshot: {plural(count, 'prompt')} could not be answered; {why}", file=sys.stderr)


def _standard_input() -> list[str]:
    """The lines of standard input, split as those of a file."""
    try:
        text = _utf8(sys.stdin.read(), "standard input").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SlingshotError(f"standard input is not UTF-8 text: {error.reason}") from error
    return [line.rstrip("\r") for line in text.split("\n")]


def _utf8(text: str, where: str) -> str:
    """The text; SlingshotError where Python had to stand in for bytes that are not UTF-8."""
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise SlingshotError(f"{where} is not UTF-8 text; convert it, or give it as an escape in a row of .jsonl")
    return text


def _text_or_file(value: str | None) -> str | None:
    """What a file holds, where the value names one."""
    if value and "\n" not in value and len(value) < 256 and Path(value).is_file():
        return read_text(Path(value))
    return value


def _write(
    load: Callable[[], Engine], rows: Sequence[PromptRow], settings: Sequence[str], file: IO[str], kept: int, raw: bool
) -> tuple[int, float, int]:
    """Write what is missing behind the `kept` completions; -> tokens sampled, seconds taken, prompts that failed."""
    first = 0
    while first < len(rows) and kept >= rows[first].params.n:  # whole prompts; of the next one samples may be there
        kept -= rows[first].params.n
        first += 1
    if first == len(rows):
        return 0, 0.0, 0
    engine, tokens, failed, start = load(), 0, 0, time.monotonic()
    try:
        with Progress("generate", len(rows), done=first) as progress:
            for at, output in enumerate(complete(engine, rows[first:], raw), start=first):
                file.writelines(list(rows[at].lines(output, settings[at]))[kept:])
                file.flush()
                kept = 0
                tokens += sum(len(completion.token_ids) for completion in output.outputs)
                failed += output.error is not None
                progress.update(at + 1, **{"tokens/s": tokens / (time.monotonic() - start)})
    except SlingshotError as error:
        raise SlingshotError(f"{error}; what was done before is kept: the same command goes on behind it") from error
    except KeyboardInterrupt:
        print(f"slingshot: {file.name} keeps what is done; the same command goes on from there", file=sys.stderr)
        raise
    return tokens, time.monotonic() - start, failed
