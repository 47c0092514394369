"""The engine on a CUDA device: graphs give what runs without them, and both what the plain model gives."""

import copy

import pytest
import torch

from slingshot.engine.batch import FlatBatch
from slingshot.engine.engine import Engine
from slingshot.engine.graph_runner import GraphRunner
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.runner import TorchRunner
from slingshot.engine.sampling import SamplingParams

pytestmark = pytest.mark.gpu
CUDA = "cuda"


@pytest.fixture(scope="module", params=["deepseek_v3", "dense"])
def on_device(request, make_model, deepseek, dense, tokenizer):
    """Widths are multiples of 8, as kernels for 16 bits want them."""
    widths = {"hidden_size": 64, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 256}
    latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = deepseek(**widths, **latent) if request.param == "deepseek_v3" else dense(**widths)
    return make_model(config).to(CUDA).requires_grad_(False)


def pair_of(model, dtype=torch.float32):
    mtp = model.config.num_nextn_predict_layers > 0
    kinds = TorchRunner, GraphRunner
    return [kind(model, KVCache(model.config, 60, dtype, CUDA, mtp=mtp)) for kind in kinds]


@torch.inference_mode()
def test_graphs_give_what_the_torch_runner_gives(on_device):
    """Buckets of one to 64 rows by turns, drafts between them, tables that grow."""
    generator, pair = torch.Generator().manual_seed(0), pair_of(on_device)
    lengths = [3, 120, 40, 90, 7]
    tables = [list(range(1 + 11 * row, 12 + 11 * row)) for row in range(5)]
    at = [0] * 5
    for turn, rows in enumerate([[0, 1, 2, 3, 4], [0], [1, 2], [0, 1, 2, 3, 4], [4], *([[1]] * 10), [0, 1, 2, 3, 4]]):
        parts = []
        for row in rows:
            size = (lengths[row], 1, 3)[min(turn, 1) + turn % 2 * (turn > 0)]
            ids = torch.randint(0, 290, (size,), generator=generator).tolist()
            parts.append((ids, at[row], tables[row]))
            at[row] += size
        batch = FlatBatch.of(parts, hidden=True, routing=True)
        expected, found = (runner.forward(batch) for runner in pair)
        torch.testing.assert_close(found.logits_RV, expected.logits_RV, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(found.hidden_ND, expected.hidden_ND, atol=2e-3, rtol=1e-3)
        if on_device.config.num_nextn_predict_layers:
            expected, found = (runner.draft(batch, expected.hidden_ND) for runner in pair)
            torch.testing.assert_close(found.logits_RV, expected.logits_RV, atol=2e-3, rtol=1e-3)


@torch.inference_mode()
def test_a_recorded_step_waits_for_nothing(on_device):
    runner, batch = pair_of(on_device)[1], FlatBatch.of([([5], 20, [1, 2]), ([7, 8], 3, [3])], hidden=True)
    before = runner.forward(batch).logits_RV.clone()
    try:
        torch.cuda.set_sync_debug_mode("error")
        after = runner.forward(batch).logits_RV
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("native", ["auto", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("speculation", ["off", "on"])
def test_the_engine_says_what_the_plain_model_says(on_device, tokenizer, dtype, native, speculation):
    """Log probabilities of what was sampled, of prompts of many lengths that come and go."""
    engine = Engine(on_device, tokenizer, max_batch=20, dtype=dtype, native=native, speculation=speculation)
    assert engine.runs_on == ("torch, in CUDA graphs" if native == "auto" else "torch")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(7, 290, (1 + 5 * row,), generator=generator).tolist() for row in range(30)]
    params = [SamplingParams(10 + 3 * row, top_p=(1.0, 0.8)[row % 2], ignore_eos=True) for row in range(30)]
    deviations = []
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        sampled = output.outputs[0].token_ids
        with torch.inference_mode():
            ids = torch.tensor([prompt + sampled], device=CUDA)
            logprobs = engine.model(ids).logits_BTV[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()
        deviations.append((own - torch.tensor(output.outputs[0].logprobs)).abs())
    deviation = torch.cat(deviations)
    if dtype == torch.float32:
        assert deviation.max() < 5e-3
    else:  # where two experts are about even, the one or the other is chosen
        assert deviation.median() < 0.05


@torch.inference_mode()
def test_new_weights_count(on_device):
    model = copy.deepcopy(on_device)
    torch_runner, graphs = pair_of(model)
    batch = FlatBatch.of([([5], 0, [1])])
    graphs.forward(batch)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.01  # elsewhere
    graphs.refresh()
    found, expected = (runner.forward(batch).logits_RV for runner in (graphs, torch_runner))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@torch.inference_mode()
def test_what_cannot_be_recorded_runs_as_it_comes(on_device):
    model = copy.deepcopy(on_device)
    model.model.norm.register_forward_hook(lambda _, __, y: y * (1.0 if y.sum().item() == y.sum().item() else 0.0))
    expected, runner = (pair_of(model)[index] for index in (0, 1))
    batch = FlatBatch.of([([5], 0, [1])])
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        found = runner.forward(batch).logits_RV
    torch.testing.assert_close(found, expected.forward(batch).logits_RV, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(runner.forward(batch).logits_RV, found)
