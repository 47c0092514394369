"""An engine that is loaded to generate has its weights in memory once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_model, save_checkpoint
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.model.transformer import Transformer
from slingshot.text.tokenizer import Tokenizer

MIB = 1 << 20
CACHE = 16 * MIB
PROGRAM = f"""
import json, sys
from pathlib import Path
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams

def measured():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {{name.strip(":"): int(rest[0]) * 1024 for name, *rest in lines if name in ("VmRSS:", "VmHWM:")}}

def generate(path):
    engine = Engine.load(path, dtype="float32", device="cpu", max_batch=8, max_length=64, cache_bytes={CACHE})
    engine.generate([[5, 6, 7]] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
    return engine

generate(sys.argv[1])  # a small one: code and libraries that the first engine loads are in memory before
before = measured()["VmRSS"]
engine = generate(sys.argv[2])
print(json.dumps({{name: size - before for name, size in measured().items()}}))
"""
PARAMS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 9, 40, 41], [7] * 20]


def logprobs_of(engine: Engine) -> list[float]:
    return [logprob for output in engine.generate(PROMPTS, PARAMS) for logprob in output.outputs[0].logprobs]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell what a process has")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["dense", "deepseek_v3"])
def test_weights_are_in_memory_once(
    dense: Callable[..., Any], deepseek: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path, family: str
) -> None:
    """While they are read, too: what there is beside weights and cache is less than a quarter of the weights again, and
    a tenth afterwards."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4096}
    base = {"dense": dense, "deepseek_v3": deepseek}[family]
    if family == "dense":
        config = dense(num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, **wide)
    else:
        heads = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
        config = deepseek(n_routed_experts=16, moe_intermediate_size=128, **heads, **wide)
    small, model = (Transformer(each).requires_grad_(False) for each in (base(vocab_size=4096), config))
    for name, each in (("small", small), ("large", model)):
        (tmp_path / name).mkdir()
        each.init_weights(torch.Generator().manual_seed(0))
        save_checkpoint(tmp_path / name, each, tokenizer)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 100 * MIB
    folders = tmp_path / "small", tmp_path / "large"
    run = subprocess.run([sys.executable, "-c", PROGRAM, *folders], capture_output=True, text=True, check=True)
    more = json.loads(run.stdout)
    assert more["VmHWM"] < 1.25 * weights + CACHE
    assert more["VmRSS"] < 1.1 * weights + CACHE


@pytest.mark.parametrize("tied", [True, False])
def test_an_engine_with_packed_weights_alone_takes_new_ones(
    make_model: Callable[..., Transformer], dense: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    models = [make_model(dense(vocab_size=300, tie_word_embeddings=tied), seed=seed) for seed in (0, 1)]
    expected = [logprobs_of(Engine(model, tokenizer, native="off")) for model in models]
    save_checkpoint(tmp_path, models[0], tokenizer)
    engine = Engine.load(tmp_path, dtype="float32", device="cpu")
    assert expected[0] != pytest.approx(expected[1], abs=1e-2)
    assert logprobs_of(engine) == pytest.approx(expected[0], abs=2e-4)
    with pytest.raises(SlingshotError, match="is missing"):  # what it has stays as it is
        engine.update_weights({"model.layers.0.self_attn.o_proj.weight": torch.zeros(32, 32)})
    assert logprobs_of(engine) == pytest.approx(expected[0], abs=2e-4)
    engine.update_weights(models[1])
    assert logprobs_of(engine) == pytest.approx(expected[1], abs=2e-4)


def test_the_model_of_an_engine_that_gave_its_weights_up_is_not_to_be_had(
    make_model: Callable[..., Transformer], dense: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, make_model(dense(vocab_size=300)), tokenizer)
    engine = Engine.load(tmp_path, dtype="float32", device="cpu")
    if engine.runs_on == "torch":
        assert torch.equal(engine.model.model.norm.weight, load_model(tmp_path).model.norm.weight)
    else:
        with pytest.raises(SlingshotError, match="load_model gives the model"):
            _ = engine.model
    kept = Engine.load(tmp_path, dtype="float32", device="cpu", native="off")
    assert kept.model.config == engine.config and kept.dtype == engine.dtype == torch.float32
