"""What a server takes on, and that nothing of a request is left behind when it ends, however it ends."""

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from slingshot.engine.engine import Engine
from slingshot.serving import accounts
from slingshot.serving.app import create_app
from slingshot.serving.errors import ApiError
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import LOCAL, Account, Ledger
from slingshot.serving.load import Limits, WaitingRoom
from slingshot.serving.local import LocalBackend
from slingshot.serving.served_model import ServedModel
from slingshot.serving.server import DrainingServer, listening
from slingshot.text.tokenizer import Tokenizer
from tests.serving.conftest import BODY, CHAT, ScriptedBackend, ids_of, running
from tests.waiting import PATIENCE, until


class Slow(ScriptedBackend):
    """Takes its time before every token; `pause` None: forever."""

    def __init__(self, tokenizer, text, pause):
        super().__init__([*ids_of(tokenizer, text), tokenizer.eos_id], eos_ids=tokenizer.eos_ids)
        self.pause = pause

    async def generate(self, generation):
        await (asyncio.Event().wait() if self.pause is None else asyncio.sleep(self.pause))
        async for delta in super().generate(generation):
            yield delta
            await asyncio.sleep(self.pause)


@pytest.fixture
def serve():
    """serve(model, **options of the gateway): an httpx client of a server of it."""
    with contextlib.ExitStack() as stack:

        def make(model, hosts=None, keyless=True, **options):
            url = stack.enter_context(running(create_app(Gateway([model], **options), keyless=keyless, hosts=hosts)))
            return stack.enter_context(httpx.Client(base_url=url, timeout=30))

        yield make


def test_a_queue_is_bounded_in_tokens_and_a_key_has_half_of_it():
    now = [0.0]
    room, alice, bob = WaitingRoom(100, clock=lambda: now[0]), Account("a", "alice"), Account("b", "bob")
    room.enter(1000, LOCAL).leave()  # where nobody waits, one may always
    first = room.enter(40, alice)
    with pytest.raises(ApiError) as caught:
        room.enter(20, alice)
    assert caught.value.status == 429
    room.enter(60, bob)
    with pytest.raises(ApiError) as caught:
        room.enter(1, LOCAL)
    assert caught.value.status == 503 and caught.value.headers["Retry-After"] == "1"
    first.leave(served=True)
    first.leave(served=True)
    assert room.tokens == 60
    now[0] = 8.0  # 40 tokens were served in it
    with pytest.raises(ApiError) as caught:
        room.enter(50, LOCAL)
    assert caught.value.retry_after == 12


@pytest.mark.parametrize("streamed", [False, True])
def test_who_waits_too_long_for_the_first_token_is_told_so(serve, tokenizer, streamed):
    limits = Limits(first_token=0.2)
    http = serve(ServedModel("tiny", tokenizer, Slow(tokenizer, "5", None)), limits=limits)
    answer = http.post(CHAT, json=BODY | {"stream": streamed})
    assert answer.status_code == 503 and "0.2 seconds" in answer.json()["error"]["message"]
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_full_queue_refuses_until_there_is_room_again(serve, tokenizer):
    http = serve(ServedModel("tiny", tokenizer, Slow(tokenizer, "5", None)), limits=Limits(queue_tokens=20))
    with socket.create_connection((http.base_url.host, http.base_url.port)) as waiting:
        body = json.dumps(BODY)
        waiting.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode())
        waiting.sendall(f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        statuses = []

        def refused():
            with contextlib.suppress(httpx.ReadTimeout):
                statuses.append(http.post(CHAT, json=BODY, timeout=0.2).status_code)
            return 503 in statuses

        until(refused)

    def admitted():
        with contextlib.suppress(httpx.ReadTimeout):
            http.post(CHAT, json=BODY, timeout=0.2)
            return False
        return True

    until(admitted)  # it waits instead of being refused


def test_bodies_and_names_are_held_to_their_limits(serve, tokenizer):
    model = ServedModel("tiny", tokenizer, Slow(tokenizer, "5", 0.0))
    http = serve(model, limits=Limits(body=1000), hosts=frozenset({"127.0.0.1"}))
    long = json.dumps(BODY | {"padding": "7" * 1000}).encode()
    for content in (long, iter([long[:500], long[500:]])):  # the second one is chunked
        answer = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]
    assert http.post(CHAT, json=BODY).status_code == 200
    foreign = http.get("/v1/models", headers={"Host": "evil.example:80"})
    assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "unknown_host"
    for answer in (foreign, http.get("/health"), http.get("/nowhere")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert "access-control-allow-origin" not in answer.headers
    assert http.get("/nowhere").json()["error"]["type"] == "not_found_error"


def test_long_texts_hold_nobody_up(serve, tokenizer, monkeypatch):
    """While they are tokenized, and while chats are rendered in turn, others are answered."""
    http = serve(ServedModel("tiny", tokenizer, Slow(tokenizer, "5", 0.0)))
    began, answered = threading.Event(), threading.Event()

    def held(function):
        def encode(*given, **options):
            began.set()
            assert answered.wait(PATIENCE)
            return function(*given, **options)

        return encode

    for name in ("encode", "encode_raw", "encode_chat"):
        monkeypatch.setattr(Tokenizer, name, held(getattr(Tokenizer, name)))
    long = "7+8 " * 10_000
    chat = BODY | {"messages": [{"role": "user", "content": long}]}
    for path, *bodies in (("/tokenize", {"prompt": long}, {"prompt": "7+8"}), (CHAT, chat, BODY)):
        began.clear()
        answered.clear()
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(http.post, path, json=bodies[0])]
            try:
                assert began.wait(PATIENCE)
                asked.append(pool.submit(http.post, path, json=bodies[1]))  # a short one waits aside, too
                for _ in range(10):
                    assert http.get("/health").status_code == 200
                assert not any(each.done() for each in asked)
            finally:
                answered.set()
            assert asked[1].result().status_code == 200


class SlowEngine(Engine):
    def advance(self):
        time.sleep(0.01)
        super().advance()


@pytest.fixture
def slow_engine(tokenizer, make_model, dense):
    model = make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=512))
    return SlowEngine(model, tokenizer, step_tokens=2)


@pytest.mark.parametrize("streamed", [False, True])
def test_who_hangs_up_stops_the_answer(serve, slow_engine, tokenizer, streamed):
    http = serve(ServedModel("tiny", tokenizer, LocalBackend(slow_engine)))
    with contextlib.suppress(httpx.ReadTimeout):
        body = BODY | {"stream": streamed, "max_tokens": 400, "logit_bias": {str(id): -100 for id in tokenizer.eos_ids}}
        with http.stream("POST", CHAT, json=body, timeout=2.0) as answer:
            for _, _ in zip(answer.iter_lines(), range(20), strict=False):
                pass
    until(lambda: not slow_engine.counters.running and not slow_engine.counters.waiting)
    assert slow_engine.counters.pages_used == 0 and 0 < slow_engine.counters.decoded < 300


@pytest.mark.parametrize("streamed", [False, True])
def test_who_hangs_up_before_the_first_token_stops_the_prompt(serve, slow_engine, tokenizer, streamed):
    http = serve(ServedModel("tiny", tokenizer, LocalBackend(slow_engine)))
    long = [{"role": "user", "content": "7" * 480}]
    with pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=BODY | {"messages": long, "stream": streamed}, timeout=0.1)
    until(lambda: slow_engine.counters.prefilled and not slow_engine.counters.running)
    assert slow_engine.counters.prefilled < 480 and not slow_engine.counters.decoded
    assert slow_engine.counters.pages_used == 0


def test_a_server_that_stops_ends_its_answers_first(tokenizer):
    gateway = Gateway([ServedModel("tiny", tokenizer, Slow(tokenizer, "3 plus 4\n</think>\n\n5", 0.05))])
    server = DrainingServer(create_app(gateway), gateway)
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        http = httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        with http, http.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            assert http.get("/ready").json() == {"status": "not ready", "reason": "stopping"}
            refused = http.post(CHAT, json=BODY)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            rest = "\n".join(lines)
        thread.join(10)
    assert not thread.is_alive() and '"content":"5"' in rest and rest.strip().endswith("[DONE]")


@pytest.mark.parametrize("ends", ["whole", "streamed", "hung up"])
def test_every_request_is_booked_once_however_it_ends(serve, tokenizer, tmp_path, ends):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite")
    key = accounts.create(ledger, "alice", concurrency=1)
    backend = Slow(tokenizer, "3 plus 4 is 7, 7 minus 2 is 5.\n</think>\n\n5", 0.02)
    http = serve(ServedModel("tiny", tokenizer, backend), ledger=ledger, keyless=False)
    assert http.post(CHAT, json=BODY).status_code == 401
    http.headers["Authorization"] = f"Bearer {key}"
    if ends == "whole":
        usage = http.post(CHAT, json=BODY).json()["usage"]
        assert usage["completion_tokens"] == len(backend.ids)
    else:
        with http.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
            lines = answer.iter_lines()
            [next(lines) for _ in range(9)]
            if ends == "streamed":
                list(lines)

    def alice():
        [row] = accounts.keys(ledger)
        return row

    until(lambda: not alice().running)
    booked = alice().minute_tokens - len(backend.asked[0].prompt_ids)
    assert booked == len(backend.ids) if ends != "hung up" else 0 < booked < len(backend.ids)
    assert http.post(CHAT, json=BODY | {"max_tokens": 1}).status_code == 200
    ledger.close()
