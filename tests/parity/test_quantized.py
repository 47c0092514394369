"""compressed-tensors is the oracle of what a matrix of few bits stands for, transformers of what a folder says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from slingshot.base.progress import Progress
from slingshot.checkpoint.description import write_description
from slingshot.checkpoint.load_save import load_as_stored, load_model, open_weights, save_checkpoint
from slingshot.checkpoint.safetensors import write_shards
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.quantization import encode, mxfp4
from slingshot.quantization.encode import grid
from slingshot.quantization.formats import Scheme
from slingshot.quantization.gptq import rounded
from slingshot.quantization.integers import from_numbers
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.fitting import Fit, tensors

WIDE = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
SCHEMES = [
    Scheme("int4", 32), Scheme("int4", 64), Scheme("int8", 32), Scheme("int4", 32, (*WIDE, "model.layers.1.mlp.")),
    Scheme("int8-dynamic"), Scheme("mxfp4", 32),
]  # fmt: skip
# What may be mistaken in storing numbers [F, D] and scales [F, G]: neighbours change places within a word or a byte.
BROKEN: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "order in a word": lambda n, s: (n.unflatten(1, (-1, 2)).flip(2).flatten(1), s),
    "zero point": lambda n, s: (n + torch.where(n < n.max(), 1, 0), s),
    "scale axis": lambda n, s: (n, s.T.reshape(s.shape)),
    "group order": lambda n, s: (n, s.flip(1)),
}
NAMES = [scheme.kind + "-wide" * bool(scheme.wide) + f"-{scheme.group}" for scheme in SCHEMES]


def both(scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """What a matrix's numbers and scales stand for, and what compressed-tensors makes of them as they are stored."""
    from compressed_tensors.compressors import BaseCompressor  # here: they take seconds
    from compressed_tensors.quantization import QuantizationConfig

    name, generator = "model.layers.0.mlp.up_proj.weight", torch.Generator().manual_seed(0)
    weight_FD = torch.randn(48, 192, generator=generator) * 10 ** torch.randn(48, 1, generator=generator)
    numbers_FD, scales_FG = rounded(weight_FD, grid(scheme, name))
    stored = {f"weight{suffix}": part for suffix, part in encode.encoded(scheme, name, numbers_FD, scales_FG)}
    parts = {f"weight{suffix}": shape for suffix, (_, shape) in scheme.parts(name, (48, 192)).items()}
    assert {part: tuple(tensor.shape) for part, tensor in stored.items()} == parts
    theirs = QuantizationConfig.model_validate(scheme.config()).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    stored["weight_scale"] = stored["weight_scale"].float() if scheme.kind != "mxfp4" else stored["weight_scale"]
    found = compressor.decompress(stored, theirs)["weight"].float()
    if scheme.kind == "mxfp4":
        assert torch.equal(mxfp4.dequantize(stored["weight_packed"], stored["weight_scale"]), found)
    return from_numbers(numbers_FD, scales_FG), found


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_a_matrix_is_what_compressed_tensors_makes_of_it(scheme: Scheme) -> None:
    """Bit for bit, what is beyond bfloat16's precision included."""
    assert torch.equal(*both(scheme))


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2], SCHEMES[5]], ids=["int4", "int8", "mxfp4"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_matrix_that_is_stored_otherwise_is_another(
    scheme: Scheme, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison tells of every order and shift that could be mistaken."""
    stored = encode.encoded

    def otherwise(scheme: Scheme, name: str, *both: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return stored(scheme, name, *BROKEN[broken](*both))

    monkeypatch.setattr(encode, "encoded", otherwise)
    assert not torch.equal(*both(scheme))


@pytest.fixture(scope="module")
def plain(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = ModelConfig(
        family="dense", vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("plain")
    save_checkpoint(folder, make_model(config), tokenizer)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_transformers_reads_the_folder(scheme: Scheme, plain: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same logits in float32; where activations are rounded, to what their other rounding makes (theirs divides
    by 127.5, ours, as vLLM's, by 127)."""
    weights = open_weights(plain)
    with Progress("quantized", 1) as progress:
        write_shards(tmp_path, tensors(weights, Fit(), scheme, None, progress))
    write_description(tmp_path, weights.config.stored_as(scheme), tokenizer, "bfloat16", None)
    assert open_weights(tmp_path).config.scheme == scheme
    ours, _ = load_as_stored(tmp_path)
    # mxfp4 is decompressed to bfloat16, whatever was asked for, which holds it exactly
    at_once = {"quantization_config": transformers.CompressedTensorsConfig(run_compressed=False)}
    how = at_once if scheme.kind == "mxfp4" else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **how)
    for parameter in theirs.parameters() if how else ():
        parameter.data = parameter.data.float()
    tokens_BT = torch.randint(0, 264, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = ours(tokens_BT).logits_BTV, theirs(tokens_BT).logits
        weights_alone = load_model(tmp_path)(tokens_BT).logits_BTV
    assert found is not None and weights_alone is not None
    off, rounding = ((each - wanted).abs().max() / wanted.std() for each in (found, weights_alone))
    assert off < (0.1 if scheme.kind == "int8-dynamic" else 1e-4)
    assert (rounding > 0.5 * off > 1e-3) == (scheme.kind == "int8-dynamic")
