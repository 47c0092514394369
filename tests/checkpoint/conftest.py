"""What the tests of checkpoints share: a tokenizer that every format can hold, and folders made with it."""

import sys
from pathlib import Path

import pytest

from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.text.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parent))  # where file_maker and hub_server lie


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
