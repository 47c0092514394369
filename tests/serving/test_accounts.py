import httpx
import openai
import pytest

from slingshot.serving import accounts
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway, ServedModel
from slingshot.serving.ledger import Ledger
from slingshot.serving.prices import PICO, PriceList
from tests.serving.conftest import ScriptedBackend, ids_of, running

PRICES = PriceList.parse({"models": {"tiny": {"cache_miss": 1000, "output": 2000}}})  # dollars a million
QUESTION = [{"role": "user", "content": "What is 3+4-2?"}]


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", PRICES)
    yield ledger
    ledger.close()


@pytest.fixture
def url(ledger, tokenizer):
    ids = [*ids_of(tokenizer, "7.\n</think>\n\n5"), tokenizer.eos_id]
    model = ServedModel("tiny", tokenizer, ScriptedBackend(ids, eos_ids=tokenizer.eos_ids))
    with running(create_app(Gateway([model], ledger), keyless=False)) as url:
        yield url


def client(url, key):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def test_a_balance_falls_by_what_an_answer_cost_and_is_told(url, ledger):
    key = accounts.create(ledger, "alice", balance=1)
    usage = client(url, key).chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20).usage
    cost = (usage.prompt_tokens * 1000 + usage.completion_tokens * 2000) / 1e6
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{url}/v1/balance", headers=headers).json()["balance"] == pytest.approx(1 - cost)
    told = httpx.get(f"{url}/user/balance", headers=headers).json()
    assert told["is_available"] and told["balance_infos"][0]["total_balance"] == f"{1 - cost:.2f}"
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["price"]["output"] == 2000


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_balance_does_not_pay_for_is_refused_before_it_runs(url, ledger, stream):
    key = accounts.create(ledger, "alice", balance=0.02)
    with pytest.raises(openai.APIStatusError) as caught:
        client(url, key).chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, stream=stream)
    assert caught.value.status_code == 402 and "insufficient balance" in caught.value.body["message"]
    assert accounts.keys(ledger)[0].running == 0


def test_whoever_has_no_key_or_another_model_s_is_refused(url, ledger):
    with pytest.raises(openai.AuthenticationError):
        client(url, "none").models.list()
    other = client(url, accounts.create(ledger, "bob", models=["big"]))
    assert list(other.models.list()) == []
    with pytest.raises(openai.PermissionDeniedError):
        other.chat.completions.create(model="tiny", messages=QUESTION)


def test_a_key_that_is_revoked_opens_nothing_from_then_on(url, ledger):
    alice = client(url, accounts.create(ledger, "alice"))
    alice.models.list()
    accounts.revoke(ledger, "alice")
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        alice.models.list()


@pytest.mark.slow
@pytest.mark.parametrize("header", ["api_key", "auth_token"])
def test_anthropic_s_clients_bring_their_key_in_either_header(url, ledger, header):
    import anthropic

    def asked(key):
        claude = anthropic.Anthropic(base_url=url, max_retries=0, **{header: key})
        return claude.messages.create(model="tiny", messages=QUESTION, max_tokens=20)

    usage = asked(accounts.create(ledger, "alice", balance=1)).usage
    cost = (usage.input_tokens * 1000 + usage.output_tokens * 2000) / 1e6
    assert accounts.keys(ledger)[0].balance / PICO == pytest.approx(1 - cost)
    with pytest.raises(anthropic.AuthenticationError) as caught:
        asked("none")
    assert caught.value.body["error"]["type"] == "authentication_error"
    with pytest.raises(anthropic.APIStatusError) as caught:
        asked(accounts.create(ledger, "bob", balance=0.01))
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (402, "billing_error")
