"""vLLM's and llama.cpp's servers, each in its own words: a prompt of token ids in, token deltas out.

server = VllmServer("http://gpu1:8000")
async for delta in server.stream(client, generation): ...       # ServerFailed where another replica may be asked
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Protocol

import httpx

from slingshot.engine.sampling import STRUCTURES, SamplingParams
from slingshot.engine.sequence import FinishReason
from slingshot.serving.backend import Generation, TokenDelta
from slingshot.serving.errors import ApiError


class ServerFailed(Exception):
    """A server does not answer, or ended midway: another replica may be asked what has not begun."""


class InferenceServer(Protocol):
    """One replica and the words it speaks."""

    url: str

    async def context(self, client: httpx.AsyncClient) -> int:
        """Tokens of a sequence at most."""
        ...

    def stream(self, client: httpx.AsyncClient, generation: Generation) -> AsyncGenerator[TokenDelta, None]: ...


class VllmServer:
    """vLLM's OpenAI server: /v1/completions with a prompt of ids, and ids back."""

    def __init__(self, url: str) -> None:
        self.url, self._model = url.rstrip("/"), ""

    async def context(self, client: httpx.AsyncClient) -> int:
        model = (await client.get(f"{self.url}/v1/models")).raise_for_status().json()["data"][0]
        self._model = model["id"]
        return int(model["max_model_len"])

    async def stream(self, client: httpx.AsyncClient, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        params = generation.params
        body = _common(params) | {
            "model": self._model, "prompt": list(generation.prompt_ids), "max_tokens": params.max_tokens,
            "return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": params.top_logprobs,
            "stream_options": {"include_usage": True}, "skip_special_tokens": False, "n": 1,
            "stop_token_ids": list(params.stop_token_ids), "ignore_eos": params.ignore_eos,
            "repetition_penalty": params.repetition_penalty,
        }  # fmt: skip
        if generation.salt:
            body["cache_salt"] = generation.salt
        if params.logit_bias:
            body["logit_bias"] = {str(id): bias for id, bias in params.logit_bias}
        names = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
        if structure := next((name for name in STRUCTURES if getattr(params, name)), None):
            value = getattr(params, structure)
            body["structured_outputs"] = {names[structure]: json.loads(value) if structure == "json_schema" else value}
        cached = 0
        last: TokenDelta | None = None
        async for event in _events(client, f"{self.url}/v1/completions", body):
            if usage := event.get("usage"):
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            for choice in event["choices"]:
                ids, told = choice.get("token_ids") or [], choice.get("logprobs") or {}
                reason: FinishReason | None = choice["finish_reason"]
                top = [
                    {_id_of(name): value for name, value in (each or {}).items()}
                    for each in told.get("top_logprobs") or []
                ]
                delta = TokenDelta(ids, told.get("token_logprobs") or [0.0] * len(ids), cached, reason, top)
                if reason is not None:
                    last = delta  # the usage comes behind it
                elif ids:
                    yield delta
        if last is None:
            raise ServerFailed(f"{self.url} ended an answer midway")
        yield replace(last, cached=cached)


class LlamaServer:
    """llama.cpp's server: /completion with a prompt of ids, and ids back. eos_id: what it leaves out at the end."""

    def __init__(self, url: str, eos_id: int) -> None:
        self.url, self._eos_id = url.rstrip("/"), eos_id

    async def context(self, client: httpx.AsyncClient) -> int:
        properties = (await client.get(f"{self.url}/props")).raise_for_status().json()
        return int(properties["default_generation_settings"]["n_ctx"])

    async def stream(self, client: httpx.AsyncClient, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        params = generation.params
        body = _common(params) | {
            "prompt": list(generation.prompt_ids), "n_predict": params.max_tokens, "return_tokens": True,
            "cache_prompt": True, "n_probs": max(1, params.top_logprobs), "repeat_penalty": params.repetition_penalty,
            "ignore_eos": params.ignore_eos,
        }  # fmt: skip
        if params.logit_bias:
            body["logit_bias"] = [list(pair) for pair in params.logit_bias]
        if params.json_schema is not None:
            body["json_schema"] = json.loads(params.json_schema)
        elif params.grammar is not None:
            body["grammar"] = params.grammar
        elif params.choice or params.regex is not None:
            raise ApiError(400, "llama.cpp's server knows json_schema and grammar, and neither regex nor choice")
        ends = set(params.stop_token_ids)
        async for event in _events(client, f"{self.url}/completion", body):
            ids = event.get("tokens") or []
            told = event.get("completion_probabilities") or []
            logprobs = [each["logprob"] for each in told] if len(told) == len(ids) else [0.0] * len(ids)
            top = [{other["id"]: other["logprob"] for other in each["top_logprobs"]} for each in told]
            delta = TokenDelta(ids, logprobs, 0, None, top if params.top_logprobs and len(top) == len(ids) else [])
            if ends.intersection(ids):
                yield replace(delta, finish_reason="stop")
                return
            if event.get("stop"):
                ended = event.get("stop_type") == "eos"
                cached = int((event.get("timings") or {}).get("cache_n") or event.get("tokens_cached_prompt") or 0)
                more = ([*ids, self._eos_id], [*logprobs, 0.0]) if ended else (ids, logprobs)
                yield TokenDelta(*more, cached, "stop" if ended else "length")
                return
            if ids:
                yield delta
        raise ServerFailed(f"{self.url} ended an answer midway")


def _id_of(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _common(params: SamplingParams) -> dict[str, Any]:
    """What both servers call alike."""
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty")
    return {"stream": True} | {name: getattr(params, name) for name in names}


async def _events(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed answer. ServerFailed where the server cannot take it, ApiError 400 where it refuses."""
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code >= 400:
                text = (await response.aread()).decode("utf-8", errors="replace")
                if response.status_code >= 500 or response.status_code in (404, 429):
                    raise ServerFailed(f"{url}: {response.status_code}")
                raise ApiError(400, _message(text))
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ApiError(503, _message(json.dumps(event)))
                    yield event
    except httpx.HTTPError as error:
        raise ServerFailed(f"{url}: {error or type(error).__name__}") from error


def _message(text: str) -> str:
    """What a server's error says."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        found = json.loads(text)
        found = found.get("error", found)
        return str(found.get("message", found) if isinstance(found, dict) else found)
    return text[:500]
