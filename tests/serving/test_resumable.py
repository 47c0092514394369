"""Answers that are left and come back to."""

import contextlib
import itertools
import time

import httpx
import pytest

from slingshot.serving import accounts
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import Ledger
from slingshot.serving.load import Limits
from slingshot.serving.served_model import ServedModel
from tests.serving.conftest import CHAT, ScriptedBackend, ids_of, running
from tests.waiting import until

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "stream": True}
TEXT = "3 plus 4 is 7.\n</think>\n\nIt is 7, for 3 plus 4 is 7."

LONG = TEXT * 50  # half a minute and more


@pytest.fixture
def serve(tokenizer):
    """serve(pause, **options of the gateway): a client of a server of TEXT, and its backend."""
    with contextlib.ExitStack() as stack:

        def make(pause, text=TEXT, **options):
            backend = ScriptedBackend([*ids_of(tokenizer, text), tokenizer.eos_id], eos_ids=tokenizer.eos_ids)
            backend.pause = pause
            app = create_app(Gateway([ServedModel("tiny", tokenizer, backend)], **options), keyless=False)
            url = stack.enter_context(running(app))
            return stack.enter_context(httpx.Client(base_url=url, timeout=30)), backend

        yield make


def events_of(response, most=None):
    """(id, its `data:` lines), `most` of them."""
    told = (line for line in response.iter_lines() if line.startswith("data: "))
    events = list(itertools.islice(told, most))
    return events[0].partition('"id":"')[2].partition('"')[0], events


def left_behind(client, most=3, **headers):
    """The id of an answer whose client left after a few events, and those."""
    with client.stream("POST", CHAT, json=BODY, headers={"X-Resumable": "1"} | headers) as response:
        return events_of(response, most)


def again(client, id, after, **headers):
    return client.get(f"{CHAT}/{id}/events", params={"after": after}, headers=headers)


def test_an_answer_goes_on_where_its_client_was_cut_off(serve):
    client, backend = serve(0.01)
    id, first = left_behind(client)
    response = again(client, id, len(first))
    _, rest = events_of(response)
    with client.stream("POST", CHAT, json=BODY) as whole:
        other, events = events_of(whole)
    assert rest[-1] == "data: [DONE]"
    untold = [event.replace(other, id).partition('"created"')[0] for event in events]
    assert [event.partition('"created"')[0] for event in first + rest] == untold
    deltas = [event.partition('"choices"')[2] for event in first + rest]
    assert deltas == [event.partition('"choices"')[2] for event in events]
    assert len(backend.asked) == 2


@pytest.mark.slow
def test_it_is_kept_for_a_while_after_its_end(serve):
    client, backend = serve(0.0, limits=Limits(resume=2.0))
    id, _ = left_behind(client, None)
    assert again(client, id, 3).text.endswith("data: [DONE]\n\n")
    time.sleep(2.5)
    assert again(client, id, 0).status_code == 404
    assert len(backend.asked) == 1


def test_nobody_coming_back_ends_it(serve):
    client, backend = serve(0.05, LONG, limits=Limits(resume=0.1))
    id, _ = left_behind(client)
    until(lambda: backend.aborted)
    assert again(client, id, 0).status_code == 404


def test_it_is_stopped_by_name(serve):
    client, backend = serve(0.05, LONG)
    id, _ = left_behind(client)
    assert client.post(f"{CHAT}/control", json={"id": id, "action": "stop"}).status_code == 200
    until(lambda: backend.aborted)
    assert client.post(f"{CHAT}/control", json={"id": id, "action": "stop"}).status_code == 404


def test_another_key_does_not_read_it_and_it_is_booked_once(serve, tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite")
    try:
        client, _ = serve(0.01, ledger=ledger)
        alice, mallory = ({"authorization": f"Bearer {accounts.create(ledger, name)}"} for name in ("alice", "mallory"))
        id, first = left_behind(client, **alice)
        assert again(client, id, 0, **mallory).status_code == 404
        assert again(client, id, len(first), **alice).status_code == 200
        until(lambda: all(row.running == 0 for row in accounts.keys(ledger)))
    finally:
        ledger.close()
