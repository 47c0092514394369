"""A server on loopback in a thread of the test, over a scripted backend or a real engine, and clients for it."""

import asyncio
import contextlib
import threading

import openai
import pytest
import uvicorn

from slingshot.engine.engine import Engine
from slingshot.serving.app import create_app
from slingshot.serving.backend import TokenDelta
from slingshot.serving.gateway import Gateway
from slingshot.serving.local import LocalBackend
from slingshot.serving.served_model import ServedModel
from slingshot.serving.server import listening
from slingshot.text.tokenizer import Tokenizer

TEXTS = [
    "What is 3+4-2? 3 plus 4 is 7, 7 minus 2 is 5.",
    "3+4-2はいくつ? 3足す4は7、7引く2は5。",
    "The end. Stop here, then go on until the end.",
]


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS * 20, vocab_size=300)


class ScriptedBackend:
    """Says the ids of its script, `chunk` at a time, whatever it is asked; `asked` has what that was."""

    obstacle = None

    def __init__(self, ids, chunk=1, max_length=4096, eos_ids=frozenset()):
        self.ids, self.chunk, self.max_length, self._eos_ids = list(ids), chunk, max_length, eos_ids
        self.asked, self.aborted = [], 0

    async def start(self):
        pass

    async def generate(self, generation):
        self.asked.append(generation)
        ids = self.ids[: generation.params.max_tokens]
        try:
            for start in range(0, len(ids), self.chunk):
                await asyncio.sleep(0)
                part = ids[start : start + self.chunk]
                last = start + self.chunk >= len(ids)
                reason = ("stop" if part[-1] in self._eos_ids else "length") if last else None
                yield TokenDelta(part, [-0.5] * len(part), 0, reason)
        except GeneratorExit:
            self.aborted += 1
            raise

    async def close(self):
        pass


@contextlib.contextmanager
def running(app):
    """The app on a free port of loopback: its URL."""
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def engine(tokenizer, make_model, dense):
    return Engine(make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)), tokenizer)


@pytest.fixture(scope="session")
def served(engine, tokenizer):
    """The URL of a server of a small random model, called "tiny"."""
    with running(create_app(Gateway([ServedModel("tiny", tokenizer, LocalBackend(engine))]))) as url:
        yield url


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def says(tokenizer):
    """says(text or ids, chunk=1): an openai client of a server whose model "tiny" says this and ends."""
    with contextlib.ExitStack() as stack:

        def make(script, **options):
            ids = script if isinstance(script, list) else [*ids_of(tokenizer, script), tokenizer.eos_id]
            backend = ScriptedBackend(ids, eos_ids=tokenizer.eos_ids, **options)
            url = stack.enter_context(running(create_app(Gateway([ServedModel("tiny", tokenizer, backend)]))))
            client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
            client.backend = backend
            return client

        yield make


def ids_of(tokenizer, text):
    """Ids of what a model says: tags of its reasoning are its control tokens."""
    ids = []
    for place, part in enumerate(text.split("</think>")):
        ids += [tokenizer.end_think_id] * (place > 0) + tokenizer.encode(part, continues=True)
    return ids
