"""`slingshot bench CHECKPOINT`: how fast the engine generates here, and how near that is to what the machine can do.

rows = bench(engine, [1, 16, 64], prompt=32, new=64, rounds=3)
rows[0].tokens_per_second, rows[0].bytes_read / rows[0].step_seconds
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import plural, show_flops, show_seconds, show_share, show_size
from slingshot.cli.serve import KVCacheForm

if TYPE_CHECKING:
    from slingshot.engine.engine import Engine
    from slingshot.model.config import ModelConfig


WEIGHT_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class BenchRow:
    """Of `batch` requests at once, each a median.

    tokens_per_second   new tokens over the time from the question to the last of them, prompts included
    step_seconds        of a step in which every row decodes a token
    bytes_read          by such a step: weights (of experts those expected to be chosen) and cached entries
    flops               of such a step
    """

    batch: int
    tokens_per_second: float
    step_seconds: float
    bytes_read: float
    flops: float


def bench(
    engine: Engine, batches: Sequence[int], prompt: int, new: int, rounds: int, bits: int | None = None,
    kv_cache: str = "auto",
) -> list[BenchRow]:  # fmt: skip
    """Every batch size once a round, after one that does not count: a machine's moods strike all alike.

    bits, kv_cache: the engine's weight_bits and kv_cache.
    """
    from slingshot.cost.flops import decode_parts

    times: dict[int, list[tuple[float, float]]] = {batch: [] for batch in batches}
    for number in range(rounds + 1):
        for batch in batches:
            measured = _generate(engine, batch, prompt, new, seed=number)
            times[batch] += [measured] if number else []
    config, context, width = engine.config, prompt + new / 2, engine.dtype.itemsize
    rows = []
    for batch, measured_times in times.items():
        seconds, step = (statistics.median(each) for each in zip(*measured_times, strict=True))
        read, flops = bytes_read(config, batch, context, width, bits, kv_cache), decode_parts(config, context)
        rows.append(BenchRow(batch, batch * new / seconds, step, read, batch * sum(flops.values())))
    return rows


def first_token(engine: Engine, prompt: int, rounds: int) -> float:
    """Seconds from a prompt of this length to its first token: a median, after one that does not count."""
    times = [_generate(engine, 1, prompt, 1, seed=100 + number)[0] for number in range(rounds + 1)]
    return statistics.median(times[1:])


def bytes_read(
    config: ModelConfig, batch: int, context: float, width: int, bits: int | None = None, kv_cache: str = "auto"
) -> float:
    """Bytes of weights and of cached entries that a decode step reads, as plans count them; `width` bytes a number.

    With weights of `bits` bits all are counted so, the few that stay as they are too, and a scale for each group.
    With a `kv_cache` of 8 bits all of an entry is counted so.
    """
    from slingshot.cost.devices import DEVICES
    from slingshot.cost.flops import cache_bytes_per_token
    from slingshot.engine.native_runner import SCALE_BYTES, NativeRunner
    from slingshot.planning.memory import Precision
    from slingshot.planning.model_copy import ModelCopy

    each = width if bits is None else bits / 8 + SCALE_BYTES / NativeRunner.weight_group(config, bits)
    copy = ModelCopy(config, DEVICES["cpu"], Precision("", each, each, 0, 0, width, width))  # one copy, wherever it is
    cached = cache_bytes_per_token(config, width if kv_cache == "auto" else 1)
    return copy.bytes_read(batch, 0) + batch * context * cached


def _generate(engine: Engine, batch: int, prompt: int, new: int, seed: int) -> tuple[float, float]:
    """Seconds for `new` tokens to each of `batch` prompts that were never seen, and of a step once all decode."""
    import torch

    from slingshot.engine.sampling import SamplingParams

    generator = torch.Generator().manual_seed(seed * 1000 + batch)
    prompts = torch.randint(engine.tokenizer.vocab_size, (batch, prompt), generator=generator).tolist()
    params, before = SamplingParams(max_tokens=new, ignore_eos=True, seed=seed), engine.counters.decoded
    start = time.perf_counter()
    for ids in prompts:
        engine.add(ids, params)
    while engine.counters.decoded - before < batch:
        engine.step()
    begun, drawn = time.perf_counter(), engine.counters.decoded - before
    while engine.unfinished:
        engine.step()
    end = time.perf_counter()
    return end - start, (end - begun) / max(1.0, (batch * new - drawn) / batch)


def _load(
    source: str, dtype: str, most: int, length: int, bits: int | None, kv_cache: KVCacheForm
) -> tuple[Engine, str]:
    """The engine of a checkpoint, or of a preset's architecture with random weights; and what it is."""
    import torch

    from slingshot.checkpoint.load_save import open_weights
    from slingshot.cost.flops import parameters
    from slingshot.engine.engine import Engine
    from slingshot.machine.device import auto_device, describe_machine, named_dtype
    from slingshot.model.config import ModelConfig, presets
    from slingshot.model.transformer import Transformer
    from slingshot.text.tokenizer import Tokenizer

    stored = source not in presets() or Path(source).exists()
    config = open_weights(source).config if stored else ModelConfig.preset(source)
    if length > (longest := config.max_position_embeddings):
        way_out = "lower --prompt, --new or --first"
        raise SlingshotError(f"{source} takes {plural(longest, 'token')}, {length:,} were asked for; {way_out}")
    if stored:
        options: Any = {"max_batch": most, "max_length": length, "weight_bits": bits, "kv_cache": kv_cache}
        return Engine.load(source, dtype, **options), source
    device = auto_device()
    chosen = named_dtype(dtype, device)
    size, memory = parameters(config).total * chosen.itemsize, describe_machine(device).memory_bytes
    if memory and size > 0.8 * memory:
        raise SlingshotError(f"{source} has weights of {show_size(size)}, this machine {show_size(memory)} of memory")
    model = Transformer.empty(config, device, chosen).requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    tokenizer = Tokenizer.train(["What is 3+4-2?"], config.vocab_size)
    engine = Engine(model, tokenizer, most, length, weight_bits=bits, keep_model=False, kv_cache=kv_cache)
    return engine, f"{source} with random weights"


def show(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Or a preset's name, for random weights.")],
    batch: Annotated[str, typer.Option(help="Requests at once, one number or several.")] = "1,4,16,64",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 32,
    new: Annotated[int, typer.Option(min=2, help="Tokens of every completion.")] = 64,
    first: Annotated[int, typer.Option(min=1, help="Tokens of the prompt whose first token is waited for.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Of which the median is shown.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    weights: Annotated[
        str | None, typer.Option(help="int8 or int4: matrices rounded to nearest, for speed only.")
    ] = None,
    kv_cache: KVCacheForm = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Measure tokens per second, the time to the first token, and the share reached of what this machine can do."""
    from slingshot.machine.device import describe_machine, dtype_name, machine_peak, measure_bandwidth

    sizes = [int(size) for size in batch.split(",") if size.strip().isdecimal()]
    if len(sizes) != len(batch.split(",")) or not all(sizes):
        raise SlingshotError(f"--batch {batch}: give whole numbers from 1 on, with commas between them")
    if weights not in (None, *WEIGHT_BITS):
        raise SlingshotError(f"--weights {weights}: choose {' or '.join(WEIGHT_BITS)}")
    bits = WEIGHT_BITS[weights] if weights else None
    console = Console()
    with console.status("loading and measuring ..."):
        engine, what = _load(source, dtype, max(sizes), max(prompt + new, first + 1) + 1, bits, kv_cache)
        read = int(bytes_read(engine.config, sizes[0], prompt + new / 2, engine.dtype.itemsize, bits, kv_cache))
        before = measure_bandwidth(engine.device, 0.5, read)
        rows = bench(engine, sizes, prompt, new, rounds, bits, kv_cache)
        waited = first_token(engine, first, rounds)
        bandwidth = max(before, measure_bandwidth(engine.device, 0.5, read))  # neighbours only ever slow it down
        peak = machine_peak(engine.dtype, engine.device)
    machine, kind = describe_machine(engine.device), dtype_name(engine.dtype)
    if as_json:
        measured: dict[str, Any] = {"model": what, "dtype": kind, "weights": weights, "prompt": prompt, "new": new}
        measured |= {"rows": [asdict(row) for row in rows], "first_token": {"prompt": first, "seconds": waited}}
        measured |= {"runs_on": engine.runs_on, "bandwidth": bandwidth, "peak": peak, "machine": machine.model_dump()}
        print(json.dumps(measured, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("batch", "tokens/s", "a step", "decoding tokens/s", "of the bandwidth", "of the peak"):
        table.add_column(name, justify="right")
    for row in rows:
        shares = (row.bytes_read / row.step_seconds / bandwidth, row.flops / row.step_seconds / peak)
        speeds = f"{row.tokens_per_second:,.1f}", show_seconds(row.step_seconds), f"{row.batch / row.step_seconds:,.1f}"
        table.add_row(str(row.batch), *speeds, *map(show_share, shares))
    console.print(table)
    console.print(f"first token after {plural(first, 'token')}: {show_seconds(waited)}", highlight=False)
    where = machine.accelerator or f"{machine.cpu}, {plural(machine.threads or 1, 'thread')}"
    text = (
        f"{what} in {kind} by {engine.runs_on} on {where}: prompts of {prompt} and completions "
        f"of {new} tokens, medians of {rounds}. At batch {rows[0].batch} a step reads {show_size(read)}, "
        f"a sum over as many bytes reads {bandwidth / 1e9:,.1f} GB/s here, and the matrix peak is {show_flops(peak)}/s."
    )
    console.print(text, highlight=False, soft_wrap=True)
    if weights:
        console.print(f"Weights were rounded to nearest {weights}: this measures speed, not quality.", highlight=False)
    if (load := os.getloadavg()[0]) > machine.cores / 2 + (machine.threads or 1):
        console.print(f"The machine is busy (load {load:.1f}): its full speed shows when it is idle.", highlight=False)
