"""A server that speaks as vLLM does with slingshot's extension, over slingshot's own engine, and fails where asked."""

import asyncio
import base64
import io
import threading
from pathlib import Path

import numpy as np
from aiohttp import web

from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams

SAME = ("temperature", "top_p", "top_k", "min_p", "n", "seed", "max_tokens", "ignore_eos")


class VllmDouble:
    """`asked`: the paths of what it was asked. `faults`: hangs; stale (it says that it loaded, and did not); wedged
    (nothing loads); broken (no extension); old (it answers with other weights); aborts (it breaks answers off); lasts
    (the next answer takes until others have come). `about`: what it tells of itself besides the truth. `answers`: how
    many it makes until it dies. `tokenizer`: another than the model's."""

    def __init__(self, folder, port=0, faults=(), about=None, answers=None, tokenizer=None):
        self.model, self.tokenizer = load_model(folder), load_tokenizer(folder)
        self.engine, self.spelling = Engine(self.model, self.tokenizer), tokenizer or self.tokenizer
        self.faults, self.about, self.answers = set(faults), about or {}, answers
        self.asked, self.version, self.port = [], "default", port
        self._loop, self._turn = asyncio.new_event_loop(), threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        started = threading.Event()

        async def start():
            app = web.Application(middlewares=[self._note])
            for verb, path, handler in (
                ("GET", "/v1/models", self._models), ("GET", "/metrics", self._metrics),
                ("POST", "/tokenize", self._tokenize), ("POST", "/collective_rpc", self._call),
                ("POST", "/pause", self._pause), ("POST", "/reset_prefix_cache", self._well),
                ("POST", "/update_weight_version", self._name), ("POST", "/resume", self._well),
                ("POST", "/inference/v1/generate", self._generate),
            ):  # fmt: skip
                app.router.add_route(verb, path, handler)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            started.set()

        def work():
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        threading.Thread(target=work, daemon=True).start()
        started.wait()
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    @web.middleware
    async def _note(self, request, handler):
        self.asked.append(request.path)
        while "hangs" in self.faults:
            await asyncio.sleep(0.05)
        return await handler(request)

    async def _well(self, request):
        return web.json_response({"success": True})

    async def _pause(self, request):
        """What runs is kept where it is asked for, and else broken off."""
        if request.query.get("mode", "abort") != "keep":
            self.faults.add("aborts")
        return await self._well(request)

    async def _models(self, request):
        return web.json_response({"data": [{"id": "theirs", "max_model_len": self.engine.max_length}]})

    async def _metrics(self, request):
        return web.Response(text=f"# HELP\nvllm:generation_tokens_total {len(self.asked)}\n")

    async def _tokenize(self, request):
        return web.json_response({"tokens": self.spelling.encode((await request.json())["prompt"])})

    async def _name(self, request):
        self.version = (await request.json())["new_version"]
        return web.json_response({})

    async def _call(self, request):
        body = await request.json()
        if "broken" in self.faults:
            return web.Response(status=500, text="no such method")
        if body["method"] == "slingshot_describe":
            config = {
                key: each for key, each in self.model.config.to_hf().items() if isinstance(each, int | float | str)
            }
            told = {"config": config, "dtype": "float32", "logprobs_mode": "processed_logprobs", "routed_experts": True}
            return web.json_response({"results": [told | self.about]})
        folder, version = body["args"]
        assert (Path(folder) / "STABLE").read_text() == version
        if "wedged" in self.faults:
            return web.json_response({"results": [{"error": "RuntimeError: sizes differ"}]})
        if "stale" not in self.faults:
            self.engine.update_weights(load_model(folder))
        return web.json_response({"results": [{"version": version}]})

    async def _generate(self, request):
        if self.answers is not None:
            self.answers -= 1
            if self.answers < 0:  # as where the process is killed
                request.transport.abort()
                asyncio.get_running_loop().create_task(self._runner.cleanup())
                await asyncio.sleep(1)
        body = await request.json()
        given = body["sampling_params"]
        assert given["logprobs"] == 0 and set(given["stop_token_ids"]) <= self.tokenizer.eos_ids
        params = SamplingParams(
            **{name: given[name] for name in SAME}, routed_experts=bool(self.model.config.n_moe_layers)
        )
        versions = [self.version]
        if "lasts" in self.faults:
            self.faults.remove("lasts")
            while self.version == versions[0]:
                await asyncio.sleep(0.01)
            versions.append(self.version)
        output = await asyncio.to_thread(self._make, body["token_ids"], params)
        choices = [
            {
                "index": index, "token_ids": its.token_ids,
                "finish_reason": "abort" if "aborts" in self.faults else its.finish_reason,
                "logprobs": {"content": [{"logprob": logprob} for logprob in its.logprobs]},
                "weight_versions": [{"version": "old" if "old" in self.faults else its} for its in versions],
                "routed_experts": self._experts(its.routed_experts),
            }
            for index, its in enumerate(output.outputs)
        ]  # fmt: skip
        return web.json_response({"choices": choices[::-1]})

    def _make(self, prompt, params):
        with self._turn:
            [output] = self.engine.generate([prompt], params, ["0"])
        return output

    def _experts(self, experts_TLk):
        """As vLLM tells them: of all layers, dense ones too."""
        if experts_TLk is None:
            return None
        dense = np.zeros((len(experts_TLk), self.model.config.first_k_dense_replace, experts_TLk.shape[2]), np.uint8)
        file = io.BytesIO()
        np.save(file, np.concatenate((dense, experts_TLk.numpy().astype(np.uint8)), 1))
        return base64.b64encode(file.getvalue()).decode()
