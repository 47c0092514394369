"""An unknown caller is refused before anything of his body is read, at every door that the schema names."""

import contextlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from slingshot.serving import accounts
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import Ledger
from slingshot.serving.load import Limits
from slingshot.serving.served_model import ServedModel
from tests.serving.conftest import ScriptedBackend, running

MOST = 100_000  # bytes of a body
WRONG = "sk-slingshot-nobodys"


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory):
    """(URL, key, the doors that take a body) of a server that demands keys."""
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('keys')}/ledger.sqlite")
    model = ServedModel("tiny", tokenizer, ScriptedBackend(tokenizer.encode("7", continues=True)))
    with running(create_app(Gateway([model], ledger, Limits(body=MOST)), keyless=False)) as url:
        yield url, accounts.create(ledger, "alice"), posts(url)
    ledger.close()


def posts(url):
    """The paths that a server takes bodies at, as its schema has them."""
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    found = [path for path, methods in paths.items() if "post" in methods]
    assert len(found) >= 8
    return found


def error_of(path, text):
    """An error's type, its body being one that the clients of this path read."""
    told = json.loads(text)
    error = told["error"]
    if path.startswith("/v1/messages"):
        assert told.keys() == {"type", "error"} and told["type"] == "error" and error.keys() == {"type", "message"}
    else:
        assert told.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error["type"]


def answered(url, path, key, headers, body=b""):
    """(status, text, bytes sent) of a request whose body is sent over and over until the server hangs up."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    sent, said = 0, b""
    with socket.create_connection((host, int(port)), timeout=30.0) as wire:
        wire.sendall(f"{head}{headers}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            while body:
                sent += wire.send(body)
        with contextlib.suppress(ConnectionError):
            while part := wire.recv(1 << 16):
                said += part
    head, _, text = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), text.decode(), sent


def at_once(work, doors):
    with ThreadPoolExecutor(len(doors)) as pool:
        return list(zip(doors, pool.map(work, doors), strict=True))


def test_who_has_no_key_is_refused_though_his_body_never_comes(served):
    url, _, doors = served
    for path, (status, text, _) in at_once(lambda path: answered(url, path, WRONG, f"Content-Length: {MOST}"), doors):
        assert (status, error_of(path, text)) == (401, "authentication_error")


def test_who_has_no_key_hears_that_and_not_what_is_wrong_with_his_body(served):
    url, key, doors = served
    with httpx.Client(base_url=url, headers={"Content-Type": "application/json"}) as http:
        for path in doors:
            statuses = []
            for secret in (WRONG, "none", key):
                answer = http.post(path, content="{", headers={"Authorization": f"Bearer {secret}"})
                statuses.append(answer.status_code)
                error_of(path, answer.text)
            assert statuses == [401, 401, 400]


@pytest.mark.parametrize("known", [False, True])
def test_a_body_without_end_is_cut_early(served, known):
    url, key, doors = served
    chunk = b"1000\r\n" + b"7" * 0x1000 + b"\r\n"
    for path in doors[:4]:
        status, text, sent = answered(url, path, key if known else WRONG, "Transfer-Encoding: chunked", chunk)
        assert status == (413 if known else 401) and error_of(path, text)
        assert sent < 100 * MOST  # what buffers of the system hold, too


def test_a_body_that_is_said_to_be_too_long_is_refused_before_it_comes(served):
    url, key, doors = served
    for path, (status, text, _) in at_once(lambda path: answered(url, path, key, f"Content-Length: {MOST + 1}"), doors):
        assert status == 413 and f"{MOST} bytes" in text and error_of(path, text)


def test_who_sends_too_much_hears_why(served):
    url, key, doors = served
    for secret, status in ((key, 413), (WRONG, 401)):
        headers = {"Authorization": f"Bearer {secret}"}
        answer = httpx.post(f"{url}{doors[0]}", content=iter([b"7" * MOST] * 30), headers=headers)
        assert answer.status_code == status and answer.headers["Connection"] == "close"


def test_a_connection_goes_on_behind_a_refusal_whose_body_was_read(served):
    url, key, doors = served
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as http:
        assert "connection" not in http.post(doors[0], content="{").headers
        assert "connection" not in http.get("/v1/models").headers
        assert "connection" not in http.get("/v1/models", headers={"Authorization": "Bearer none"}).headers
