"""What the rollout's tests share: a tokenizer with R1's template, and the shape of a model that is not there."""

import pytest

from slingshot.rollout.sampler import ScriptedSampler
from slingshot.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["What is 3+4? 3 plus 4 is 7. 3足す4は7"], vocab_size=280)


@pytest.fixture(scope="session")
def saying(tokenizer, dense):
    """saying(script, length=256): a sampler of a model that holds `length` tokens and says the script."""

    def make(script, length=256):
        return ScriptedSampler(script, tokenizer, dense(vocab_size=300, max_position_embeddings=length))

    return make
