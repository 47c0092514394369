"""Servers somewhere else as a backend: several replicas of one model, asked by token ids.

    backend = UpstreamBackend([VllmServer("http://gpu1:8000"), VllmServer("http://gpu2:8000")], tokenizer)
    await backend.start()                        # begins the health checks
    async for delta in backend.generate(generation): ...

A prompt goes to the replica that has seen its beginning, unless that one is much busier than the least busy. What has
not begun is asked of another replica when one fails; what has begun is not. A replica that says it is not ready gets
nothing new, and what it runs goes on. One of which nothing comes, no token of an answer and no word of its health, for
`silence` seconds has failed; one that is well may take its time for a prompt.

No server knows where a reasoning ends when it is asked by ids. So a structure for the answer is asked for in a second
request, once the reasoning is closed, and a budget of reasoning is kept by closing it here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

import aiohttp

from slingshot.base.errors import SlingshotError
from slingshot.engine.vocabulary import Vocabulary
from slingshot.serving.backend import Generation, TokenDelta
from slingshot.serving.errors import ApiError
from slingshot.serving.inference_servers import InferenceServer, ServerFailed
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from slingshot.serving.llama_process import LlamaProcess

CHECK = 2.0  # seconds between two looks at a replica's health
BUSIER = 8  # samples more than the least busy replica's, from which on a prompt goes where it was not seen before
_PREFIX = 64  # tokens that name a prompt's beginning
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)  # seconds for whatever is no answer
_LINE = 1 << 22  # bytes of an event at most


class _Replica:
    """running: samples that it was asked for. waits: how long each of them that waits still does. lately: whether any
    grew since the last check: a server whose every thread makes an answer may have none for its health."""

    def __init__(self, server: InferenceServer) -> None:
        self.server, self.running, self.ready = server, 0, False
        self.waits, self.lately = set[asyncio.Timeout](), False

    async def deltas(
        self, client: aiohttp.ClientSession, generation: Generation, silence: float
    ) -> AsyncGenerator[TokenDelta, None]:
        """What the server says; ServerFailed where it says nothing any more."""
        async with contextlib.aclosing(self.server.stream(client, generation)) as deltas:
            while True:
                try:
                    async with asyncio.timeout(silence) as wait:
                        self.waits.add(wait)
                        delta = await anext(deltas, None)
                except TimeoutError as error:
                    raise ServerFailed(f"{self.server.url} is silent") from error
                finally:
                    self.waits.discard(wait)
                if delta is None:
                    return
                self.lately = True
                yield delta

    def heard(self, silence: float) -> None:
        """It lives: who waits goes on waiting."""
        self.lately = False
        for wait in self.waits:
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time() + silence)


class UpstreamBackend:
    """max_length is the shortest context of the replicas that answered first. silence: seconds. child: the one replica,
    where this process keeps it."""

    def __init__(
        self,
        servers: Sequence[InferenceServer],
        tokenizer: Tokenizer,
        silence: float = 60.0,
        child: LlamaProcess | None = None,
    ) -> None:
        self._replicas = [_Replica(server) for server in servers]
        self._tokenizer, self._vocabulary = tokenizer, Vocabulary(tokenizer, tokenizer.vocab_size)
        self._silence = silence
        self._checks: asyncio.Task[None] | None = None
        self._child = child
        self.max_length, self.counters = 0, None

    @property
    def obstacle(self) -> str | None:
        if self._child is not None and self._child.obstacle:
            return self._child.obstacle
        if any(replica.ready for replica in self._replicas):
            return None
        return "none of the servers that answer for this model does at present"

    async def start(self) -> None:
        """Look at every replica once; SlingshotError where none answers."""
        # None is used twice: llama.cpp's server closes those that it kept whenever it likes.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._client = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, read_bufsize=_LINE)
        await asyncio.gather(*map(self._check, self._replicas))
        if not any(replica.ready for replica in self._replicas):
            await self._client.close()
            urls = ", ".join(replica.server.url for replica in self._replicas)
            raise SlingshotError(f"no server answers at {urls}; start one, or mend --upstream")
        self._checks = asyncio.create_task(self._check_again())

    async def close(self) -> None:
        if self._checks is not None:
            self._checks.cancel()
        await self._client.close()

    async def generate(self, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        params, told = generation.params, list[int]()
        if params.structural_tag is not None:
            whose = "vLLM's and llama.cpp's servers are asked by token ids, and cannot be held to a call that way"
            raise ApiError(400, f"{whose}: take tool_choice auto, and functions that are not strict")
        opened = ends_in_reasoning(generation.prompt_ids, self._tokenizer)
        end = self._tokenizer.end_think_id
        if not opened or end is None or not (params.structure or params.thinking_budget is not None):
            asked = replace(generation, params=replace(params, thinking_budget=None))
            async with contextlib.aclosing(self._ask(asked)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        plain = replace(params, thinking_budget=None, json_schema=None, regex=None, choice=(), grammar=None)
        budget = params.max_tokens if params.thinking_budget is None else min(params.thinking_budget, params.max_tokens)
        cached, closed = 0, False
        if budget:
            thinking = replace(plain, max_tokens=budget, stop_token_ids=(*plain.stop_token_ids, end))
            async with contextlib.aclosing(self._ask(replace(generation, params=thinking))) as deltas:
                async for delta in deltas:
                    cached, closed = delta.cached or cached, end in delta.token_ids
                    size = delta.token_ids.index(end) + 1 if closed else len(delta.token_ids)
                    told += delta.token_ids[:size]
                    goes_on = closed or delta.finish_reason == "length"
                    reason = None if goes_on else delta.finish_reason
                    top = delta.top_logprobs[:size]
                    yield TokenDelta(delta.token_ids[:size], delta.logprobs[:size], cached, reason, top)
                    if reason is not None:
                        return
                    if closed:
                        break
        if not closed:
            ids = self._vocabulary.closing[0] + self._vocabulary.closing[1]
            told += ids
            yield TokenDelta(ids, [0.0] * len(ids), cached)
        left = params.max_tokens - len(told)
        if left < 1:
            yield TokenDelta([], [], cached, "length")
            return
        answering = replace(params, thinking_budget=None, max_tokens=left)
        rest = replace(generation, prompt_ids=(*generation.prompt_ids, *told), params=answering)
        async with contextlib.aclosing(self._ask(rest)) as deltas:
            async for delta in deltas:
                yield replace(delta, cached=cached)

    async def _ask(self, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        """One request of one replica, or of the next ones while none has begun."""
        failed: set[_Replica] = set()
        while True:
            replica = self._choose(generation, failed)
            replica.running += 1
            begun = False
            try:
                async with contextlib.aclosing(replica.deltas(self._client, generation, self._silence)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
                return
            except ServerFailed as error:
                replica.ready = False  # until a check finds it well
                failed.add(replica)
                if begun:
                    raise ApiError(503, "the server that made this answer failed midway; ask again") from error
            finally:
                replica.running -= 1

    def _choose(self, generation: Generation, failed: set[_Replica]) -> _Replica:
        """Rendezvous hashing by the prompt's beginning: a replica that comes or goes moves only its own share."""
        ready = [replica for replica in self._replicas if replica.ready and replica not in failed]
        if not ready:
            raise ApiError(503, "no server is ready; try again later", retry_after=2)
        beginning = f"{generation.salt}|{generation.prompt_ids[:_PREFIX]}"
        least = min(replica.running for replica in ready)
        free = [replica for replica in ready if replica.running < least + BUSIER]
        return max(free, key=lambda its: blake2b(f"{its.server.url}|{beginning}".encode(), digest_size=8).digest())

    async def _check(self, replica: _Replica) -> None:
        try:
            async with self._client.get(f"{replica.server.url}/health") as response:
                well = response.status == 200
            replica.heard(self._silence)
            if well and not replica.ready:
                length = await replica.server.context(self._client)
                self.max_length = min(self.max_length or length, length)
            replica.ready = well
        except (aiohttp.ClientError, TimeoutError, LookupError, TypeError, ValueError):  # it is looked at again
            replica.ready = False
            if replica.lately:
                replica.heard(self._silence)

    async def _check_again(self) -> None:
        while True:
            await asyncio.sleep(CHECK)
            await asyncio.gather(*map(self._check, self._replicas))
