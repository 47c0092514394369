"""A cache of 8 bits: what an entry loses, what fits, and that the engine over it is the model over rounded entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.native_runner import NativeRunner
from slingshot.engine.runner import TorchRunner
from slingshot.engine.sampling import SamplingParams
from slingshot.kernels.attention import attention_reference
from slingshot.kernels.native import native_kernels
from slingshot.model.config import ModelConfig
from slingshot.model.context import Context

from .asking import LEVELS, PAGES, logits_in_pieces, prompts_of, token_ids
from .test_scheduler import SIX, run

FORMS = ["int8", "fp8"]


class RoundedContext(Context):
    """One sequence, all of it at once, every entry as the cache would give it back."""

    absorb = True

    def __init__(self, cache, ids_1T):
        super().__init__(cache.config, torch.arange(ids_1T.shape[1])[None])
        self._cache, self._mask_1TT = cache, torch.ones(1, *2 * ids_1T.shape[1:], dtype=torch.bool).tril()

    def attend(self, layer, q_XHW, k_XGW, v_XGV, scale):
        k, v = (
            each if isinstance(each, int) else self._cache.computed(self._cache.kept(each[0]), each.dtype)[None]
            for each in (k_XGW, v_XGV)
        )
        return attention_reference(q_XHW, k, k[..., :v] if isinstance(v, int) else v, self._mask_1TT, scale)


class RoundedModel:
    """The model's plain forward pass over rounded entries."""

    def __init__(self, model, form):
        self.model, self.config = model, model.config
        self.cache = KVCache(model.config, 1, torch.float32, form=form)

    def __call__(self, ids_1T):
        return self.model(ids_1T, context=RoundedContext(self.cache, ids_1T))


@pytest.fixture(scope="module", params=["dense", "deepseek_v3"])
def wide_model(request, make_model, dense, deepseek, tokenizer):
    """Heads that the compiled kernels take."""
    mla = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}
    make, shape = (deepseek, mla) if request.param == "deepseek_v3" else (dense, {"head_dim": 24})
    return make_model(make(vocab_size=tokenizer.vocab_size, max_position_embeddings=256, **shape))


@pytest.mark.parametrize("form", FORMS)
def test_an_entry_is_off_by_what_its_form_says(model, form):
    cache = KVCache(model.config, 1, torch.float32, form=form)
    latent = model.config.family != "dense"
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim if latent else model.config.head_dim
    rounded = model.config.kv_lora_rank if latent else width
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(50, 2, width, generator=generator) * torch.logspace(-3, 3, 50)[:, None, None]
    entries[7] = 0.0
    error = (cache.computed(cache.kept(entries), torch.float32) - entries).abs()
    assert not error[..., rounded:].any() and error[..., :rounded].any()
    numbers = entries[..., :rounded].abs()
    largest = numbers.amax(-1, keepdim=True) * 1.01  # the scale is a bfloat16 number
    bound = largest / 254 if form == "int8" else (numbers / 16).maximum(largest / 448 / 1024)
    assert (error[..., :rounded] <= bound).all()
    entries[3, 1, 0] = torch.nan
    assert cache.computed(cache.kept(entries), torch.float32)[3, 1].isnan().any()


@pytest.mark.parametrize(("preset", "times"), [("qwen3-0.6b", 1.97), ("deepseek-v3", 1.79)])
def test_nearly_twice_the_tokens_fit_into_the_same_memory(preset, times):
    """MLA keeps 64 of its 576 numbers in 16 bits."""
    config = ModelConfig.preset(preset)
    sizes = [KVCache.page_bytes(config, torch.bfloat16, form=form) for form in ("auto", *FORMS)]
    assert sizes[1] == sizes[2] and sizes[0] / sizes[1] == pytest.approx(times, abs=0.01)


def test_the_engine_has_the_room(make_model, dense, tokenizer):
    """Heads of 64 numbers: 66 bytes instead of 128."""
    model = make_model(dense(vocab_size=tokenizer.vocab_size, head_dim=64, max_position_embeddings=4096))
    budget = 101 * KVCache.page_bytes(model.config, torch.bfloat16)
    engines = [Engine(model, tokenizer, dtype=torch.bfloat16, cache_bytes=budget, kv_cache=f) for f in ("auto", "int8")]
    assert [engine.max_length for engine in engines] == [100 * 16, (101 * 128 // 66 - 1) * 16]
    assert engines[1].runs_on == f"{engines[0].runs_on}, int8 cache"


@pytest.mark.parametrize("level", [*LEVELS, "off"])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=5)
@given(data=st.data())
def test_sequences_in_any_pieces_give_the_logits_of_the_model_over_rounded_entries(wide_model, form, level, data):
    """But where a number lies so near to the middle between two that the last bits of its sum decide."""
    model, kernels = wide_model, native_kernels(level)
    cache = KVCache(model.config, PAGES, torch.float32, form=form, mtp=model.config.num_nextn_predict_layers > 0)
    for layer in cache.layers:
        layer.fill_(66)  # what earlier sequences left: numbers of about their sizes
    runner = TorchRunner(model, cache) if kernels is None else NativeRunner(model, cache, kernels)
    pairs = logits_in_pieces(runner, RoundedModel(model, form), data)
    differences = torch.stack([(found_V - expected_V).abs().max() for found_V, expected_V in pairs])
    assert differences.median() < 5e-3 and differences.max() < 0.1


def test_rounding_changes_the_logits_by_little(model):
    ids = torch.tensor(prompts_of(80))
    plain = model(ids).logits_BTV.log_softmax(-1)
    for form, most in (("int8", 1e-3), ("fp8", 2e-2)):
        rounded = RoundedModel(model, form)(ids).logits_BTV.log_softmax(-1)
        kl = (plain.exp() * (plain - rounded)).sum(-1).mean()
        assert 0 < kl < most


def test_preemption_changes_no_token(model, tokenizer):
    """In a cache of 11 pages."""
    params = SamplingParams(max_tokens=60, n=2, seed=8)
    alone = [Engine(model, tokenizer, kv_cache="int8").generate([prompt], params)[0] for prompt in SIX[:3]]
    budget = 12 * KVCache.page_bytes(model.config, torch.float32, form="int8")
    engine = Engine(model, tokenizer, cache_bytes=budget, kv_cache="int8")
    assert token_ids(run(engine, SIX[:3], [params] * 3)) == token_ids(alone)
    assert engine.counters.preemptions > 0 == engine.counters.pages_used


def test_prefixes_are_reused_and_an_abort_leaves_the_others_alone(model, tokenizer):
    engine, params = Engine(model, tokenizer, kv_cache="int8"), SamplingParams(max_tokens=20, n=2, seed=3)
    (prompt,) = prompts_of(50)
    first = engine.generate([prompt], params)
    assert token_ids(engine.generate([prompt], params)) == token_ids(first)
    assert engine.counters.cached == 48
    kept, gone = (engine.add(each, params) for each in (prompt, prompts_of(33)[0]))
    engine.step()
    engine.abort(gone)
    outputs = []
    while engine.unfinished:
        outputs += engine.step()
    assert token_ids(outputs) == token_ids(first) and outputs[0].request_id == kept


def test_a_form_that_there_is_not_is_refused(dense_model, tokenizer):
    with pytest.raises(SlingshotError, match="kv_cache 'int4': choose auto, int8, fp8"):
        Engine(dense_model, tokenizer, kv_cache="int4")
