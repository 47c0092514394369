"""The behaviours, of the engine in this process; interop/test_backends.py has them of the servers of others."""

import openai
import pytest

from slingshot.engine.engine import Engine
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.local import LocalBackend
from slingshot.serving.served_model import ServedModel
from tests.serving.behaviours import *  # noqa: F403
from tests.serving.behaviours import Served
from tests.serving.conftest import running


@pytest.fixture(scope="module")
def served(make_model, dense, tokenizer):
    engine = Engine(make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024)), tokenizer)
    with (
        running(create_app(Gateway([ServedModel("tiny", tokenizer, LocalBackend(engine))]))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(client, "tiny", lambda: engine.counters.running > 0)
