"""The behaviours, of the engine in this process; interop/test_backends.py has them of the servers of others."""

import pytest

from slingshot.engine.engine import Engine
from slingshot.serving.local import LocalBackend
from tests.serving.behaviours import *  # noqa: F403
from tests.serving.behaviours import Served
from tests.serving.conftest import talking


@pytest.fixture(scope="module")
def served(make_model, dense, tokenizer):
    engine = Engine(make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024)), tokenizer)
    with talking(tokenizer, LocalBackend(engine)) as client:
        yield Served(client, "tiny", lambda: engine.counters.running > 0)
