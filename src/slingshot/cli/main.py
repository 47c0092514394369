"""The `slingshot` command: a recipe's run, one command per stage, and ways to talk to what came out.

    slingshot run tiny rl.optimizer.lr=1e-4 --until rl_final --out runs/tiny
    slingshot evaluate runs/tiny/rl tasks=countdown --out runs/check
    slingshot convert runs/tiny/rl_final tiny.gguf
    slingshot chat runs/tiny/rl_final

An error its user can mend is one line on standard error and exit code 2; Ctrl-C ends with 130. Imports that bring
torch happen inside the commands.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from slingshot import __version__
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_text
from slingshot.base.quantity import plural
from slingshot.cli.accounts import keys_app, usage
from slingshot.cli.bench import show as bench
from slingshot.cli.commands import Commands
from slingshot.cli.generate import generate
from slingshot.cli.keys import show_keys, show_recipes, show_tasks
from slingshot.cli.plan import app as plan_app
from slingshot.cli.rollout_server import rollout_server
from slingshot.cli.serve import KVCacheForm, serve
from slingshot.recipe.origin import Origin, last_task
from slingshot.recipe.recipe import Recipe
from slingshot.recipe.results import headline
from slingshot.recipe.runner import run as run_recipe
from slingshot.recipe.tables import apply_override, inline_toml
from slingshot.stages.kinds import STAGES
from slingshot.tasks.loader import TaskConfig

_HELP = "Build, own and serve a DeepSeek-style reasoning model on the machine in front of you."
_PLAIN: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(cls=Commands, help=_HELP, **_PLAIN)

# OS errors that are the user's to mend: no space, no quota, no right to write, a broken disk, an endless name.
_PLACE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
}  # fmt: skip

_SOURCE = "A checkpoint folder, a .gguf file, package:NAME, or a hub name (org/name[@revision])"

# A path may hold "=" as well, but not before its first slash.
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")

Checkpoint = Annotated[str, typer.Argument(help=f"{_SOURCE}.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Keys = Annotated[list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Change any key of the recipe.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [KEY=VALUE]...", help="A model, and keys.")]


def main() -> None:
    """Run the command line and exit with its code."""
    # Stages and the runner save on either signal; a shell that started this in the background had SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    _mend_streams()
    try:
        code = app(standalone_mode=False, prog_name="slingshot") or 0
    except (SlingshotError, typer.TyperException) as error:
        code = _refuse(str(error) if isinstance(error, SlingshotError) else _usage(error))
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        code = _refuse(f"{error.filename or 'writing'}: {error.strerror}; free space there or choose another --out")
    except KeyboardInterrupt:
        code = 130
    if code == 130 and {"run", *STAGES} & {*sys.argv[1:2]} and os.environ.get("RANK", "0") == "0":
        print("slingshot: stopped and saved; the same command goes on from here", file=sys.stderr)
    sys.exit(code)


def _mend_streams() -> None:
    """Give a stream that its starter closed a place that takes everything and holds nothing, so that no file that is
    opened later lies in its place; and let text that a stream's encoding does not know be shown, escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _usage(error: typer.TyperException) -> str:
    """A slip in writing a command, and where its options stand."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; {context.command_path} --help has the rest" if message and context else message


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
    source: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped one (tiny, micro ...) or a .toml file.")],
    overrides: Keys = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/RECIPE")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of every stage.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes per stage; more than one run under torchrun.")] = 1,
) -> None:
    """Run a recipe: every stage, its evaluation, and the report. Goes on where an earlier run stopped. `slingshot plan
    recipe` tells beforehand how long it will take."""
    loaded = Recipe.load(source, overrides or [], seed)
    place = out or Path("runs") / loaded.name
    if not place.name:  # the root, the working folder, a variable of the shell that is empty
        raise SlingshotError(f"--out {out} is no folder of the run's own; choose another --out")
    run_recipe(loaded, place, until, nproc)


def _as_toml(task: TaskConfig) -> str:
    """A task as the command line takes it: its name where that says all."""
    table = {"name": task.name} | task.model_dump(include={"params", "tools"}, exclude_defaults=True)
    return f"[{inline_toml(table)}]" if len(table) > 1 else task.name


def _next(kind: str, out: Path) -> str:
    """What to do with an artifact that was just made."""
    place = shlex.quote(str(out))
    if kind == "evaluate":
        return f"read {out / 'evaluation.json'}"
    if kind == "sample":
        return f"slingshot sft MODEL data={place} --out {place}-sft"
    if kind == "tokenize":
        return f"slingshot pretrain model=PRESET shards={place} --out {place}-base"
    if kind == "quantize":
        return f"slingshot chat {place}, or read {out / 'quantization.json'}"
    made_for = last_task(out)
    task = shlex.quote(f"tasks={_as_toml(TaskConfig.parse(made_for, 'tasks'))}") if made_for else "tasks=TASK"
    return f"slingshot chat {place}, or slingshot evaluate {place} {task} --out {place}-evaluation"


ConfigFile = Annotated[Path | None, typer.Option(help="A .json or .toml file with keys of the stage.")]
Artifact = Annotated[Path | None, typer.Option(help="The folder the artifact becomes.", show_default=False)]
ShowKeys = Annotated[bool, typer.Option("--keys", help="Show every key of the stage, and exit.")]


def _run_stage(
    kind: str, settings: list[str], config: Path | None, out: Path | None, keys: bool, options: dict[str, Any]
) -> None:
    stage = STAGES[kind]
    if keys:
        show_keys(kind, stage.config, Console(highlight=False))
        return
    values = _read_table(config) if config else {}
    models = [text for text in settings if not _OVERRIDE.match(text) or Path(text).exists()]
    if len(models) > 1:
        raise SlingshotError(f"{kind}: two models, {models[0]} and {models[1]}; a key is set by KEY=VALUE")
    values |= ({"model": models[0]} if models else {}) | options
    for text in settings:
        if text not in models:
            apply_override(values, text)
    parsed = stage.config.parse(values, kind)
    if out is None:
        raise SlingshotError(f"{kind}: no --out; name the folder the artifact shall become")
    first = os.environ.get("RANK", "0") == "0"
    if first:
        source = f" (from {values['model']})" if isinstance(values.get("model"), str) else ""
        print(f"{kind}: {stage.what}{source} -> {out}", file=sys.stderr)
    stage.run(parsed, out)
    if first:
        print(f"made {out}: {headline(out)}\nnext: {_next(kind, out)}")


def _stage_command(kind: str) -> Callable[..., None]:
    def command(
        settings: Settings = None, config: ConfigFile = None, out: Artifact = None, keys: ShowKeys = False
    ) -> None:
        _run_stage(kind, settings or [], config, out, keys, {})

    command.__doc__ = f"One stage: {STAGES[kind].what}."
    return command


for _kind in STAGES:
    if _kind not in ("convert", "quantize"):
        app.command(_kind)(_stage_command(_kind))


@app.command()
def quantize(
    settings: Settings = None,
    to: Annotated[str | None, typer.Option(help="int8, int4, int8-dynamic, mxfp4, fp8.", show_default="int4")] = None,
    bits: Annotated[float | None, typer.Option(help="Of int4, on the average: 8 where 4 lose most.")] = None,
    group: Annotated[int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = None,
    calibrate: Annotated[int | None, typer.Option(help="Responses to fit to; 0 rounds to nearest.")] = None,
    distill: Annotated[int | None, typer.Option(help="Steps that move the scales until it says the same.")] = None,
    config: ConfigFile = None,
    out: Artifact = None,
    keys: ShowKeys = False,
) -> None:
    """One stage: weights of 8 or 4 bits, and what is lost by it."""
    options = {"to": to, "bits": bits, "group_size": group, "calibrate": calibrate, "distill": distill}
    told = {key: value for key, value in options.items() if value is not None}
    _run_stage("quantize", settings or [], config, out, keys, told)


app.add_typer(plan_app, name="plan")


@app.command("stage", hidden=True)
def _stage(kind: str, config: Annotated[Path, typer.Option()], out: Annotated[Path, typer.Option()]) -> None:
    """One stage of a recipe, as `run` starts it."""
    stage = STAGES[kind]
    stage.run(stage.config.parse(_read_table(config), kind), out)


_DTYPES = "float32, bfloat16, float16, fp8 (hf only), q8_0 (gguf only)."


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help=_SOURCE, show_default=False)],
    destination: Annotated[Path, typer.Argument(help="The folder, or .gguf file, to make.", show_default=False)],
    to: Annotated[str | None, typer.Option(help="hf or gguf.", show_default="by the destination's name")] = None,
    dtype: Annotated[str | None, typer.Option(help=_DTYPES, show_default="as stored")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes in one file of the folder, at most.")] = "5GB",
) -> None:
    """Write a checkpoint in another format or dtype: a Hugging Face folder, or a GGUF file for llama.cpp."""
    stage = STAGES["convert"]
    to = to or ("gguf" if destination.suffix == ".gguf" else "hf")
    if to not in ("hf", "gguf"):
        raise SlingshotError(f"--to {to}: the formats are hf (a Hugging Face folder) and gguf (a file for llama.cpp)")
    if (to == "gguf") != (destination.suffix == ".gguf"):
        made = "a file whose name ends in .gguf" if to == "gguf" else "a folder"
        raise SlingshotError(f"{destination}: --to {to} makes {made}")
    if to == "gguf":
        from slingshot.stages.convert import write_gguf_file

        for note in write_gguf_file(source, destination, dtype):
            print(f"note: {note}")
        print(f"made {destination}: {destination.stat().st_size / 1e6:,.1f} MB")
        print(f"next: llama-cli -m {destination}, or slingshot inspect {destination}")
    elif dtype == "q8_0":
        raise SlingshotError("--dtype q8_0: a Hugging Face folder has no such type; give --to gguf, or another --dtype")
    else:
        values = {"source": source, "dtype": dtype, "max_shard_size": max_shard_size}
        stage.run(stage.config.parse(values, "convert"), destination)
        files = list(destination.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"made {destination}: {size / 1e6:,.1f} MB in {plural(len(files), 'safetensors file')}")
        print(f"next: slingshot inspect {destination}, or slingshot chat {destination}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help=_SOURCE + ", or a preset such as deepseek-v3", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds, from its headers alone: architecture, tensors, tokenizer. Exit code 2: problems."""
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
    try:
        values = tomllib.loads(read_text(path)) if path.suffix == ".toml" else read_json(path)
    except tomllib.TOMLDecodeError as error:
        raise SlingshotError(f"{path}: not valid TOML: {error}") from error
    if not isinstance(values, dict):
        raise SlingshotError(f"{path}: must hold a table of keys, got {type(values).__name__}")
    return values


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="One of the list: arithmetic, gym:NAME, a .py file ...")] = None,
) -> None:
    """List the tasks there are, or the parameters of one, with a problem of it."""
    show_tasks(name, Console(highlight=False))


@app.command()
def recipes() -> None:
    """List the recipes that come along."""
    show_recipes(Console(highlight=False))


_CONVERSATION = "Tell the model what was said before."
_TOOLS = "What it may call, with commas: calculator, python, search:FOLDER, mcp:COMMAND, file.py:NAME"


@app.command()
def chat(
    path: Checkpoint,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 4096,
    seed: int = 0,
    conversation: Annotated[bool | None, typer.Option(help=_CONVERSATION, show_default="by its training")] = None,
    tools: Annotated[str, typer.Option(help=_TOOLS, show_default="none")] = "",
    kv_cache: KVCacheForm = "auto",
) -> None:
    """Talk to a checkpoint in the terminal, its reasoning dimmed above the answer. Ctrl-C stops an answer, Ctrl-D
    leaves."""
    from slingshot.cli import chat as door
    from slingshot.cli.tool_chat import ChatTools
    from slingshot.engine.engine import Engine
    from slingshot.engine.sampling import SamplingParams

    origin = Origin.of(Path(path))
    if conversation is not None:
        origin = replace(origin, single_turns=not conversation)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    engine = Engine.load(path, kv_cache=kv_cache)
    called = ChatTools.open(tools, engine.tokenizer) if tools else None
    door.chat(engine, Console(), params, origin, called)


app.command()(generate)
app.command()(serve)
app.command("rollout-server")(rollout_server)
app.command()(usage)
app.add_typer(keys_app, name="keys")
app.command("bench")(bench)


@app.command()
def doctor(calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure longer, and anew.")] = False) -> None:
    """Show what this machine has, how fast it multiplies in which dtype, and what will be used."""
    from slingshot.cli.doctor import examine

    examine(Console(), calibrate=calibrate)


@app.command()
def receipt(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A checkpoint, dataset or evaluation.")],
    as_json: AsJson = False,
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
