"""What vLLM's and llama.cpp's servers say, over any backend: enough of their words to be asked by ids."""

import asyncio
import codecs
import json

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from slingshot.engine.sampling import SamplingParams
from slingshot.serving.backend import Generation

SAME = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty")


def fake_server(backend, tokenizer, kind, state=None):
    """state: not "ready" is 503; the first so many answers end before they begin ("dies"), or behind ("midway");
    "refuses" is what is told within an answer instead of it. "hangs": nothing comes any more, whatever is asked. What
    was "asked" is kept, and from which "ports"."""
    app, state = FastAPI(), {} if state is None else state
    state.update({"asked": [], "ports": [], "ready": True, "dies": 0, "midway": 0, "hangs": False} | state)

    async def alive():
        while state["hangs"]:
            await asyncio.sleep(0.05)

    @app.get("/health")
    async def health():
        await alive()
        return Response(status_code=200 if state["ready"] else 503)

    @app.get("/v1/models")
    async def models():
        return {"data": [{"id": "theirs", "max_model_len": backend.max_length}]}

    @app.get("/props")
    async def properties():
        return {"default_generation_settings": {"n_ctx": backend.max_length}}

    async def deltas(body, most, stops):
        state["asked"].append(body)
        params = SamplingParams(**{name: body[name] for name in SAME}, max_tokens=most, stop_token_ids=stops,
                                json_schema=json.dumps(schema_of(body)) if schema_of(body) else None)  # fmt: skip
        async for delta in backend.generate(Generation(tuple(body["prompt"]), params, "0")):
            await alive()
            yield delta
            if state["midway"]:
                state["midway"] -= 1
                raise RuntimeError("the server was killed")

    def schema_of(body):
        return body.get("json_schema") or (body.get("structured_outputs") or {}).get("json")

    def answered(events):
        if "refuses" in state:
            return StreamingResponse(iter([f"data: {json.dumps({'error': state['refuses']})}\n\n", "data: [DONE]\n\n"]))
        if state["dies"]:
            state["dies"] -= 1
            return Response(status_code=500)
        return StreamingResponse(f"data: {json.dumps(event)}\n\n" async for event in events)

    @app.post("/v1/completions")
    async def completions(request: Request):
        body = await request.json()
        state["ports"].append(request.client.port)
        assert kind == "vllm" and body["model"] == "theirs" and body["return_token_ids"]

        async def events():
            async for delta in deltas(body, body["max_tokens"], tuple(body["stop_token_ids"])):
                choice = {"token_ids": delta.token_ids, "finish_reason": delta.finish_reason}
                told = {"token_logprobs": delta.logprobs, "top_logprobs": []} if "logprobs" in body else None
                yield {"choices": [choice | {"logprobs": told}]}
                cached = delta.cached
            yield {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": cached}}}

        return answered(events())

    @app.post("/completion")
    async def completion(request: Request):
        body = await request.json()
        state["ports"].append(request.client.port)
        assert kind == "llama.cpp" and body["return_tokens"]

        async def events():
            count, text = 0, codecs.getincrementaldecoder("utf-8")("replace")
            async for delta in deltas(body, body["n_predict"], ()):
                for id in delta.token_ids:
                    count += 1
                    content = text.decode(tokenizer.detokenizer.bytes_of(id))
                    if not text.getstate()[0]:  # nothing is told while a character is not whole
                        told = {"tokens": [id], "content": content, "tokens_predicted": count, "stop": False}
                        its = [{"id": id, "logprob": -0.5, "top_logprobs": []}]
                        yield told | ({"completion_probabilities": its} if body["n_probs"] else {})
                if delta.finish_reason:
                    why = "eos" if delta.finish_reason == "stop" else "limit"
                    yield {"tokens": [], "content": "", "tokens_predicted": count, "stop": True, "stop_type": why,
                           "timings": {"cache_n": 3}}  # fmt: skip

        return answered(events())

    return app
