"""slingshot's own engine, for benchmarks/engine.py. See there for what is read and written."""

import json
import os
import sys
import time
from itertools import islice

answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

setup = json.loads(sys.stdin.readline())
os.environ["OMP_NUM_THREADS"] = str(setup["threads"])

import torch  # noqa: E402 (reads the environment on import)

import slingshot  # noqa: E402
from slingshot.engine.engine import Engine  # noqa: E402
from slingshot.engine.sampling import SamplingParams  # noqa: E402

torch.set_num_threads(setup["threads"])
engine = Engine.load(
    setup["model"], dtype="bfloat16", device="cpu", max_batch=setup["slots"], **setup.get("options", {})
)
print(json.dumps({"version": f"slingshot {slingshot.__version__}"}), file=answer, flush=True)


def closed_loop(prompts, clients, params):
    """As so many clients ask who send the next prompt when one is complete."""
    waiting, running, outputs = iter(prompts), [], []
    while True:
        running += [engine.submit(prompt, params) for prompt in islice(waiting, clients - len(running))]
        if not running:
            return outputs
        engine.advance()
        outputs += [its.result for its in running if its.result]
        running = [its for its in running if its.result is None]


for line in sys.stdin:
    request = json.loads(line)
    params = SamplingParams(max_tokens=request["new"], ignore_eos=True)
    start = time.perf_counter()
    if "clients" in request:
        outputs = closed_loop(request["prompts"], request["clients"], params)
    else:
        outputs = engine.generate(request["prompts"], params)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answer, flush=True)
