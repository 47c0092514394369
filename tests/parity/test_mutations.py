"""The comparison with transformers can fail: for every feature, the model with that one feature broken does, where it
passes unbroken.

A mutation is a piece of the model's own source replaced by another, so that everything around it stays as it is.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, write_json
from slingshot.checkpoint.load_save import load_model
from slingshot.model.config import ModelConfig

Compare = Callable[..., None]
Models = Callable[[str], tuple[Path, nn.Module]]

YARN = dict(
    rope_type="yarn", factor=10.0, original_max_position_embeddings=16, beta_fast=1.5, mscale=0.7, mscale_all_dim=1.3
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0
)

# Models on which every feature shows.
DEEPSEEK: dict[str, dict[str, Any]] = {
    "deepseek": dict(rope_theta=4.0, rope_scaling=YARN, rms_norm_eps=1e-2),
    "deepseek, tied": dict(tie_word_embeddings=True),
    "deepseek, negative biases": dict(
        n_routed_experts=12, n_group=3, num_experts_per_tok=5, num_nextn_predict_layers=0
    ),
}
THREE_GROUPS = dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=36, head_dim=10)
DENSE: dict[str, dict[str, Any]] = {
    "llama": dict(rope_theta=500000.0, rope_scaling=LLAMA3, **THREE_GROUPS),
    "qwen2": dict(attention_bias=True, rope_scaling=YARN),
    "qwen3": dict(
        qk_norm=True, head_dim=10, tie_word_embeddings=True, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=0.0)
    ),
}
MUTATIONS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text())


@pytest.fixture(scope="module")
def models(
    pair: Callable[..., tuple[Path, nn.Module]], deepseek: Callable[..., ModelConfig], dense: Callable[..., ModelConfig]
) -> Models:
    """models(name): a checkpoint, and transformers' reading of it."""
    made: dict[str, tuple[Path, nn.Module]] = {}

    def of(name: str) -> tuple[Path, nn.Module]:
        if name not in made:
            config = (
                deepseek(**DEEPSEEK[name], vocab_size=264) if name in DEEPSEEK else dense(**DENSE[name], vocab_size=264)
            )
            made[name] = pair(config, bias=-2.0 if "negative" in name else 0.0)
        return made[name]

    return of


def mutate(patch: pytest.MonkeyPatch, where: str, edits: list[str]) -> None:
    """Replace a function by one of another source; `where` is MODULE.FUNCTION or MODULE.CLASS.METHOD, as looked up."""
    room, module, *path = (where[1:] if where.startswith("/") else f"model.{where}").split(".")
    owner: Any = import_module(f"slingshot.{room}.{module}")
    for name in path[:-1]:
        owner = getattr(owner, name)
    function = getattr(owner, path[-1])
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        assert old in source, f"{where} no longer says {old!r}: mutate what took its place"
        source = source.replace(old, new)
    names = dict(function.__globals__)
    exec(source.replace("super()", f"super({path[0]}, self)"), names)
    patch.setattr(owner, path[-1], names[function.__name__])


@pytest.mark.parametrize("name", [*DEEPSEEK, *DENSE])
def test_unbroken_models_agree(models: Models, compare: Compare, name: str) -> None:
    folder, theirs = models(name)
    compare(load_model(folder), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("broken", MUTATIONS)
def test_a_broken_model_is_told_apart(
    models: Models, compare: Compare, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setenv("SLINGSHOT_NATIVE", "off")  # what is broken is Python's
    name, where, *edits = MUTATIONS[broken]
    folder, theirs = models(name)
    mutate(monkeypatch, where, edits)
    ours = load_model(folder)
    with pytest.raises(AssertionError, match=r": off by .* is allowed|only one of the two has gradients"):
        compare(ours, theirs)


@pytest.mark.parametrize("first", [0, 2])
def test_experts_that_begin_a_layer_off_do_not_fit_the_checkpoint(models: Models, tmp_path: Path, first: int) -> None:
    """It is 1: what the others' numbers catch, the names of the tensors catch here."""
    folder, _ = models("deepseek")
    shutil.copytree(folder, tmp_path / "other")
    config = read_json(folder / "config.json")
    assert config["first_k_dense_replace"] == 1
    write_json(tmp_path / "other" / "config.json", config | {"first_k_dense_replace": first})
    with pytest.raises(SlingshotError, match=r"model\.layers\.[01]\.mlp"):
        load_model(tmp_path / "other")
