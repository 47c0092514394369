"""vLLM servers as the sampler of a run: weights go to them as folders, and are compared with the trainer's.

    sampler = VllmSampler(urls, model, tokenizer, folder, probes, params, parallel)
    sampler.update_weights(step, model.state_dict())     # NoServerLeft where none takes them: try again later
    sampler.sample(prompts, params, keys)

Every process of a run asks all servers for its own share of the samples; the first one pushes weights. A server that
fails is asked nothing more until the next push, and its work goes to the others; when none is left, what remains comes
back with finish_reason "abort".
"""

from __future__ import annotations

import asyncio
import math
import queue
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import aiohttp
import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.base.files import new_folder, write_text
from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.engine.sampling import SamplingParams
from slingshot.model.transformer import Transformer
from slingshot.rollout.extension.slingshot_reload import STABLE
from slingshot.rollout.rollout_server import START, RolloutServer, ServerLost
from slingshot.rollout.sampler import Prompts, Samples
from slingshot.rollout.trajectory import Sampled, Trajectory, pack
from slingshot.tasks.mixture import Item
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.parallel import Parallel
from slingshot.training.policy import trainer_logprobs

SILENCE, LOADING = 120.0, 600.0  # seconds: without a token until a server hangs; that new weights may take
LOOK = 5.0  # seconds between two looks at what a server has made
PROBE_TOKENS = 16
COUNTS = 1, 8  # answers to each probe: where the first ones are far off, more of them decide
MOST_APART = {"float32": 1e-3, "bfloat16": 0.02}  # nats a token, in the mean

_Asked = tuple[list[int], SamplingParams, str]
_Found = tuple[int, list[Sampled] | Exception]


class NoServerLeft(SlingshotError):
    """No server takes the weights at present; the run can wait for one."""


class VllmSampler:
    """probes: problems and their prompts, of which each server answers each after every push. params: as the run's
    samples are drawn. silence: seconds (`RolloutServer`)."""

    def __init__(
        self,
        urls: Sequence[str],
        model: Transformer,
        tokenizer: Tokenizer,
        folder: Path,
        probes: Sequence[tuple[Item, list[int]]],
        params: SamplingParams,
        parallel: Parallel,
        silence: float = SILENCE,
    ) -> None:
        self.tokenizer, self.model_config = tokenizer, model.config
        self.max_length = model.config.max_position_embeddings
        self._model, self._folder, self._probes, self._params, self._parallel = model, folder, probes, params, parallel
        self._lost = set[str]()
        self._servers = [RolloutServer(url, model.config, tokenizer, silence, LOADING) for url in urls]
        self._run, self._written = parallel.agree(uuid.uuid4().hex[:8]), ""  # another run's weights have other names
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True).start()

    def update_weights(self, version: int, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Push to every server that answers, and compare; the seconds it took, and how far logprobs are apart.

        Raises NoServerLeft, on all ranks; SlingshotError for a server that is not what the run needs, or whose logprobs
        are not the trainer's after it loaded its weights.
        """
        began, name = time.monotonic(), f"{self._run}-{version}"
        self._write(name, state)
        for server in self._servers:
            server.expect(name)
        for count in COUNTS:
            found = self._push_all(name, count)
            for server, its in zip(self._servers, found, strict=True):
                self._mark(server, "samples" in its, its.get("lost", ""))
                server.version, server.max_length = name, its.get("max_length", 0)
            well = [server for server in self._servers if server.well]
            if not well:
                raise NoServerLeft(f"no rollout server has the weights of step {version}: {START}")
            gaps = [self._apart(*both) for both in zip(self._servers, found, strict=True) if both[0].well]
            apart, most, url = max(gaps, key=lambda gap: gap[0] / gap[1])
            if apart <= most:
                break
        else:
            what = f"{url}: after it loaded new weights its logprobs are {apart:.3g} nats a token from the trainer's"
            raise SlingshotError(f"{what}, more than {most:g}; start it anew, in the trainer's dtype ({START})")
        self.max_length = min(self.model_config.max_position_embeddings, *(server.max_length for server in well))
        for older in self._folder.iterdir() if self._parallel.is_first else ():
            if older.name != name:
                shutil.rmtree(older)
        return {"push_seconds": time.monotonic() - began, "server_gap": apart, "servers": len(well)}

    def sample(self, prompts: Prompts, params: Sequence[SamplingParams], keys: Sequence[str]) -> Samples:
        found, asked = queue.SimpleQueue[_Found](), list(zip(prompts, params, keys, strict=True))
        work = asyncio.run_coroutine_threadsafe(self._sample_all(asked, found), self._loop)
        try:
            for _ in prompts:
                index, samples = found.get()
                if isinstance(samples, Exception):
                    raise samples
                yield from ((index, number, sampled) for number, sampled in enumerate(samples))
        finally:
            work.cancel()

    async def _sample_all(self, asked: Sequence[_Asked], found: queue.SimpleQueue[_Found]) -> None:
        async def one(index: int) -> None:
            try:
                found.put((index, await self._sample(client, *asked[index])))
            except Exception as error:  # it is raised where the samples are taken
                found.put((index, error))

        async with _session() as client:
            watching = asyncio.create_task(self._watch(client))
            try:
                await asyncio.gather(*map(one, range(len(asked))))
            finally:
                watching.cancel()

    async def _sample(
        self, client: aiohttp.ClientSession, prompt: list[int], params: SamplingParams, key: str
    ) -> list[Sampled]:
        """From the least busy server, or the next one while they fail."""
        name = f"{params.seed}|{key}".encode(errors="surrogatepass")
        seed = int.from_bytes(blake2b(name, digest_size=4).digest())
        while well := [server for server in self._servers if server.well]:
            server = min(well, key=lambda its: its.running)
            try:
                return await server.generate(client, prompt, params, seed)
            except ServerLost as error:
                self._mark(server, False, str(error))
        return [Sampled([], [], "abort")] * params.n

    async def _watch(self, client: aiohttp.ClientSession) -> None:
        while True:
            await asyncio.sleep(LOOK)
            await asyncio.gather(*(server.watch(client) for server in self._servers if server.running))

    def _push_all(self, name: str, count: int) -> list[dict[str, Any]]:
        """What became of the push to each server, on all ranks."""

        async def push_all() -> list[dict[str, Any]]:
            async with _session() as client:
                return await asyncio.gather(*(self._push(client, server, name, count) for server in self._servers))

        is_first = self._parallel.is_first
        found: list[dict[str, Any]] = self._parallel.agree(
            asyncio.run_coroutine_threadsafe(push_all(), self._loop).result() if is_first else []
        )
        for its in found:
            if "refused" in its:
                raise SlingshotError(its["refused"])
        return found

    async def _push(
        self, client: aiohttp.ClientSession, server: RolloutServer, name: str, count: int
    ) -> dict[str, Any]:
        """Why a server is "refused" or "lost", or its `count` answers to each probe, by its new weights; as JSON."""
        params = replace(self._params, n=count, max_tokens=min(PROBE_TOKENS, self._params.max_tokens))
        try:
            if not server.well:
                await server.meet(client, params.routed_experts)
            await server.push(client, (self._folder / name).resolve(), name)
            asked = (server.generate(client, ids, params, seed) for seed, (_, ids) in enumerate(self._probes))
            answers = await asyncio.gather(*asked)
        except ServerLost as error:
            return {"lost": str(error)}
        except SlingshotError as error:
            return {"refused": str(error)}
        samples = [
            [number, its.ids, its.logprobs, None if its.routed_experts is None else its.routed_experts.tolist()]
            for number, samples in enumerate(answers)
            for its in samples
        ]
        return {"samples": samples, "dtype": server.dtype, "max_length": server.max_length}

    def _apart(self, server: RolloutServer, found: Mapping[str, Any]) -> tuple[float, float, str]:
        """How far the logprobs of a server's samples are from the trainer's, nats a token in the mean; how far they may
        be; and its address."""
        trajectories = []
        for number, ids, logprobs, experts in found["samples"]:
            told = None if experts is None else torch.tensor(experts, dtype=torch.int16)
            item, prompt = self._probes[number]
            trajectories.append(Trajectory(item, prompt, []))
            trajectories[-1].respond(Sampled(ids, logprobs, "length", told), self.tokenizer)
        rows = pack(trajectories, 1).to(self._parallel.device)
        trainer_BT = trainer_logprobs(self._model, rows, len(rows), self._params.temperature, len(self._probes))
        apart = float((trainer_BT - rows.sampler_BT)[rows.mask_BT > 0].abs().mean())
        trained = self._model.compute_dtype or self._model.model.norm.weight.dtype
        exact = (found["dtype"], trained) == ("float32", torch.float32)
        return apart if apart == apart else math.inf, MOST_APART["float32" if exact else "bfloat16"], server.url

    def _write(self, name: str, state: Mapping[str, Tensor]) -> None:
        """The folder of these weights, whole when it appears."""
        if self._written == name:  # and no server took them
            return
        state = self._parallel.gathered(state)
        if self._parallel.is_first:
            with new_folder(self._folder / name) as folder:
                save_checkpoint(folder, self._model, self.tokenizer, state)
                write_text(folder / STABLE, name)
        self._written = name

    def _mark(self, server: RolloutServer, well: bool, why: str) -> None:
        """Note whether a server is asked for samples; said, and why, where that changes."""
        was_lost, server.well = server.url in self._lost, well
        if well != was_lost:
            return
        self._lost ^= {server.url}
        if self._parallel.is_first:
            print(f"rollouts: {server.url}: {why}" if not well else f"rollouts: {server.url} is back", file=sys.stderr)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
