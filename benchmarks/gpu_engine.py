"""How fast does the engine generate on a GPU, beside transformers' generate? In turns, in one process, on one device.

    .venv/bin/python benchmarks/gpu_engine.py [CHECKPOINT ...] [--rounds 5] [--batches 1 64 256]

Without checkpoints: random weights of SmolLM2-135M's shape and of a DeepSeek-V3 of 239M parameters, in bfloat16; three
to five minutes. Everyone completes the same random prompts of 32 tokens by 64 tokens, whatever they are. Printed and
kept in benchmarks/gpu_engine.json: new tokens over the time from the question to the last of them, the prompt's
included, median, lowest and highest round; how much of the device's read bandwidth that is where one sequence decodes
(bytes of the weights that a token needs, and of its cache, over the time of a token); what the first question took, in
which graphs are recorded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from engine import random_checkpoint

from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cli.bench import bytes_read
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.machine.device import describe_machine, measure_bandwidth

REPO = Path(__file__).resolve().parent.parent
PROMPT, NEW = 32, 64
Contenders = dict[str, Callable[[torch.Tensor], int]]  # prompts [batch, PROMPT] -> how many tokens were made


def contenders(folder: Path, most: int) -> tuple[Contenders, Engine]:
    """Who takes part, and the engine of the first."""
    model, tokenizer = load_model(folder, dtype=torch.bfloat16, device=torch.device("cuda")), load_tokenizer(folder)
    length = PROMPT + NEW + 1
    engines = [Engine(model, tokenizer, most, length), Engine(model, tokenizer, most, length, native="off")]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda").eval()

    def ours(engine: Engine, prompts: torch.Tensor) -> int:
        outputs = engine.generate(prompts.tolist(), SamplingParams(max_tokens=NEW, ignore_eos=True))
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    @torch.inference_mode()
    def generate(prompts: torch.Tensor) -> int:
        ids = prompts.to("cuda")
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
        lengths = {"min_new_tokens": NEW, "max_new_tokens": NEW}
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **sampling, **lengths)
        return made[:, PROMPT:].numel()

    return {
        "slingshot": lambda prompts: ours(engines[0], prompts),
        "slingshot, no graphs": lambda prompts: ours(engines[1], prompts),
        "transformers": generate,
    }, engines[0]


def measure(folder: Path, batches: list[int], rounds: int) -> dict[str, Any]:
    """Tokens per second of everyone in every round, for each batch."""
    field, engine = contenders(folder, max(batches))
    config, bandwidth = engine.model.config, []
    rates: dict[str, dict[str, list[float]]] = {str(batch): {name: [] for name in field} for batch in batches}
    first: dict[str, dict[str, float]] = {str(batch): {} for batch in batches}
    for number in range(rounds + 1):  # the first one warms up
        bandwidth.append(measure_bandwidth(torch.device("cuda")))
        for batch in batches:
            generator = torch.Generator().manual_seed(1000 * batch + number)
            prompts = torch.randint(3, config.vocab_size, (batch, PROMPT), generator=generator)
            for name, run in field.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                made = run(prompts)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                if made != batch * NEW:
                    sys.exit(f"{name} made {made} tokens for {batch} prompts, not {batch * NEW}")
                if number:
                    rates[str(batch)][name].append(made / seconds)
                else:
                    first[str(batch)][name] = seconds
    read, needed = statistics.median(bandwidth), bytes_read(config, 1, PROMPT + NEW / 2, 2)
    share = {name: statistics.median(found) * needed / read for name, found in rates.get("1", {}).items()}
    return {"runs_on": engine.runs_on, "rates": rates, "first": first, "bandwidth": read, "share": share}


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}, by {found['runs_on']}; read {found['bandwidth'] / 1e9:,.0f} GB/s")
    for batch, rates in found["rates"].items():
        print(f"  batch {batch}, {PROMPT} + {NEW}")
        base = statistics.median(rates["slingshot"])
        for contender, values in rates.items():
            middle = statistics.median(values)
            spread = f"{middle:12,.1f} ({min(values):,.1f} to {max(values):,.1f})"
            share = f", {found['share'][contender]:.1%} of the bandwidth" if batch == "1" else ""
            once = f"; at first {found['first'][batch][contender]:.1f} s"
            print(f"    {contender:22} {spread:40} [{middle / base:.3f}]{share}{once}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "gpu_engine.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_engine.py measures a CUDA device, and torch finds none here")
    transformers.logging.set_verbosity_error()
    machine = describe_machine("cuda")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "machine": machine.model_dump(), "shapes": {}}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__, "rounds": arguments.rounds}
    print(f"{result['device']}, torch {torch.__version__}, transformers {transformers.__version__}; tokens/s: median")
    print(f"(lowest to highest) of {arguments.rounds} rounds in turns [of slingshot's]")
    with tempfile.TemporaryDirectory() as made:
        for source in arguments.checkpoints or ["smollm2-135m", "deepseek-v3-239m"]:
            folder = source if isinstance(source, Path) else random_checkpoint(source, Path(made) / source)
            name = str(source) if isinstance(source, Path) else f"{source}, random weights"
            result["shapes"][name] = measure(folder, arguments.batches, arguments.rounds)
            show(name, result["shapes"][name])
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
