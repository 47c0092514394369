"""`slingshot serve CHECKPOINT...`: the HTTP API and the chat page, on this machine.

slingshot serve runs/tiny/rl_final
slingshot serve runs/tiny/base --adapter sums=runs/sums/adapter --adapter poems=runs/poems/adapter
slingshot serve Qwen/Qwen3-0.6B --engine llama.cpp
slingshot serve Qwen/Qwen3-0.6B --engine vllm --upstream http://gpu1:8000 --upstream http://gpu2:8000
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slingshot.base.errors import SlingshotError
from slingshot.cli.accounts import Prices, Where, ledger_url

if TYPE_CHECKING:
    from slingshot.serving.llama_process import LlamaProcess
    from slingshot.serving.served_model import ServedModel

Sources = Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="Folders, .gguf files, hub names.")]
Runner = Literal["slingshot", "vllm", "llama.cpp"]
KVCacheForm = Annotated[
    Literal["auto", "int8", "fp8"],
    typer.Option("--kv-cache", help="int8 or fp8: 8 bits for each number that is cached."),
]


def serve(
    sources: Sources,
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than this machine need keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 takes a free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="A LoRA adapter of it, a model of that name.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are made at once.")] = 256,
    cache_gib: Annotated[float, typer.Option(min=0.001, help="Memory of the cache of each model, GiB.")] = 1.0,
    kv_cache: KVCacheForm = "auto",
    speculation: Annotated[Literal["off", "on", "auto"], typer.Option(help="Guess tokens ahead.")] = "off",
    engine: Annotated[
        Runner,
        typer.Option(metavar="ENGINE", help="slingshot, or vllm or llama.cpp at --upstream; llama.cpp alone too."),
    ] = "slingshot",
    upstream: Annotated[list[str] | None, typer.Option(metavar="URL", help="A server that runs the model.")] = None,
    silence: Annotated[
        float, typer.Option(min=1, help="Seconds until such a server that tells nothing at all has failed.")
    ] = 60.0,
    require_key: Annotated[bool, typer.Option("--require-key", help="Ask for a key on this machine too.")] = False,
    also_reasoning: Annotated[bool, typer.Option("--also-reasoning", help="Send it as `reasoning` too.")] = False,
    apart: Annotated[bool, typer.Option("--apart", help="Keys share no cached prefixes.")] = False,
    queue_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts that may wait.")] = 1 << 18,
    first_token: Annotated[float, typer.Option(min=0.01, help="Seconds a request may wait.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers have to end in.")] = 30.0,
    access_log: Annotated[
        str | None, typer.Option(metavar="FILE", help="A JSON line per request, no texts; - is standard error.")
    ] = None,
    ledger: Where = None,
    prices: Prices = None,
) -> None:
    """Serve checkpoints: OpenAI's API with the reasoning shown, and a page to chat on. Ctrl-C ends it."""
    from slingshot.serving import accounts
    from slingshot.serving.access_log import AccessLog
    from slingshot.serving.app import create_app
    from slingshot.serving.gateway import Gateway
    from slingshot.serving.ledger import Ledger
    from slingshot.serving.load import Limits
    from slingshot.serving.server import DrainingServer, is_loopback, listening

    logging.basicConfig(level=logging.WARNING, format="slingshot: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would tell what this server tells in a line
    keyless = is_loopback(host) and not require_key
    log = None if access_log is None else AccessLog.at(access_log)
    with contextlib.ExitStack() as ends:
        listener = ends.enter_context(listening(host, port))  # before a model is loaded
        port = listener.getsockname()[1]
        book = ends.enter_context(contextlib.closing(Ledger(ledger_url(ledger), prices)))
        if not keyless and not any(row.revoked is None for row in accounts.keys(book)):
            raise SlingshotError(f"{host} is reached by others, who need keys: slingshot keys create NAME makes one")
        cache_bytes = int(cache_gib * 2**30)
        if engine == "slingshot":
            if upstream:
                raise SlingshotError("--upstream URL needs --engine vllm or --engine llama.cpp")
            options: dict[str, Any] = {
                "max_batch": max_batch, "cache_bytes": cache_bytes, "speculation": speculation, "kv_cache": kv_cache,
            }  # fmt: skip
            models = _local_models(sources, _adapters(adapter or (), sources), dtype, options)
        else:
            if kv_cache != "auto":
                raise SlingshotError("--kv-cache: of slingshot's own engine; the other has an option of its own")
            if adapter:
                raise SlingshotError("--adapter: only slingshot's own engine has adapters; leave --engine out")
            if len(sources) != 1:
                raise SlingshotError("another engine's servers have one model: name its checkpoint alone")
            source = sources[0]
            child = None
            if not upstream:
                child = ends.enter_context(_started(source, engine, dtype, max_batch, cache_bytes))
                upstream = [child.url]
            models = [_upstream_model(source, engine, upstream, silence, child)]
        gateway = Gateway(models, book, Limits(queue_tokens, first_token, drain), apart)
        hosts = frozenset({"localhost", "127.0.0.1", "[::1]", host}) if keyless else None
        server = DrainingServer(create_app(gateway, keyless, also_reasoning, hosts, log), gateway)
        for model in models:
            context = f", context of {length} tokens" if (length := model.backend.max_length) else ""
            print(f"Model      {model.name}: {model.runs}{context}")
        url, key = f"http://{f'[{host}]' if ':' in host else host}:{port}", "none" if keyless else "sk-slingshot-..."
        print(f"API        {url}/v1")
        print(f"Chat page  {url}/")
        print(f"Status     {url}/status")
        print(f"Clients    OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}")
        print(f"           ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key}")
        print("Ctrl-C stops it; answers that run come to their end first.", flush=True)
        server.run([listener])
        if gateway.failed is not None:
            raise gateway.failed


def _adapters(given: Sequence[str], sources: Sequence[str]) -> dict[str, str]:
    """Folders of adapters by the names under which they are served."""
    from slingshot.serving.served_model import names_of

    found = dict[str, str]()
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or not name or not folder or "/" in name:
            raise SlingshotError(f"--adapter {text!r:.80}: write NAME=FOLDER, a name without /")
        if name in {*found, *names_of(sources)}:
            raise SlingshotError(f"--adapter {name}: a model of this name is served already; give it another")
        found[name] = folder
    if found and len(sources) != 1:
        raise SlingshotError("--adapter: adapters stand beside one checkpoint: name it alone")
    return found


def _local_models(
    sources: Sequence[str], adapters: Mapping[str, str], dtype: str, options: Mapping[str, Any]
) -> list[ServedModel]:
    from slingshot.engine.engine import Engine
    from slingshot.recipe.origin import Origin
    from slingshot.serving.local import AdapterBackend, LocalBackend
    from slingshot.serving.served_model import ServedModel, names_of

    models = []
    for source, name in zip(sources, names_of(sources), strict=True):
        engine = Engine.load(source, dtype, **options, adapters=adapters)
        now, origin = int(time.time()), Origin.of(Path(source))
        runs = f"{str(engine.dtype).removeprefix('torch.')}, {engine.runs_on}"
        backend = LocalBackend(engine)
        models.append(ServedModel(name, engine.tokenizer, backend, now, origin, runs))
        for its, folder in adapters.items():
            beside = f"an adapter of {name}, torch"
            models.append(
                ServedModel(its, engine.tokenizer, AdapterBackend(backend, its), now, Origin.of(Path(folder)), beside)
            )
    return models


def _started(
    source: str, engine: str, dtype: str, max_batch: int, cache_bytes: int
) -> contextlib.AbstractContextManager[LlamaProcess]:
    """A server that this process starts, keeps and ends."""
    from slingshot.checkpoint.hub import locate
    from slingshot.serving.llama_process import llama_server

    if engine == "vllm":
        way = f"vllm serve {source} --enable-prompt-tokens-details --port 8001, then --upstream http://127.0.0.1:8001"
        raise SlingshotError(f"vLLM's server is not started here; start one: {way}")
    return llama_server(locate(source), dtype, max_batch, cache_bytes)


def _upstream_model(
    source: str, engine: str, urls: Sequence[str], silence: float, child: LlamaProcess | None
) -> ServedModel:
    """The one model that all of the servers have; its tokenizer is read here."""
    from slingshot.checkpoint.hub import locate
    from slingshot.checkpoint.load_save import load_tokenizer
    from slingshot.engine.vocabulary import Vocabulary
    from slingshot.serving.inference_servers import InferenceServer, LlamaServer, VllmServer
    from slingshot.serving.served_model import ServedModel, names_of
    from slingshot.serving.upstream import UpstreamBackend

    tokenizer = load_tokenizer(locate(source))
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    servers: list[InferenceServer] = [
        VllmServer(url) if engine == "vllm" else LlamaServer(url, vocabulary) for url in urls
    ]
    runs = f"{', '.join(urls)} ({engine})"
    backend = UpstreamBackend(servers, tokenizer, silence, child)
    return ServedModel(names_of([source])[0], tokenizer, backend, int(time.time()), runs=runs)
