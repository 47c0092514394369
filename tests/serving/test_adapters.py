"""Adapters beside a served base: models of their own by name, answers and bills of their own, and one engine."""

import httpx
import pytest
import torch

from slingshot.checkpoint.adapter import write_adapter
from slingshot.engine.engine import Engine
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import Ledger
from slingshot.serving.ledger_tables import REQUESTS
from slingshot.serving.local import AdapterBackend, LocalBackend
from slingshot.serving.prices import PriceList
from slingshot.serving.served_model import ServedModel
from slingshot.training.lora import LoRAConfig, adapters, add_lora, twin
from slingshot.training.parallel import Parallel
from tests.serving.conftest import running

PRICES = PriceList.parse({"models": {"*": {"output": 100}, "sums": {"output": 700}}})


@pytest.fixture
def folder(engine, tmp_path):
    """An adapter of the small random model."""
    changed = twin(engine.model)
    add_lora(changed, LoRAConfig(rank=4), 0, Parallel())
    for name, each in adapters(changed).items():
        if name.endswith("lora_B"):
            each.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", adapters(changed), 4, 32, "the model")
    return tmp_path / "adapter"


def test_an_adapter_is_a_model_with_answers_and_a_bill_of_its_own(engine, tokenizer, folder, tmp_path):
    backend = LocalBackend(Engine(engine.model, tokenizer, adapters={"sums": folder}))
    models = [ServedModel("tiny", tokenizer, backend), ServedModel("sums", tokenizer, AdapterBackend(backend, "sums"))]
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}", PRICES)
    body = {"prompt": "What is 3+4-2?", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    said = {}
    with running(create_app(Gateway(models, ledger))) as url:
        assert [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]] == ["tiny", "sums"]
        for name in ("tiny", "sums", "tiny"):
            answer = httpx.post(f"{url}/v1/completions", json=body | {"model": name}).json()
            assert answer["model"] == name and said.setdefault(name, answer["choices"]) == answer["choices"]
    assert said["tiny"] != said["sums"]
    with ledger.transaction() as connection:
        rows = connection.execute(REQUESTS.select()).all()
    costs = [(row.model, row.completion, row.cost) for row in rows]
    assert sorted((model, tokens) for model, tokens, _ in costs) == [("sums", 9), ("tiny", 9), ("tiny", 9)]
    by_name = {model: cost for model, _, cost in costs}
    assert by_name["sums"] == 7 * by_name["tiny"] > 0
    ledger.close()
