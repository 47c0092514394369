"""llama.cpp's server on a CPU, for benchmarks/engine.py. See there for what is read and written."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

# llama.cpp logs on standard output too: the answer gets that descriptor, everything else goes to standard error.
answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

import xllamacpp  # noqa: E402 (after the descriptors are in order)

setup = json.loads(sys.stdin.readline())
slots = setup["slots"]
params = xllamacpp.CommonParams()
params.model.path = setup["model"]
params.n_ctx = setup["context"] * slots
params.n_parallel = slots
params.cache_ram_mib = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup["threads"]
server = xllamacpp.Server(params)
print(json.dumps({"version": f"llama.cpp (xllamacpp {xllamacpp.__version__})"}), file=answer, flush=True)


def complete(prompt, new):
    reply = server.handle_completions(
        {"prompt": prompt, "max_tokens": new, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        | {"ignore_eos": True, "cache_prompt": False}
    )
    return reply["usage"]["completion_tokens"]


with ThreadPoolExecutor(slots) as pool:
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        tokens = sum(pool.map(lambda ids: complete(ids, request["new"]), request["prompts"]))  # noqa: B023
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answer, flush=True)
