"""What the tests of checkpoints share: a tokenizer that every format can hold, and folders made with it."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # where file_maker and hub_server lie

from hub_server import Asker, FakeHub, contents

from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """277 ids, the last of them merges; models of these tests have 280."""
    return Tokenizer.train(["What is 3+4-2? 3足す4は7", "the quick brown fox the"] * 3, vocab_size=277)


@pytest.fixture(scope="session")
def save(make_model, tokenizer):
    """save(folder, config): make the folder, and in it a checkpoint of a model with this config."""

    def make(folder, config, seed=0, **options):
        folder.mkdir(exist_ok=True)
        save_checkpoint(folder, make_model(config, seed), tokenizer, **options)
        return folder

    return make


@pytest.fixture
def hub():
    with FakeHub() as server:
        yield server


@pytest.fixture
def ask(hub, tmp_path):
    return Asker(hub.url, tmp_path / "home")


@pytest.fixture(scope="module")
def checkpoints(save, deepseek, tmp_path_factory):
    """Two DeepSeek checkpoints of the same shape, each in three shards of about 150 kB."""
    config, folder = deepseek(vocab_size=280), tmp_path_factory.mktemp("checkpoints")
    return [save(folder / str(seed), config, seed, max_shard_size=160_000) for seed in range(2)]


@pytest.fixture
def filled(hub, checkpoints):
    """The hub's commit of org/name: the first checkpoint."""
    return hub.commit("org/name", contents(checkpoints[0]))
