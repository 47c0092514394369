"""The comparison with transformers, and the summary of what was compared that ends a run.

    folder, theirs = pair(config)                     # a checkpoint where every tensor matters, and their reading of it
    compare(load_model(folder), theirs, family)       # raises AssertionError with the measured figure

Every deviation is relative: logits to the standard deviation of transformers' logits, a loss to the loss, a gradient to
the largest entry of that parameter's gradient (to a hundredth of the largest of all where that is more: some gradients
are nothing but rounding, such as the router's where a single expert's gate value is normalised to 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from slingshot.base.files import read_json, write_json
from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.engine.batch import PAGE, FlatBatch
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.runner import TorchRunner
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.text.tokenizer import Tokenizer

TOLERANCES = {"logits": 2e-5, "loss": 2e-6, "gradient": 2e-5}  # some five times what rounding makes
TIME = 40  # tokens a row; the original windows of the tests' YaRN and Llama 3 scaling are 16
VOCABULARY = 264
MTP_WEIGHT = 0.3


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["3+4=7"], vocab_size=VOCABULARY)


@pytest.fixture(scope="session")
def pair(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, nn.Module]]:
    """pair(config, bias=0.0, **changes): a checkpoint with a changed config.json, and transformers' model of it.

    `bias` is added to every router bias. Every tensor transformers wants must be there, and nothing be unknown to it
    but the MTP module, which it reads as a model of its own: theirs.mtp.
    """

    def make(config: ModelConfig, bias: float = 0.0, **changes: Any) -> tuple[Path, nn.Module]:
        folder, model = tmp_path_factory.mktemp("parity"), make_model(config)
        for layer in model.moe_layers():
            layer.gate.e_score_correction_bias += bias
        save_checkpoint(folder, model, tokenizer)
        write_json(folder / "config.json", read_json(folder / "config.json") | changes)
        return folder, read_by_transformers(folder)

    return make


def read_by_transformers(folder: Path) -> nn.Module:
    """In plain loops and products: its faster kernels do not take every width."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **plain
    )
    mtp = f"model.layers.{theirs.config.num_hidden_layers}."
    assert not [name for name in info["missing_keys"] if "shared_experts" not in name or theirs.config.n_shared_experts]
    assert not info["mismatched_keys"]
    assert all(name.startswith(mtp) for name in info["unexpected_keys"])
    theirs.mtp = None
    if (
        getattr(theirs.config, "num_nextn_predict_layers", 0) and theirs.config.n_shared_experts
    ):  # without, it misses them in the MTP module
        theirs._keys_to_ignore_on_load_unexpected = [
            mtp.replace(".", r"\.")
        ]  # by which transformers knows the MTP module; by itself layer 61 only
        from transformers.modeling_layers import MtpModel  # only here: it takes seconds

        theirs.mtp = [MtpModel.from_pretrained(theirs)]  # in a list: not to be registered as a part
    return theirs


@pytest.fixture
def compare(pytestconfig: pytest.Config) -> Callable[..., None]:
    """compare(ours, theirs, family): AssertionError unless they agree; counted in the summary under `family`."""

    def check(ours: Transformer, theirs: nn.Module, family: str | None = None) -> None:
        measured = deviations(ours, theirs)
        if family is not None:
            pytestconfig.parity.append((family, measured))  # type: ignore[attr-defined]

    return check


def deviations(ours: Transformer, theirs: nn.Module, seed: int = 0) -> dict[str, float]:
    """The largest deviation of each kind; AssertionError at the first that is more than its tolerance.

    Logits in the three ways ours has to compute them (causal, within a segment, from the cache in pieces) and of the
    MTP module; the loss of both; the gradient of every parameter.
    """
    worst = dict.fromkeys(TOLERANCES, 0.0)

    def note(kind: str, what: str, deviation: float) -> None:
        if not deviation <= TOLERANCES[kind]:
            raise AssertionError(f"{what}: off by {deviation:.2e}, {TOLERANCES[kind]:.0e} is allowed")
        worst[kind] = max(worst[kind], deviation)

    tokens_BT = torch.randint(0, ours.config.vocab_size, (2, TIME), generator=torch.Generator().manual_seed(seed))
    for module in (theirs, *(theirs.mtp or ())):
        module.zero_grad()
    expected = theirs(tokens_BT, labels=tokens_BT, output_hidden_states=True)
    scale = float(expected.logits.detach().std())
    assert scale >= 1, f"logits of standard deviation {scale:.2f} are too small for the comparison to mean anything"

    def note_logits(what: str, logits: Tensor, reference: Tensor) -> None:
        note("logits", what, float((logits - reference).detach().abs().max()) / scale)

    with torch.no_grad():
        note_logits("logits", ours(tokens_BT).logits_BTV, expected.logits)
        note_logits("logits from the cache", _cached(ours, tokens_BT), expected.logits)
    ours.zero_grad()
    with_mtp = theirs.mtp is not None
    found = ours(tokens_BT, segments_BT=torch.ones_like(tokens_BT), mtp=with_mtp)
    note_logits("logits within a segment", found.logits_BTV, expected.logits)
    loss = F.cross_entropy(found.logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    note("loss", "loss", abs(loss.item() / expected.loss.item() - 1))
    expected_loss = expected.loss
    if with_mtp:
        expected_mtp = _mtp_logits(theirs, tokens_BT, expected.hidden_states[-1])
        found_mtp = ours.lm_logits(found.mtp_hidden_BTD[:, :-1])
        note_logits("MTP logits", found_mtp, expected_mtp)
        mtp_loss, expected_mtp_loss = (
            F.cross_entropy(each[:, :-1].flatten(0, 1), tokens_BT[:, 2:].flatten())
            for each in (found_mtp, expected_mtp)
        )
        note("loss", "MTP loss", abs(mtp_loss.item() / expected_mtp_loss.item() - 1))
        loss, expected_loss = loss + MTP_WEIGHT * mtp_loss, expected_loss + MTP_WEIGHT * expected_mtp_loss
    loss.backward()
    expected_loss.backward()

    gradients = {_their_name(name): p.grad for name, p in ours.named_parameters() if p.grad is not None}
    references = _gradients(theirs, ours.config.num_hidden_layers)
    if gradients.keys() != references.keys():
        raise AssertionError(f"only one of the two has gradients of {sorted(gradients.keys() ^ references.keys())}")
    largest = max(float(reference.abs().max()) for reference in references.values())
    for name, reference in references.items():
        difference = float((gradients[name].view_as(reference) - reference).abs().max())
        note("gradient", f"gradient of {name}", difference / max(float(reference.abs().max()), 1e-2 * largest))
    return worst


def _cached(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Logits of a sequence that comes in three pieces: a long one, a short one, and one token at a time."""
    (rows, time), logits, start = tokens_BT.shape, [], 0
    pages = -(-time // PAGE)
    tables = [range(1 + row * pages, 1 + (row + 1) * pages) for row in range(rows)]
    runner = TorchRunner(model, KVCache(model.config, 1 + rows * pages, torch.float32))
    for size in (time - 9, 6, 1, 1, 1):
        parts = (
            (ids[start : start + size].tolist(), start, table) for ids, table in zip(tokens_BT, tables, strict=True)
        )
        output = runner.forward(FlatBatch.of(parts, wanted=range(rows * size)))
        logits.append(output.logits_RV.unflatten(0, (rows, -1)))
        start += size
    return torch.cat(logits, dim=1)


def _mtp_logits(theirs: nn.Module, tokens_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
    """Position t predicts token t+2 from the hidden state at t, after the final norm, and token t+1."""
    (mtp,) = theirs.mtp
    positions = torch.arange(1, tokens_BT.shape[1])[None]
    hidden = mtp.forward_layer(0, hidden_BTD[:, :-1], positions, None, input_ids=tokens_BT[:, 1:])
    return theirs.lm_head(hidden)


def _their_name(name: str) -> str:
    """Experts are stacked in both, but theirs are bare parameters."""
    return name.removesuffix(".weight") if ".mlp.experts." in name else name


def _gradients(theirs: nn.Module, n_layers: int) -> dict[str, Tensor]:
    """By our names, the MTP module's included."""
    named = dict(theirs.named_parameters())
    for name, parameter in theirs.mtp[0].layers[0].named_parameters() if theirs.mtp else ():
        name = name.removeprefix("mtp_block.").replace("post_norm.weight", "shared_head.norm.weight")
        named[f"model.layers.{n_layers}.{name}"] = parameter
    return {
        name: parameter.grad for name, parameter in named.items() if parameter.grad is not None and parameter.numel()
    }
