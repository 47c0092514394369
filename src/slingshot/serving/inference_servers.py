"""vLLM's and llama.cpp's servers, each in its own words: a prompt of token ids in, token deltas out.

server = VllmServer("http://gpu1:8000")
async for delta in server.stream(client, generation): ...       # ServerFailed where another replica may be asked
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Protocol

import aiohttp

from slingshot.engine.sampling import SamplingParams
from slingshot.engine.sequence import FinishReason
from slingshot.engine.vocabulary import Vocabulary
from slingshot.serving.backend import Generation, TokenDelta
from slingshot.serving.errors import ApiError

_TIMEOUT = aiohttp.ClientTimeout(sock_connect=5.0)  # of an answer: whoever asks knows how long to wait


class ServerFailed(Exception):
    """A server does not answer, or ended midway: another replica may be asked what has not begun."""


class InferenceServer(Protocol):
    """One replica and the words it speaks."""

    url: str

    async def context(self, client: aiohttp.ClientSession) -> int:
        """Tokens of a sequence at most."""

    def stream(self, client: aiohttp.ClientSession, generation: Generation) -> AsyncGenerator[TokenDelta, None]: ...


class VllmServer:
    """vLLM's OpenAI server: /v1/completions with a prompt of ids, and ids back."""

    def __init__(self, url: str) -> None:
        self.url, self._model = url.rstrip("/"), ""

    async def context(self, client: aiohttp.ClientSession) -> int:
        model = (await _object(client, f"{self.url}/v1/models"))["data"][0]
        self._model = model["id"]
        return int(model["max_model_len"])

    async def stream(self, client: aiohttp.ClientSession, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        params = generation.params
        _refuse(params, "vLLM's", words=any(not isinstance(word, str) for word in params.bad_words))
        body = _common(generation) | {
            "model": self._model, "prompt": list(generation.prompt_ids), "max_tokens": params.max_tokens,
            "return_token_ids": True, "stream_options": {"include_usage": True}, "skip_special_tokens": False, "n": 1,
            "stop_token_ids": list(params.stop_token_ids), "ignore_eos": params.ignore_eos,
            "repetition_penalty": params.repetition_penalty, "bad_words": list(params.bad_words),
        }  # fmt: skip
        if generation.logprobs:
            body |= {"logprobs": params.top_logprobs, "return_tokens_as_token_ids": True}
        if generation.salt:
            body["cache_salt"] = generation.salt
        if params.logit_bias:
            body["logit_bias"] = {str(id): max(bias, -100.0) for id, bias in params.logit_bias}  # it knows no less
        names = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
        if params.structure is not None:
            kind, value = params.structure
            body["structured_outputs"] = {names[kind]: json.loads(value) if kind == "json_schema" else value}
        cached = 0
        last: TokenDelta | None = None
        async with contextlib.aclosing(_events(client, f"{self.url}/v1/completions", body)) as events:
            async for event in events:
                if usage := event.get("usage"):
                    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                for choice in event["choices"]:
                    ids, told = choice.get("token_ids") or [], choice.get("logprobs") or {}
                    reason: FinishReason | None = choice["finish_reason"]
                    # The sampled one always stands there.
                    likeliest = (told.get("top_logprobs") or []) if params.top_logprobs else []
                    kept = (list((each or {}).items())[: params.top_logprobs] for each in likeliest)
                    top = [{int(name.removeprefix("token_id:")): value for name, value in each} for each in kept]
                    delta = TokenDelta(ids, told.get("token_logprobs") or [0.0] * len(ids), cached, reason, top)
                    if reason is not None:
                        last = delta  # the usage comes behind it
                    elif ids:
                        yield delta
        if last is None:
            raise ServerFailed(f"{self.url} ended an answer midway")
        yield replace(last, cached=cached)


class LlamaServer:
    """llama.cpp's server: /completion with a prompt of ids, and ids back.

    While a character is not whole it keeps the tokens back, and then tells the last of them alone. Of the others it
    tells how many they are and what they spell: tokens of that spelling stand in for them, with a logprob of 0.
    """

    def __init__(self, url: str, vocabulary: Vocabulary) -> None:
        self.url, self._vocabulary = url.rstrip("/"), vocabulary

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {spelt: id for id, spelt in enumerate(self._vocabulary.spelt) if spelt}

    async def context(self, client: aiohttp.ClientSession) -> int:
        properties = await _object(client, f"{self.url}/props")
        return int(properties["default_generation_settings"]["n_ctx"])

    async def stream(self, client: aiohttp.ClientSession, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        held: TokenDelta | None = None  # a token without text, which may be the end's
        told = 0
        ends = set(generation.params.stop_token_ids)
        async with contextlib.aclosing(_events(client, f"{self.url}/completion", _llama_body(generation))) as events:
            async for event in events:
                if event.get("stop"):
                    ended = event.get("stop_type") == "eos"
                    cached = int((event.get("timings") or {}).get("cache_n") or 0)
                    yield replace(
                        held or TokenDelta([], []), cached=cached, finish_reason="stop" if ended else "length"
                    )
                    return
                if held is not None:
                    yield held
                    held = None
                delta = self._delta(event, told, generation.params.top_logprobs)
                told += len(delta.token_ids)
                if ends.intersection(delta.token_ids):
                    yield replace(delta, finish_reason="stop")
                    return
                if delta.token_ids and delta.token_ids[-1] in self._vocabulary.silent:
                    held = delta
                elif delta.token_ids:
                    yield delta
        raise ServerFailed(f"{self.url} ended an answer midway")

    def _delta(self, event: dict[str, Any], told: int, most: int) -> TokenDelta:
        ids = event.get("tokens") or []
        probabilities = event.get("completion_probabilities") or []
        probabilities = probabilities if len(probabilities) == len(ids) else []
        logprobs = [each["logprob"] for each in probabilities] or [0.0] * len(ids)
        top = [{its["id"]: its["logprob"] for its in each["top_logprobs"]} for each in probabilities] if most else []
        missing = int(event.get("tokens_predicted", 0)) - told - len(ids)
        if ids and missing > 0:
            said = b"".join(self._vocabulary.spelt[id] for id in ids)
            before = event["content"].encode().removesuffix(said)
            kept = next(self._spellings(before, missing), []) if len(before) <= _CHARACTER else []
            ids, logprobs = kept + ids, [0.0] * len(kept) + logprobs
            top = [dict[int, float]() for _ in kept] + top if top else top
        return TokenDelta(ids, logprobs, 0, None, top)

    def _spellings(self, text: bytes, count: int) -> Iterator[list[int]]:
        """So many ids that spell the text, those of longer beginnings first."""
        if count == 1 and text in self._ids:
            yield [self._ids[text]]
        for size in range(len(text) - count + 1, 0, -1) if count > 1 else ():
            if (first := self._ids.get(text[:size])) is not None:
                yield from ([first, *rest] for rest in self._spellings(text[size:], count - 1))


_SEEDS = 2**32 - 1  # the largest of 32 bits is none for llama.cpp
_CHARACTER = 64  # bytes at most that tokens before a whole character spell


def _llama_body(generation: Generation) -> dict[str, Any]:
    """What /completion is asked; ApiError 400 for what it does not know."""
    params = generation.params
    _refuse(params, "llama.cpp's", words=bool(params.bad_words))
    body = _common(generation) | {
        "prompt": list(generation.prompt_ids), "n_predict": params.max_tokens, "return_tokens": True,
        "cache_prompt": True, "n_probs": max(1, params.top_logprobs) * generation.logprobs,
        "ignore_eos": params.ignore_eos, "repeat_penalty": params.repetition_penalty,
        "repeat_last_n": len(generation.prompt_ids) + params.max_tokens,
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],  # in this order, as others have it
    }  # fmt: skip
    if params.logit_bias:
        body["logit_bias"] = [[id, False if bias == float("-inf") else bias] for id, bias in params.logit_bias]
    if params.json_schema is not None:
        body["json_schema"] = json.loads(params.json_schema)
    elif params.grammar is not None:
        body["grammar"] = params.grammar
    elif params.choice or params.regex is not None:
        raise ApiError(400, "llama.cpp's server knows json_schema and grammar, and neither regex nor choice")
    return body


def _refuse(params: SamplingParams, whose: str, words: bool) -> None:
    """ApiError 400 for what would be passed over; words: bad_words that it does not know."""
    unknown = ["bad_words"] if words else []
    unknown += ["logprobs of the prompt"] if params.prompt_logprobs is not None else []
    unknown += ["experts"] if params.routed_experts else []
    if unknown:
        raise ApiError(400, f"{whose} server does not know {' and '.join(unknown)}: leave that out")


def _common(generation: Generation) -> dict[str, Any]:
    """What both servers call alike. Samples of one question share its seed: each but the first gets one of its own."""
    params = generation.params
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
    seed = params.seed
    if generation.key != "0":
        seed = int.from_bytes(blake2b(f"{seed}|{generation.key}".encode(), digest_size=4).digest())
    return {"stream": True, "seed": seed % _SEEDS} | {name: getattr(params, name) for name in names}


async def _object(client: aiohttp.ClientSession, url: str) -> Any:
    async with client.get(url, raise_for_status=True) as response:
        return await response.json(content_type=None)


async def _events(
    client: aiohttp.ClientSession, url: str, body: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed answer. ServerFailed where the server cannot take it, ApiError 400 where it refuses."""
    try:
        async with client.post(url, json=body, timeout=_TIMEOUT) as response:
            if response.status >= 400:
                if response.status >= 500 or response.status in (404, 429):
                    raise ServerFailed(f"{url}: {response.status}")
                raise ApiError(400, _message(await response.text(errors="replace")))
            async for line in response.content:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise _failure(url, event)
                    yield event
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # ValueError: a line without end, or no JSON
        raise ServerFailed(f"{url}: {error or type(error).__name__}") from error


def _failure(url: str, event: dict[str, Any]) -> Exception:
    """What an error within an answer is: of the question, where its code says so, or of the server."""
    code = event["error"].get("code") if isinstance(event["error"], dict) else None
    message = _message(json.dumps(event))
    return ApiError(400, message) if isinstance(code, int) and 400 <= code < 500 else ServerFailed(f"{url}: {message}")


def _message(text: str) -> str:
    """What a server's error says."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        found = json.loads(text)
        found = found.get("error", found)
        return str(found.get("message", found) if isinstance(found, dict) else found)
    return text[:500]
