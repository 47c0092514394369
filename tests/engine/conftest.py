"""What the engine's tests share: a small tokenizer, random models of both families, and one that says a script."""

import pytest
import torch

from slingshot.engine.engine import Engine
from slingshot.engine.row_sampler import RowSampler
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.sequence import Request
from slingshot.engine.vocabulary import Vocabulary
from slingshot.model.transformer import Transformer
from slingshot.text.tokenizer import Tokenizer

TEXTS = [
    "What is 3+4-2? 3 plus 4 is 7, 7 minus 2 is 5.",
    "3+4-2はいくつ? 3足す4は7、7引く2は5。",
    "The end. Stop here, then go on until the end.",
]


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS * 20, vocab_size=300)


@pytest.fixture(scope="session", params=["deepseek_v3", "dense"])
def model(request, tokenizer, make_model, deepseek, dense):
    make = deepseek if request.param == "deepseek_v3" else dense
    return make_model(make(vocab_size=tokenizer.vocab_size, max_position_embeddings=256))


@pytest.fixture(scope="session")
def dense_model(tokenizer, make_model, dense):
    return make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256))


class HalfSure(Transformer):
    """Logits of which a part is the same everywhere: its MTP module guesses right now and then."""

    sure = 0.8

    def lm_logits(self, hidden):
        logits = super().lm_logits(hidden)
        fixed = 3 * torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3))
        return self.sure * fixed + (1 - self.sure) * logits


@pytest.fixture(scope="session")
def guesser(make_model, deepseek, tokenizer):
    config = deepseek(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    model = HalfSure(config)
    model.load_state_dict(make_model(config).state_dict())
    return model


class ScriptedModel(Transformer):
    """Whatever it reads, its n-th token after a prompt of two and more is the script's n-th."""

    script = ()
    step = 0

    def forward(self, tokens_N, **options):
        self.step = 0 if len(tokens_N) > 1 else self.step + 1
        return super().forward(tokens_N, **options)

    def lm_logits(self, hidden):
        logits = torch.full((*hidden.shape[:-1], self.config.vocab_size), -1e4)
        logits[..., self.script[self.step]] = 0.0
        return logits


@pytest.fixture
def scripted(dense_model, tokenizer):
    """scripted(ids): an engine whose model says these ids, then ends."""

    def make(ids, **options):
        model = ScriptedModel(dense_model.config)
        model.init_weights(torch.Generator().manual_seed(0))
        model.script = [*ids, *[tokenizer.eos_id] * 300]
        return Engine(model, tokenizer, **options)

    return make


@pytest.fixture
def asked(tokenizer):
    """A prompt that ends in an open reasoning."""
    return tokenizer.encode_chat([{"role": "user", "content": "3+4-2"}])


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, tokenizer.vocab_size)


@pytest.fixture
def say(vocabulary):
    """say([(prompt, script, params), ...]): completions where the model wants the script's n-th token in place n.

    All run in one batch without a model. Other tokens are far less likely, and differ.
    """

    def run(requests):
        others_V = torch.rand(vocabulary.size, generator=torch.Generator().manual_seed(0)) - 50
        made = [
            Request(number, prompt, SamplingParams(**params), "key", 100_000, vocabulary, False)
            for number, (prompt, _, params) in enumerate(requests)
        ]
        scripts = {request.request_id: script for request, (_, script, _) in zip(made, requests, strict=True)}
        running, sampler = [sequence for request in made for sequence in request.sequences], RowSampler()
        while running:
            logits_RV = others_V.repeat(len(running), 1)
            for row, sequence in enumerate(running):
                script = scripts[sequence.request.request_id]
                place = len(sequence.token_ids)
                logits_RV[row, script[place] if place < len(script) else vocabulary.tokenizer.eos_id] = 0.0
            drawn = zip(running, *sampler.draw(logits_RV, running), strict=True)
            running = [sequence for sequence, token_id, logprob in drawn if not sequence.push(token_id, logprob)]
        return [request.output() for request in made]

    return run
