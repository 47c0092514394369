"""The behaviours of tests/serving/behaviours.py, of vLLM's and llama.cpp's servers behind slingshot.

make interop"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from interop.servers import busy, gateway
from tests.serving.behaviours import *  # noqa: F403
from tests.serving.behaviours import Served


@pytest.fixture(scope="module", params=["llama.cpp", "vllm"])
def served(
    request: pytest.FixtureRequest, deepseek: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with gateway(request.param, deepseek, "float32", tmp_path_factory.mktemp("backend")) as (url, client):
        yield Served(client, deepseek.name, lambda: busy(url))
