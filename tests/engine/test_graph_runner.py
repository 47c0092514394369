"""Steps rounded up to buckets against the runner that takes them as they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.engine.batch import PAGE, FlatBatch
from slingshot.engine.draw import DrawParams, sample
from slingshot.engine.graph_runner import PIECE, GraphRunner
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.runner import TorchRunner
from slingshot.engine.sampling import SamplingParams
from slingshot.model.dispatch import through_all

PAGES = 60
LONGEST = 20 * PAGE  # three sizes of block tables


def cache_of(model, filling):
    cache = KVCache(model.config, PAGES, torch.float32, mtp=model.config.num_nextn_predict_layers > 0)
    for layer in cache.layers:
        layer.fill_(filling)  # whatever an earlier sequence left
    return cache


def assert_same_pages(one, other):
    """But for page 0, nobody's."""
    for found, expected in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(found[1:], expected[1:], atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["deepseek_v3", "dense"])
def long_model(request, make_model, deepseek, dense):
    make = {"deepseek_v3": deepseek, "dense": dense}[request.param]
    return make_model(make(vocab_size=300, max_position_embeddings=LONGEST))


@settings(max_examples=8)
@given(data=st.data())
@torch.inference_mode()
def test_buckets_give_what_the_torch_runner_gives(long_model, data):
    """Rows that decode, drafts and short pieces, tables that grow past a bucket, rows that come and go, prompts between
    them: logits, hidden states, experts and what is in the cache."""
    lengths = data.draw(st.lists(st.integers(2, LONGEST - 30), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(sum(lengths))
    pages = data.draw(st.permutations(range(1, PAGES)))
    tables = [[pages.pop() for _ in range(LONGEST // PAGE)] for _ in lengths[: PAGES * PAGE // LONGEST - 1]]
    caches = cache_of(long_model, 1e3), cache_of(long_model, 1e3)
    runners = TorchRunner(long_model, caches[0]), GraphRunner(long_model, caches[1])
    at = [0] * len(tables)

    def step(rows, sizes):
        parts = []
        for row, size in zip(rows, sizes, strict=True):
            ids = torch.randint(0, 300, (size,), generator=generator).tolist()
            parts.append((ids, at[row], tables[row][: -(-(at[row] + size) // PAGE)]))
            at[row] += size
        wanted = data.draw(st.none() | st.just([*range(sum(sizes)), 0]))
        batch = FlatBatch.of(parts, wanted=wanted, hidden=True, routing=data.draw(st.booleans()))
        expected, found = (runner.forward(batch) for runner in runners)
        torch.testing.assert_close(found.logits_RV, expected.logits_RV, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(found.hidden_ND, expected.hidden_ND, atol=2e-4, rtol=1e-4)
        assert (found.routing_NLk is None) == (expected.routing_NLk is None)
        if expected.routing_NLk is not None:
            assert torch.equal(found.routing_NLk, expected.routing_NLk)

    step(range(len(tables)), lengths[: len(tables)])
    for _ in range(data.draw(st.integers(1, 4))):
        rows = data.draw(st.lists(st.sampled_from(range(len(tables))), min_size=1, unique=True))
        step(rows, [data.draw(st.sampled_from([1, 1, 1, 3, PIECE])) for _ in rows])
    assert_same_pages(*caches)


@torch.inference_mode()
def test_padding_and_what_a_bucket_held_before_change_nothing(long_model):
    """Five rows in a bucket of eight that was full of longer sequences."""
    cache = cache_of(long_model, 1.0)
    runner = GraphRunner(long_model, cache)
    full = [(list(range(10, 10 + LONGEST - 40)), 0, list(range(2, 2 + LONGEST // PAGE)))]
    runner.forward(FlatBatch.of(full))
    last = LONGEST - 41
    before = runner.forward(FlatBatch.of([([9], last, full[0][2])] * 8)).logits_RV.clone()
    rows = [([20 + row], row, [30 + row]) for row in range(5)]
    few = runner.forward(FlatBatch.of(rows)).logits_RV.clone()
    alone = torch.cat([runner.forward(FlatBatch.of([row])).logits_RV for row in rows])
    torch.testing.assert_close(few, alone, atol=2e-4, rtol=1e-4)
    again = runner.forward(FlatBatch.of([([9], last, full[0][2])] * 8)).logits_RV
    torch.testing.assert_close(again, before, atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def test_drafts_are_those_of_the_torch_runner(make_model, deepseek):
    """Several rows, then fewer, the module's own states handed on."""
    model = make_model(deepseek(vocab_size=300, num_nextn_predict_layers=1))
    caches = cache_of(model, 1.0), cache_of(model, 1.0)
    pair = TorchRunner(model, caches[0]), GraphRunner(model, caches[1])
    generator = torch.Generator().manual_seed(0)
    for first, count, rows in ((0, 20, 3), (20, 1, 3), (21, 2, 3), (23, 1, 2)):
        drawn = torch.randint(0, 300, (rows, count + 1), generator=generator).tolist()
        batches = [
            FlatBatch.of(
                [(ids[at : at + count], first, [1 + row, 9 + row]) for row, ids in enumerate(drawn)], hidden=True
            )
            for at in (0, 1)
        ]
        expected, found = (runner.draft(batches[1], runner.forward(batches[0]).hidden_ND) for runner in pair)
        torch.testing.assert_close(found.logits_RV, expected.logits_RV, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(found.hidden_ND, expected.hidden_ND, atol=2e-4, rtol=1e-4)
    assert_same_pages(*caches)


@torch.inference_mode()
def test_new_weights_count_where_they_are_and_elsewhere(dense, make_model):
    model = make_model(dense(vocab_size=300))
    runner, row = GraphRunner(model, cache_of(model, 0.0)), FlatBatch.of([([7], 0, [1])])
    for change in (lambda p: p.mul_(1.1), lambda p: p.set_(p.clone() * 0.9)):
        change(model.model.norm.weight.data)
        runner.refresh()
        expected = model(torch.tensor([[7]])).logits_BTV[0]
        torch.testing.assert_close(runner.forward(row).logits_RV, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "dense"])
@torch.inference_mode()
def test_a_step_asks_the_device_for_nothing(family, make_model, deepseek, dense):
    """On torch's device without numbers every question to it is an error, and so is a tensor left on the CPU."""
    make = {"deepseek_v3": deepseek, "dense": dense}[family]
    model = make_model(make(vocab_size=300)).to("meta")
    cache = KVCache(model.config, PAGES, torch.float32, "meta", mtp=model.config.num_nextn_predict_layers > 0)
    runner = GraphRunner(model, cache)
    batch = FlatBatch.of([([5], 20, [1, 2]), ([7, 8], 3, [3])], hidden=True, routing=True)
    output = runner.forward(batch)
    assert output.logits_RV.shape == (2, 300) and output.logits_RV.is_meta
    if model.config.num_nextn_predict_layers:
        assert runner.draft(batch, output.hidden_ND).hidden_ND.is_meta
    params = [SamplingParams(top_p=0.9), SamplingParams(temperature=0), SamplingParams(top_k=5, min_p=0.1)]
    logits_RV, uniform_R = torch.empty(3, 4096, device="meta"), torch.empty(3, device="meta")
    assert sample(logits_RV, DrawParams.of(params, "meta"), uniform_R, candidates=100)[0].is_meta


def test_weights_spread_over_devices_are_an_obstacle(dense_model, make_model, deepseek):
    model = make_model(deepseek())
    cache = KVCache(model.config, 2, torch.float32)
    assert GraphRunner.obstacle(dense_model, cache) is None and GraphRunner.obstacle(model, cache) is None
    small = KVCache(model.config, 2, torch.float32, form="int8")
    assert GraphRunner.obstacle(model, small) == "the cache holds int8"
    model.moe_layers()[0].dispatcher = through_all
    assert GraphRunner.obstacle(model, cache) == "experts are spread over several devices"
