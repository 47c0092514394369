"""One vLLM server that samples for a trainer: prompts of token ids in, samples out, new weights from a folder.

    server = RolloutServer("http://gpu1:8000", model_config, tokenizer, silence=120.0, loading=600.0)
    await server.meet(client, routed_experts=False)
    await server.push(client, Path("/runs/rl.partial/weights/7"), "5f0c-7")
    samples = await server.generate(client, prompt, params, seed=17)

`slingshot rollout-server MODEL` starts one. What its user has to mend is a SlingshotError; a server that does not do
what it should raises ServerLost, and is asked nothing more until it took weights again.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.model.config import ModelConfig
from slingshot.rollout.trajectory import Sampled
from slingshot.text.tokenizer import Tokenizer

START = "start it by: slingshot rollout-server MODEL"
_SHAPE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "q_lora_rank",
)  # fmt: skip
_KNOWN = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "ignore_eos", "routed_experts")
_SHORT = aiohttp.ClientTimeout(total=30.0, sock_connect=5.0)  # seconds, for what a server answers at once


class ServerLost(Exception):
    """A server that does not answer, or not as it should: what it was asked is asked elsewhere. status: of its answer,
    0 for none."""

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.status = status


class RolloutServer:
    """running: samples it is asked for. well: it has the present weights, of the name `version`. names: of all weights
    that its next answers may be of, in their order.

    silence: seconds without a token, or an answer, after which it hangs; `heard` begins them anew. loading: seconds
    that new weights may take.
    """

    def __init__(self, url: str, config: ModelConfig, tokenizer: Tokenizer, silence: float, loading: float) -> None:
        self.url, self._config, self._tokenizer = url.rstrip("/"), config, tokenizer
        self._silence, self._loading = silence, loading
        self.running, self.well, self.version, self.names = 0, False, "", [""]
        self.max_length, self.dtype = 0, ""  # as it told
        self._counted = ""
        self._waits = dict[asyncio.Timeout, str]()  # and the weights of which each answer began, the oldest first

    async def meet(self, client: aiohttp.ClientSession, routed_experts: bool) -> None:
        """See that it serves this model's shape and tokenizer, in a way that a trainer can use."""
        listed = await self._ask(client, "GET", "/v1/models")
        try:
            about = (await self._call(client, "slingshot_describe", [], _SHORT))[0]
        except ServerLost as error:
            if error.status:
                raise SlingshotError(f"{self.url} is vLLM without slingshot's extension; {START}") from error
            raise
        ours, theirs = self._config.to_hf(), about["config"]
        for key in _SHAPE:
            if theirs.get(key, ours.get(key)) != ours.get(key):
                raise SlingshotError(f"{self.url} serves another model: {key} {theirs[key]}, not {ours.get(key)}")
        if about["logprobs_mode"] != "processed_logprobs":
            raise SlingshotError(f"{self.url} tells logprobs of temperature 1 ({about['logprobs_mode']}); {START}")
        if routed_experts and not about["routed_experts"]:
            way = f"{START} -- --enable-return-routed-experts"
            raise SlingshotError(f"loss.replay_routing: {self.url} tells of no experts; {way}")
        for text in ("The sum of 12 and 345 is 357.", " 3足す4は7。\n\n\tπ ≈ 3.14", "def f(x): return x  # 😀"):
            said = await self._ask(client, "POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
            if said["tokens"] != self._tokenizer.encode(text):
                raise SlingshotError(f"{self.url} has another tokenizer: of {text!r} it makes {said['tokens']!s:.60}")
        self.max_length, self.dtype = int(listed["data"][0]["max_model_len"]), about["dtype"]

    def expect(self, version: str) -> None:
        """It will be given the weights of this name."""
        oldest = [*self._waits.values(), self.version][0]
        self.names = [*self.names[self.names.index(oldest) :], version]

    async def push(self, client: aiohttp.ClientSession, folder: Path, version: str) -> None:
        """Take the weights of a folder, and this name for them. What runs there goes on, with them, afterwards."""
        self.version = version
        await self._ask(client, "POST", "/pause?mode=keep&clear_cache=false")
        try:
            patience = aiohttp.ClientTimeout(total=self._loading)
            for worker in await self._call(client, "slingshot_reload", [str(folder), version], patience):
                if worker.get("version") != version:
                    raise ServerLost(f"it could not load new weights: {worker.get('error', worker)}")
            cache = await self._ask(client, "POST", "/reset_prefix_cache?reset_running_requests=true")
            if not cache["success"]:
                raise ServerLost("it keeps cached prefixes of old weights")
            await self._ask(client, "POST", "/update_weight_version", {"new_version": version})
        finally:
            await self._ask(client, "POST", "/resume")

    async def generate(
        self, client: aiohttp.ClientSession, prompt: Sequence[int], params: SamplingParams, seed: int
    ) -> list[Sampled]:
        """`params.n` samples of a prompt, by the weights last pushed, and those pushed meanwhile. seed: below 2^32."""
        if params != SamplingParams(**{name: getattr(params, name) for name in _KNOWN}):
            raise SlingshotError(f"{self.url}: rollout servers know {', '.join(_KNOWN)} of sampling, and nothing else")
        names = ("temperature", "top_p", "top_k", "min_p", "n", "ignore_eos")
        wanted = {name: getattr(params, name) for name in names} | {"seed": seed, "logprobs": 0, "detokenize": False}
        wanted |= {"max_tokens": min(params.max_tokens, self.max_length - len(prompt))}
        wanted |= {"stop_token_ids": [] if params.ignore_eos else sorted(self._tokenizer.eos_ids)}
        body = {"token_ids": list(prompt), "sampling_params": wanted}
        self.running += params.n
        began = self.version
        try:
            async with asyncio.timeout(self._silence) as wait:
                self._waits[wait] = began
                answer = await self._ask(client, "POST", "/inference/v1/generate", body, aiohttp.ClientTimeout())
                known = self.names[self.names.index(began) :]
        except TimeoutError as error:
            raise ServerLost(f"it made no token for {self._silence:g} s") from error
        finally:
            self.running -= params.n
            self._waits.pop(wait, None)
        self.heard()
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [self._sampled(choice, params.routed_experts, known) for choice in choices]

    def _sampled(self, choice: dict[str, Any], routed_experts: bool, known: Sequence[str]) -> Sampled:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(f"it broke an answer off ({choice['finish_reason']})")
        versions = {span["version"] for span in choice["weight_versions"] or []}
        if not versions or not versions <= set(known):
            told = " and ".join(sorted(versions)) or "no version"
            raise ServerLost(f"it answers with the weights {told}, not {self.version}: does another run push to it?")
        ids, told = choice["token_ids"], choice["logprobs"]["content"]
        experts = None
        if routed_experts:
            array = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False)
            experts = torch.from_numpy(array[:, self._config.first_k_dense_replace :].astype(np.int16))
        return Sampled(ids, [each["logprob"] for each in told], choice["finish_reason"], experts)

    async def watch(self, client: aiohttp.ClientSession) -> None:
        """Hear it where its counters of tokens moved since they were last looked at."""
        with suppress(ServerLost):
            text = await self._ask(client, "GET", "/metrics")
            counted = "".join(line for line in text.splitlines(True) if "_tokens" in line and line[0] != "#")
            if counted != self._counted:
                self._counted = counted
                self.heard()

    def heard(self) -> None:
        """It lives: who waits goes on waiting."""
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time() + self._silence)

    async def _call(
        self, client: aiohttp.ClientSession, method: str, args: Sequence[str], timeout: aiohttp.ClientTimeout
    ) -> list[dict[str, Any]]:
        """What each worker's extension answers."""
        body = {"method": method, "args": list(args)}
        results: list[dict[str, Any]] = (await self._ask(client, "POST", "/collective_rpc", body, timeout))["results"]
        return results

    async def _ask(
        self,
        client: aiohttp.ClientSession,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout: aiohttp.ClientTimeout = _SHORT,
    ) -> Any:
        """An answer's JSON, or its text where it is none."""
        try:
            async with client.request(verb, self.url + path, json=body, timeout=timeout) as response:
                text = await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerLost(f"it does not answer ({str(error) or type(error).__name__})") from error
        if response.status in (403, 404, 405):
            raise SlingshotError(f"{self.url} has no {path.partition('?')[0]}: no rollout server; {START}")
        if 400 <= response.status < 500:
            raise SlingshotError(f"{self.url} refuses {path.partition('?')[0]}: {text:.300}")
        if response.status >= 500:
            raise ServerLost(f"{path.partition('?')[0]} failed there: {text:.300}", response.status)
        with suppress(ValueError):
            return json.loads(text)
        return text
