"""llama.cpp on a CPU, for interop/test_llama_cpp.py: its server loads a .gguf file and says what it predicts.

Reads {"model", "prompts": [[id, ...], ...], "texts": [str, ...], "chats": [[message, ...], ...], "max_tokens", "draft":
bool} and writes {"version", "forced", "texts", "chats"}: the predictions along each prompt, the ids of each text, and
of each chat the prompt's ids and the greedy continuation's, with its predictions, or with "draft" how many of its
tokens the MTP module drafted and how many drafts were right. Runs in an environment of its own, where slingshot is not
installed."""

import json
import os
import sys
import urllib.request

# llama.cpp logs on standard output too: the answer gets that descriptor, everything else goes to standard error.
answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

import xllamacpp  # noqa: E402 (after the descriptors are in order)

FORCE = 1e4  # a bias on the one token that is to be sampled; reported logprobs are those without it


def start(model, draft):
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # by default keys and values are kept in float16
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if draft:
        params.load_mtp = True
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.n_max = 1
        params.speculative.draft.p_min = 0.0
    return xllamacpp.Server(params)


def post(server, path, body):
    """What only its HTTP side offers, on the loopback address it listens on."""
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
        return json.load(reply)


def complete(server, prompt, **options):
    reply = server.handle_completions(
        {"prompt": prompt, "temperature": 0, "n_probs": 2, "cache_prompt": True, **options}
    )
    if "choices" not in reply:
        raise SystemExit(f"llama.cpp: {reply}")
    logprobs = reply["choices"][0]["logprobs"]
    return logprobs["content"] if logprobs else [], reply["timings"]


def forced(entries):
    """Per position the token's logprob, the likeliest token, and by how much that is above the second:
    interop/compare.py's Forced."""
    best = [entry["top_logprobs"][:2] for entry in entries]
    return {
        "logprobs": [entry["logprob"] for entry in entries],
        "greedy": [first["id"] for first, _ in best],
        "gaps": [first["logprob"] - second["logprob"] for first, second in best],
    }


def prediction(server, ids, n):
    """What it says of token n after those before."""
    entries, _ = complete(server, ids[:n], max_tokens=1, logit_bias=[[ids[n], FORCE]])
    if entries:
        assert entries[0]["id"] == ids[n]
        return entries[0]
    # a token that ends a generation is not reported: let another one be sampled, and find this one among all candidates
    for other in ids:
        entries, _ = complete(server, ids[:n], max_tokens=1, logit_bias=[[other, FORCE]], n_probs=2**20)
        if entries:
            break
    return entries[0] | next(candidate for candidate in entries[0]["top_logprobs"] if candidate["id"] == ids[n])


def chat(server, messages, max_tokens, draft):
    text = post(server, "/apply-template", {"messages": messages})["prompt"]
    prompt = post(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
    entries, timings = complete(server, prompt, max_tokens=max_tokens)
    reply = {"prompt": prompt, "ids": [entry["id"] for entry in entries]}
    if draft:  # of drafted tokens it says no alternatives
        return reply | {"drafted": timings["draft_n"], "accepted": timings["draft_n_accepted"]}
    return reply | {"forced": forced(entries)}


def main():
    request = json.load(sys.stdin)
    server = start(request["model"], request["draft"])
    reply = {
        "version": xllamacpp.__version__,
        "forced": [forced([prediction(server, ids, n) for n in range(1, len(ids))]) for ids in request["prompts"]],
        "texts": [
            post(server, "/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
            for text in request["texts"]
        ],
        "chats": [chat(server, messages, request["max_tokens"], request["draft"]) for messages in request["chats"]],
    }
    json.dump(reply, answer)


main()
answer.close()
