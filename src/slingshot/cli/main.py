"""The `slingshot` command: a recipe's run, one command per stage, and ways to talk to what came out.

    slingshot run tiny rl.optimizer.lr=1e-4 --until rl_final --out runs/tiny
    slingshot evaluate runs/tiny/rl task=countdown --out runs/check
    slingshot convert runs/tiny/rl_final tiny.gguf
    slingshot chat runs/tiny/rl_final

An error its user can mend is one line on standard error and exit code 2; Ctrl-C ends with 130. Imports that bring torch happen inside the commands.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from slingshot import __version__
from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_text
from slingshot.cli.plan import app as plan_app
from slingshot.recipe import recipe
from slingshot.recipe.results import headline
from slingshot.stages.kinds import STAGES

app = typer.Typer(
    help="Build, own and serve a DeepSeek-style reasoning model on the machine in front of you.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# OS errors that are the user's to mend: no space, no quota, no right to write.
_PLACE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

_SOURCE = "A checkpoint folder, a .gguf file, package:NAME, or a hub name (org/name[@revision])"

Checkpoint = Annotated[str, typer.Argument(help=f"{_SOURCE}.", show_default=False)]


def main() -> None:
    """Run the command line and exit with its code."""
    # Stages and the runner save on either signal; a shell that started this in the background had SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        code = app(standalone_mode=False) or 0
    except (SlingshotError, typer.TyperException) as error:
        code = _refuse(error.format_message() if isinstance(error, typer.TyperException) else str(error))
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        code = _refuse(f"{error.filename or 'writing'}: {error.strerror}; free space there or choose another --out")
    except KeyboardInterrupt:
        code = 130
    if code == 130 and sys.argv[1] in {"run", *STAGES} and os.environ.get("RANK", "0") == "0":
        print("slingshot: stopped and saved; the same command goes on from here", file=sys.stderr)
    sys.exit(code)


def _refuse(message: str) -> int:
    if message:
        print(f"slingshot: {' '.join(message.split())}", file=sys.stderr)
    return 2


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        print(f"slingshot {__version__}")
        raise typer.Exit


@app.command()
def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A shipped recipe (tiny, micro, smollm2 ...) or a .toml file.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Change any key of the recipe.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/RECIPE")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of every stage.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes per stage; more than one run under torchrun.")] = 1,
) -> None:
    """Run a recipe: every stage, its evaluation, and the report. Goes on where an earlier run stopped."""
    loaded = recipe.Recipe.load(source, overrides or [], seed)
    recipe.run(loaded, out or Path("runs") / loaded.name, until, nproc)


_ON_CHECKPOINTS = (
    "slingshot chat {out}, or slingshot evaluate {out} 'tasks=[{{name = \"arithmetic\"}}]' --out {out}-evaluation"
)
_NEXT = dict.fromkeys(STAGES, _ON_CHECKPOINTS) | {
    "sample": "slingshot sft MODEL 'data=[\"{out}\"]' --out {out}-sft",
    "evaluate": "read {out}/evaluation.json",
}


def _stage_command(kind: str) -> Callable[..., None]:
    def command(
        settings: Annotated[
            list[str] | None,
            typer.Argument(metavar="[MODEL] [KEY=VALUE]...", help="A checkpoint, and keys of the stage."),
        ] = None,
        config: Annotated[Path | None, typer.Option(help="A .json or .toml file with keys of the stage.")] = None,
        out: Annotated[Path | None, typer.Option(help="The folder the artifact becomes.", show_default=False)] = None,
        keys: Annotated[
            bool, typer.Option("--keys", help="Show the stage's keys and their defaults, and exit.")
        ] = False,
    ) -> None:
        stage = STAGES[kind]
        if keys:
            _show_keys(stage.config)
            return
        if out is None:
            raise SlingshotError(f"{kind}: no --out; name the folder the artifact shall become")
        values = _read_table(config) if config else {}
        for text in settings or []:
            recipe.apply_override(values, text if "=" in text else f"model={text}")
        stage.run(stage.config.parse(values, kind), out)
        if os.environ.get("RANK", "0") == "0":
            print(f"made {out}: {headline(out)}\nnext: {_NEXT[kind].format(out=out)}")

    command.__doc__ = f"One stage: {STAGES[kind].what}."
    return command


for _kind in STAGES:
    if _kind != "convert":
        app.command(_kind)(_stage_command(_kind))


app.add_typer(plan_app, name="plan")


@app.command("stage", hidden=True)
def _stage(kind: str, config: Annotated[Path, typer.Option()], out: Annotated[Path, typer.Option()]) -> None:
    """One stage of a recipe, as `run` starts it."""
    stage = STAGES[kind]
    stage.run(stage.config.parse(_read_table(config), kind), out)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help=_SOURCE, show_default=False)],
    destination: Annotated[Path, typer.Argument(help="The folder, or .gguf file, to make.", show_default=False)],
    to: Annotated[str | None, typer.Option(help="hf or gguf.", show_default="by the destination's name")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16, fp8 (hf only), q8_0 (gguf only).", show_default="as stored"),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes in one file of the folder, at most.")] = "5GB",
) -> None:
    """Write a checkpoint in another format or dtype: a Hugging Face folder, or a GGUF file for llama.cpp."""
    stage = STAGES["convert"]
    to = to or ("gguf" if destination.suffix == ".gguf" else "hf")
    if to not in ("hf", "gguf"):
        raise SlingshotError(f"--to {to}: the formats are hf (a Hugging Face folder) and gguf (a file for llama.cpp)")
    if (to == "gguf") != (destination.suffix == ".gguf"):
        raise SlingshotError(
            f"{destination}: --to {to} makes {'a file whose name ends in .gguf' if to == 'gguf' else 'a folder'}"
        )
    if to == "gguf":
        from slingshot.stages.convert import write_gguf_file

        for note in write_gguf_file(source, destination, dtype):
            print(f"note: {note}")
        print(
            f"made {destination}: {destination.stat().st_size / 1e6:,.1f} MB\nnext: llama-cli -m {destination}, or slingshot inspect {destination}"
        )
    else:
        if dtype == "q8_0":
            raise SlingshotError(
                "--dtype q8_0: a Hugging Face folder has no such type, a GGUF file has; give --to gguf, or another --dtype"
            )
        stage.run(
            stage.config.parse({"source": source, "dtype": dtype, "max_shard_size": max_shard_size}, "convert"),
            destination,
        )
        files = list(destination.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"made {destination}: {size / 1e6:,.1f} MB in {len(files)} safetensors file{'s'[: len(files) > 1]}")
        print(f"next: slingshot inspect {destination}, or slingshot chat {destination}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help=_SOURCE + ", or a preset such as deepseek-v3", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what a checkpoint holds, from its headers alone: architecture, sizes, tensors, tokenizer, template.

    Exit code 2 with problems.
    """
    import json

    from slingshot.checkpoint.inspection import examine
    from slingshot.cli.inspect import show

    facts = examine(source)
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        show(facts, Console())
    if facts["problems"]:
        raise typer.Exit(2)


def _read_table(path: Path) -> dict[str, Any]:
    if path.suffix != ".toml":
        values = read_json(path)
    else:
        try:
            values = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise SlingshotError(f"{path}: not valid TOML: {error}") from error
    if not isinstance(values, dict):
        raise SlingshotError(f"{path}: must hold a table of keys, got {type(values).__name__}")
    return values


def _show_keys(config: type[StageConfig]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{(config.__doc__ or '').strip()}\n"))
    for name, field in config.model_fields.items():
        kind = (
            getattr(field.annotation, "__name__", None)
            if not getattr(field.annotation, "__args__", None)
            else str(field.annotation)
        )
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        console.print(
            Text.assemble((f"{name:28}", "bold"), f"{default:24} ", (str(kind).replace("typing.", ""), "dim"))
        )


@app.command()
def chat(
    path: Checkpoint, temperature: float = 0.6, top_p: float = 0.95, max_tokens: int = 4096, seed: int = 0
) -> None:
    """Talk to a checkpoint in the terminal, its reasoning dimmed above the answer. Ctrl-C stops an answer, Ctrl-D leaves."""
    from slingshot.cli.chat import chat as talk
    from slingshot.engine.engine import Engine
    from slingshot.engine.sampling import SamplingParams

    talk(
        Engine.load(path),
        Console(),
        SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed),
    )


@app.command()
def generate(
    path: Checkpoint,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.", show_default=False)],
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 256,
    n: Annotated[int, typer.Option(help="Samples per prompt.")] = 1,
    seed: int = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without the chat template.")
    ] = False,
) -> None:
    """Print completions of prompts, one JSON object a line: prompt, reasoning, answer, finish_reason."""
    import json

    from slingshot.engine.engine import Engine
    from slingshot.engine.sampling import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, n=n, seed=seed)
    asked = prompts if raw else [[{"role": "user", "content": prompt}] for prompt in prompts]
    for prompt, output in zip(prompts, Engine.load(path).generate(asked, params), strict=True):
        for completion in output.outputs:
            row = {
                "prompt": prompt,
                "reasoning": completion.reasoning,
                "answer": completion.answer,
                "finish_reason": completion.finish_reason,
            }
            print(json.dumps(row, ensure_ascii=False))


@app.command()
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure longer, and forget what was measured before.")
    ] = False,
) -> None:
    """Show what this machine has, how fast it multiplies in which dtype, and what will be used."""
    from slingshot.cli.doctor import examine

    examine(Console(), calibrate=calibrate)


@app.command()
def receipt(
    path: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A checkpoint, dataset or evaluation.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what an artifact cost in all: its own receipt and those of everything it was made from."""
    from slingshot.cli.bill import show

    show(path, Console(), as_json)


@app.command()
def report(out: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]) -> None:
    """Build a run's report.json and report.html anew."""
    from slingshot.recipe.report import build

    build(out)
    print(out / "report.html")
