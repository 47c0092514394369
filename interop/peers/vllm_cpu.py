"""vLLM on a CPU, for interop/test_vllm.py: loads a checkpoint folder as its users do and says what it predicts.

Reads {"model", "dtype", "prompts": [[id, ...], ...], "texts": [str, ...], "chats": [[message, ...], ...], "max_tokens"}
and writes {"version", "forced", "texts", "chats", "drafts"}: the predictions along each prompt, the ids of each text,
and of each chat the prompt's ids and the greedy continuation's, with its predictions. Optional: "attention", the
backend's name; "mtp": true, to draft every second token with the MTP module, and "drafts" is then [how many, how many
of them accepted]."""

import json
import os
import sys

# vLLM logs on standard output too: the answer gets that descriptor, everything else goes to standard error.
answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with its parent
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on whatever cores it is given
    "VLLM_CPU_INT4_W4A8": "0",  # where there is AMX it would round activations to 8 bits, a scale for each token
    "TORCHDYNAMO_DISABLE": "1",  # the sampler would be compiled for 10 seconds; it needs a C++ compiler
    "VLLM_NO_USAGE_STATS": "1",  # no outgoing connection
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams, __version__  # noqa: E402 (reads the environment on import)


def forced(ids, candidates):
    """Per position the token's logprob, the likeliest token, and by how much that is above the second:
    interop/compare.py's Forced."""
    best = [sorted(entry.items(), key=lambda item: -item[1].logprob)[:2] for entry in candidates]
    return {
        "logprobs": [entry[id].logprob for id, entry in zip(ids, candidates, strict=True)],
        "greedy": [first[0] for first, _ in best],
        "gaps": [first[1].logprob - second[1].logprob for first, second in best],
    }


def main():
    request = json.load(sys.stdin)
    llm = LLM(
        request["model"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=256,
        enable_prefix_caching=False,  # a prompt's cached part gets no prompt_logprobs
        attention_config={"backend": request["attention"]} if "attention" in request else None,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1} if request.get("mtp") else None,
        disable_log_stats=False,  # drafts are counted there
    )
    tokenizer = llm.get_tokenizer()
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2))
    chats = llm.chat(request["chats"], SamplingParams(max_tokens=request["max_tokens"], temperature=0, logprobs=2))
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    reply = {
        "version": __version__,
        "forced": [forced(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs],
        "texts": [tokenizer.encode(text, add_special_tokens=False) for text in request["texts"]],
        "chats": [
            {"prompt": chat.prompt_token_ids, "ids": list(chat.outputs[0].token_ids)}
            | {"forced": forced(chat.outputs[0].token_ids, chat.outputs[0].logprobs)}
            for chat in chats
        ],
        "drafts": [counters.get(f"vllm:spec_decode_num_{name}") for name in ("draft_tokens", "accepted_tokens")],
    }
    json.dump(reply, answer)


main()
answer.close()
