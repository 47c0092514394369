"""A server on loopback in a thread of the test, over a scripted backend or a real engine, and clients for it."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import sqlalchemy as sa
import uvicorn

from slingshot.engine.engine import Engine
from slingshot.serving.app import create_app
from slingshot.serving.backend import TokenDelta
from slingshot.serving.gateway import Gateway
from slingshot.serving.local import LocalBackend
from slingshot.serving.served_model import ServedModel
from slingshot.serving.server import listening
from slingshot.text.tokenizer import R1_CONFIG, R1_TOKENS, Tokenizer
from tests.serving.postgres import PostgresServer, find
from tests.waiting import PATIENCE

pytest.register_assert_rewrite("tests.serving.behaviours")

# A busy machine may answer later than within the five seconds httpx waits of itself.
httpx._config.DEFAULT_TIMEOUT_CONFIG.read = PATIENCE

TEXTS = [
    "What is 3+4-2? 3 plus 4 is 7, 7 minus 2 is 5.",
    "3+4-2はいくつ? 3足す4は7、7引く2は5。",
    "The end. Stop here, then go on until the end.",
]


# Qwen's layout: tools first, calls between tags, results in a user's turn; earlier reasoning is left out.
TEMPLATE = """\
{%- if tools %}
    {{- '<｜User｜>tools: ' }}
    {%- for tool in tools %}{{ tool.function.name }} <tool_call></tool_call>{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<｜Assistant｜>' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- '<｜User｜>' + ('result: ' if message.role == 'tool' else '') + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "What is 3+4-2?"}]}
CHAT = "/v1/chat/completions"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name":  "weather", "arguments": {"city": "Paris"}}\n</tool_call>'  # two spaces: the model's own


@pytest.fixture(scope="module")
def postgres():
    """A real server of this module's own."""
    if (programs := find()) is None:
        pytest.skip("PostgreSQL is not installed")
    server = PostgresServer(programs)
    yield server
    server.stop()


@pytest.fixture
def database(postgres):
    """That server, with nothing in it."""
    with sa.create_engine(postgres.url).begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    yield postgres
    postgres.thaw()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS * 20, vocab_size=300)


class ScriptedBackend:
    """Says the ids of its script, `chunk` at a time, whatever it is asked; `asked` has what that was."""

    obstacle = counters = None

    def __init__(self, ids, chunk=1, max_length=4096, eos_ids=frozenset()):
        self.ids, self.chunk, self.max_length, self._eos_ids = list(ids), chunk, max_length, eos_ids
        self.asked, self.aborted = [], 0
        self.pause, self.fails_after = 0.0, None  # seconds before each delta; ids before it breaks

    async def start(self):
        pass

    async def generate(self, generation):
        self.asked.append(generation)
        ids = self.ids[: generation.params.max_tokens]
        try:
            for start in range(0, len(ids), self.chunk):
                await asyncio.sleep(self.pause)
                if self.fails_after is not None and start >= self.fails_after:
                    raise RuntimeError("broken")
                part = ids[start : start + self.chunk]
                last = start + self.chunk >= len(ids)
                reason = ("stop" if part[-1] in self._eos_ids else "length") if last else None
                yield TokenDelta(part, [-0.5] * len(part), 0, reason)
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted += 1
            raise

    async def close(self):
        pass


class Server(uvicorn.Server):
    """uvicorn's, which sees within 10 ms, not 100, that it is to end."""

    async def main_loop(self):
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def running(app):
    """The app on a free port of loopback: its URL."""
    with listening("127.0.0.1", 0) as listener:
        server = Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving(tokenizer, backend, *ledger, keyless=True, **options):
    """A server whose model "tiny" this backend is, on a free port: its URL."""
    gateway = Gateway([ServedModel("tiny", tokenizer, backend)], *ledger)
    with running(create_app(gateway, keyless, **options)) as url:
        yield url


@contextlib.contextmanager
def talking(*given, **options):
    """An openai client of such a server."""
    with (
        serving(*given, **options) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def at_once(count, work):
    """What work(0), work(1) ... return, begun at one moment in threads of their own."""
    barrier = threading.Barrier(count)

    def one(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.fixture(scope="session")
def engine(tokenizer, make_model, dense):
    return Engine(make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)), tokenizer)


@pytest.fixture(scope="session")
def served(engine, tokenizer):
    """The URL of a server of a small random model, called "tiny"."""
    with serving(tokenizer, LocalBackend(engine)) as url:
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
            client = stack.enter_context(talking(tokenizer, backend))
            client.backend = backend
            return client

        yield make


def ids_of(tokenizer, text):
    """Ids of what a model says: tags of its reasoning are its control tokens."""
    ids = []
    for place, part in enumerate(text.split("</think>")):
        ids += [tokenizer.end_think_id] * (place > 0) + tokenizer.encode(part, continues=True)
    return ids


@pytest.fixture(scope="session")
def caller():
    return calling_tokenizer()


def calling_tokenizer():
    """A tokenizer whose template knows tools."""
    plain = Tokenizer.train(TEXTS * 20, 300)
    description = plain.description()
    vocab = description["model"]["vocab"] | {t["content"]: t["id"] for t in description["added_tokens"]}
    tags = ["<tool_call>", "</tool_call>"]
    vocab |= {tag: plain.vocab_size + place for place, tag in enumerate(tags)}
    merges = [tuple(pair) for pair in description["model"]["merges"]]
    return Tokenizer.from_bpe(
        vocab, merges, R1_TOKENS | dict.fromkeys(tags, False), R1_CONFIG | {"chat_template": TEMPLATE}
    )


def said(tokenizer, text):
    """Ids of what a model writes, tags as control tokens."""
    ids, tags = [], ["<tool_call>", "</tool_call>", "</think>"]
    while text:
        found = [(text.index(tag), tag) for tag in tags if tag in text]
        start, tag = min(found, default=(len(text), ""))
        ids += tokenizer.encode(text[:start], continues=True) if start else []
        ids += [tokenizer.control_id(tag)] if tag else []
        text = text[start + len(tag) :]
    return [*ids, tokenizer.eos_id]


# What a model with tools may say: calls behind the answer; in the reasoning, which goes on; before the answer's end.
ORDERS = [
    f"Look it up.\n</think>\n\nOne moment.\n{CALL}\n{CALL}",
    f"Look it up.\n{CALL}\nThat is all.\n</think>\n\nWait.",
    f"Look it up.\n</think>\n\nOne moment.\n{CALL}\nAnd then?",
]


@pytest.fixture
def calls(caller):
    ids = said(caller, ORDERS[0])
    backend = ScriptedBackend(ids, eos_ids=caller.eos_ids)
    with talking(caller, backend) as client:
        client.backend = backend
        yield client


@pytest.fixture
def anthropic_of():
    """anthropic_of(client): a client of Anthropic's API for the same server as an openai client's."""
    import anthropic  # only here and in two tests: it takes seconds

    with contextlib.ExitStack() as stack:

        def make(client):
            url = str(client.base_url).removesuffix("/v1/")
            return stack.enter_context(anthropic.Anthropic(base_url=url, api_key="none", max_retries=0))

        yield make
