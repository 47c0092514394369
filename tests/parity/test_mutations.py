"""The comparison with transformers can fail: for every feature, the model with that one feature broken does, where it passes unbroken.

A mutation is a piece of the model's own source replaced by another, so that everything around it stays as it is.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
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

YARN = {
    "rope_type": "yarn",
    "factor": 10.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 1.5,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

# Models on which every feature shows.
DEEPSEEK: dict[str, dict[str, Any]] = {
    "deepseek": {"rope_theta": 4.0, "rope_scaling": YARN, "rms_norm_eps": 1e-2},
    "deepseek, tied": {"tie_word_embeddings": True},
    "deepseek, negative biases": {
        "n_routed_experts": 12,
        "n_group": 3,
        "num_experts_per_tok": 5,
        "num_nextn_predict_layers": 0,
    },
}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_size": 36,
        "head_dim": 10,
    },
    "qwen2": {"attention_bias": True, "rope_scaling": YARN},
    "qwen3": {
        "qk_norm": True,
        "head_dim": 10,
        "tie_word_embeddings": True,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0},
    },
}

# what is broken: of which model, where, and what its source says instead of what
MUTATIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "MLA's pairs half-split": ("deepseek", "attention.MLA.forward", {"interleaved=True": "interleaved=False"}),
    "GQA's pairs interleaved": ("qwen3", "attention.GQA.forward", {"interleaved=False": "interleaved=True"}),
    "rotation backwards": (
        "qwen3",
        "attention.rotate",
        {
            "first * cos - second * sin, second * cos + first * sin": "first * cos + second * sin, second * cos - first * sin"
        },
    ),
    "MLA's keys not rotated": (
        "deepseek",
        "attention.MLA.forward",
        {
            "k_X1R = rotate(k_XR.unsqueeze(-2), context.cos_XR, context.sin_XR, interleaved=True)": "k_X1R = k_XR.unsqueeze(-2)"
        },
    ),
    "rope_theta ignored": (
        "qwen3",
        "rope.frequencies",
        {"1.0 / config.rope_theta**exponent": "1.0 / 9000.0**exponent"},
    ),
    "YaRN: frequencies as they were": (
        "deepseek",
        "rope.frequencies",
        {"plain / rope.factor * interpolated + plain * (1 - interpolated)": "plain"},
    ),
    "YaRN: every frequency interpolated": (
        "deepseek",
        "rope.frequencies",
        {"plain * (1 - interpolated)": "plain / rope.factor * (1 - interpolated)"},
    ),
    "YaRN: beta_fast ignored": ("deepseek", "rope.frequencies", {"rope.beta_fast": "32.0"}),
    "YaRN: beta_slow ignored": ("deepseek", "rope.frequencies", {"rope.beta_slow": "0.5"}),
    "YaRN: softmax scale missing": (
        "deepseek",
        "attention.softmax_scale",
        {"yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2": "1.0"},
    ),
    "YaRN: softmax scale not squared": ("deepseek", "attention.softmax_scale", {" ** 2": ""}),
    "YaRN: cos and sin without their scale": (
        "deepseek",
        "rope.rotation_scale",
        {"yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)": "1.0"},
    ),
    "YaRN: cos and sin without mscale_all_dim": (
        "deepseek",
        "rope.rotation_scale",
        {" / yarn_mscale(rope.factor, rope.mscale_all_dim)": ""},
    ),
    "YaRN, dense: cos and sin without their scale": (
        "qwen3",
        "rope.rotation_scale",
        {"own = yarn_mscale(rope.factor, 1.0)": "own = 1.0"},
    ),
    "YaRN, dense: softmax scale of DeepSeek": (
        "qwen2",
        "attention.softmax_scale",
        {'config.family == "deepseek_v3" and': ""},
    ),
    "Llama 3 scaling ignored": ("llama", "rope.frequencies", {'rope.rope_type == "llama3"': "False"}),
    "Llama 3 scaling without its smooth middle": (
        "llama",
        "rope.frequencies",
        {"smooth.clamp(0, 1)": "(smooth > 0.5).float()"},
    ),
    "softmax scale of the no-rope width": (
        "deepseek",
        "attention.softmax_scale",
        {"config.qk_head_dim**-0.5": "config.qk_nope_head_dim**-0.5"},
    ),
    "kv_a_layernorm skipped": ("deepseek", "attention.MLA.forward", {"self.kv_a_layernorm(latent_XK)": "latent_XK"}),
    "q_a_layernorm skipped": (
        "deepseek",
        "attention.MLA.forward",
        {"self.q_a_layernorm(self.q_a_proj(x_XD))": "self.q_a_proj(x_XD)"},
    ),
    "latent norms with rms_norm_eps": (
        "deepseek",
        "attention.MLA.__init__",
        {"self.LATENT_EPS": "config.rms_norm_eps"},
    ),
    "queries: rope part first": (
        "deepseek",
        "attention.MLA.forward",
        {
            "q_XHN, q_XHR = q": "q_XHR, q_XHN = q",
            "[config.qk_nope_head_dim, config.qk_rope_head_dim]": "[config.qk_rope_head_dim, config.qk_nope_head_dim]",
        },
    ),
    "latent: rope part first": (
        "deepseek",
        "attention.MLA.forward",
        {
            "latent_XK, k_XR = self": "k_XR, latent_XK = self",
            "[config.kv_lora_rank, config.qk_rope_head_dim]": "[config.qk_rope_head_dim, config.kv_lora_rank]",
        },
    ),
    "expanded: values first": (
        "deepseek",
        "attention.MLA._expanded",
        {
            "k_XHN, v_XHV = kv": "v_XHV, k_XHN = kv",
            "[config.qk_nope_head_dim, config.v_head_dim]": "[config.v_head_dim, config.qk_nope_head_dim]",
        },
    ),
    "absorbed: values first": (
        "deepseek",
        "attention.MLA._absorbed",
        {
            "keys, values = slice(0, self.config.qk_nope_head_dim), slice(self.config.qk_nope_head_dim, None)": (
                "values, keys = slice(0, self.config.v_head_dim), slice(self.config.v_head_dim, None)"
            )
        },
    ),
    "latent cached before its norm": (
        "deepseek",
        "attention.MLA.forward",
        {
            "latent_XK = self.kv_a": "raw_XK = latent_XK\n    latent_XK = self.kv_a",
            "self._absorbed(q_XHN, q_XHR, latent_XK": "self._absorbed(q_XHN, q_XHR, raw_XK",
        },
    ),
    "heads in another order, cached": (
        "qwen2",
        "/engine.kv_cache.attend_folded",
        {
            "q_BTHW.unflatten(2, (groups, -1)).transpose(1, 2)": "q_BTHW.unflatten(2, (-1, groups)).permute(0, 3, 1, 2, 4)"
        },
    ),
    "KV heads tiled, not repeated": (
        "llama",
        "context.PackedContext.attend",
        {"t.repeat_interleave(groups, dim=2)": "t.repeat(1, 1, groups, 1)"},
    ),
    "attention bias dropped": (
        "qwen2",
        "linear.Linear.product",
        {"None if self.bias is None else self.bias.to(x_XD.dtype)": "None"},
    ),
    "q and k norm dropped": ("qwen3", "attention.GQA.forward", {"if self.config.qk_norm:": "if False:"}),
    "q norm and k norm exchanged": (
        "qwen3",
        "attention.GQA.forward",
        {"self.q_norm(q_XHW), self.k_norm(k_XGW)": "self.k_norm(q_XHW), self.q_norm(k_XGW)"},
    ),
    "q norm after rotation": (
        "qwen3",
        "attention.GQA.forward",
        {
            "q_XHW, k_XGW = self.q_norm(q_XHW), self": "k_XGW = self",
            "interleaved=False)\n    k_XGW =": "interleaved=False)\n    q_XHW = self.q_norm(q_XHW)\n    k_XGW =",
        },
    ),
    "attention sees the future, in a segment": ("qwen3", "context.causal_mask", {".tril()": ""}),
    "attention sees the future, in the cache": (
        "deepseek",
        "/engine.kv_cache.CachedContext.__init__",
        {"<= positions_BT": "<= 1 + positions_BT"},
    ),
    "every piece of a sequence at position 0": (
        "deepseek",
        "context.Context.__init__",
        {"rotary(config, positions_X)": "rotary(config, positions_X - positions_X[:, :1])"},
    ),
    "softmax scores": ("deepseek", "moe.Gate.forward", {".sigmoid()": ".softmax(-1)"}),
    "router bias leaks into gate values": (
        "deepseek",
        "moe.Gate.forward",
        {"scores_NE.gather(1, experts_Nk)": "(scores_NE + self.e_score_correction_bias).gather(1, experts_Nk)"},
    ),
    "router bias ignored": ("deepseek", "moe.Gate.forward", {" + self.e_score_correction_bias": ""}),
    "closed groups masked with 0": ("deepseek, negative biases", "moe.Gate.forward", {"-torch.inf": "0.0"}),
    "groups not limited": ("deepseek", "moe.Gate.forward", {"config.n_group > 1": "False"}),
    "groups scored by their best": (
        "deepseek",
        "moe.Gate.forward",
        {"grouped.topk(2, dim=-1).values.sum(-1)": "grouped.amax(-1)"},
    ),
    "groups scored by all": (
        "deepseek, negative biases",
        "moe.Gate.forward",
        {"grouped.topk(2, dim=-1).values.sum(-1)": "grouped.sum(-1)"},
    ),
    "one group fewer": (
        "deepseek",
        "moe.Gate.forward",
        {"topk(config.topk_group, dim=-1)": "topk(config.topk_group - 1, dim=-1)"},
    ),
    "norm_topk_prob ignored": ("deepseek", "moe.Gate.forward", {"if config.norm_topk_prob:": "if False:"}),
    "routed_scaling_factor ignored": (
        "deepseek",
        "moe.Gate.forward",
        {"gates_Nk * config.routed_scaling_factor": "gates_Nk"},
    ),
    "one expert fewer": (
        "deepseek",
        "moe.Gate.forward",
        {"config.num_experts_per_tok": "config.num_experts_per_tok - 1"},
    ),
    "shared experts dropped": ("deepseek", "moe.MoE.forward", {"self.shared_experts is not None": "False"}),
    "shared experts scaled": (
        "deepseek",
        "moe.MoE.forward",
        {"self.shared_experts(x_ND)": "2.5 * self.shared_experts(x_ND)"},
    ),
    "gate and up exchanged": (
        "deepseek",
        "moe.MLP.forward",
        {"F.silu(self.gate_proj(x)) * self.up_proj(x)": "F.silu(self.up_proj(x)) * self.gate_proj(x)"},
    ),
    "GELU": ("qwen3", "moe.MLP.forward", {"F.silu(": "F.gelu("}),
    "gates take no gradient": ("deepseek", "moe.Gate.forward", {"gates_Nk * config": "gates_Nk.detach() * config"}),
    "another epsilon": ("deepseek", "norm.RMSNorm.forward", {"self.eps": "1e-3"}),
    "rms_norm_eps ignored": ("deepseek", "block.Block.__init__", {"config.rms_norm_eps": "1e-6"}),
    "norm gains ignored": (
        "deepseek",
        "norm.RMSNorm.forward",
        {"self.weight.to(x.dtype)": "torch.ones_like(self.weight)"},
    ),
    "input norm skipped": ("deepseek", "block.Block.forward", {"self.input_layernorm(x_BTD)": "x_BTD"}),
    "norm after attention skipped": ("qwen3", "block.Block.forward", {"self.post_attention_layernorm(x_BTD)": "x_BTD"}),
    "final norm skipped": ("qwen3", "transformer.Transformer.forward", {"self.model.norm(x_BTD)": "x_BTD"}),
    "tied head: not the embedding": (
        "deepseek, tied",
        "transformer.Transformer.lm_logits",
        {"head.product(hidden, detach_head)": "head.product(1.001 * hidden, detach_head)"},
    ),
    "tied head: no gradient to the embedding": (
        "deepseek, tied",
        "transformer.Transformer.lm_logits",
        {"head.product(hidden, detach_head)": "head.product(hidden, True)"},
    ),
    "MTP: hidden before embedding": (
        "deepseek",
        "mtp.MTP.forward",
        {"(self.enorm(embedding_BTD), self.hnorm(hidden_BTD))": "(self.hnorm(hidden_BTD), self.enorm(embedding_BTD))"},
    ),
    "MTP: norms exchanged": (
        "deepseek",
        "mtp.MTP.forward",
        {"(self.enorm(embedding_BTD), self.hnorm(hidden_BTD))": "(self.hnorm(embedding_BTD), self.enorm(hidden_BTD))"},
    ),
    "MTP: hidden before the final norm": (
        "deepseek",
        "transformer.Transformer.forward",
        {"output.hidden_BTD, embedding_BTD.roll": "x_BTD, embedding_BTD.roll"},
    ),
    "MTP: embedding of the token itself": (
        "deepseek",
        "transformer.Transformer.forward",
        {"embedding_BTD.roll(-1, dims=1)": "embedding_BTD"},
    ),
    "MTP: last norm skipped": ("deepseek", "mtp.MTP.forward", {"self.shared_head.norm(y_BTD)": "y_BTD"}),
    "MTP: no gradient to the main model": (
        "deepseek",
        "transformer.Transformer.forward",
        {"if detach_mtp:": "if True:"},
    ),
}


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


def mutate(patch: pytest.MonkeyPatch, where: str, edits: dict[str, str]) -> None:
    """Replace a function by one whose source differs; `where` is MODULE.FUNCTION or MODULE.CLASS.METHOD, as others look it up.

    Modules are the model's; those of another room begin with /ROOM.
    """
    room, module, *path = (where[1:] if where.startswith("/") else f"model.{where}").split(".")
    owner: Any = import_module(f"slingshot.{room}.{module}")
    for name in path[:-1]:
        owner = getattr(owner, name)
    function = getattr(owner, path[-1])
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in edits.items():
        assert old in source, f"{where} no longer says {old!r}: mutate what took its place"
        source = source.replace(old, new)
    names = dict(function.__globals__)
    exec(source.replace("super()", f"super({path[0]}, self)"), names)
    patch.setattr(owner, path[-1], names[function.__name__])


@pytest.mark.parametrize("name", [*DEEPSEEK, *DENSE])
def test_unbroken_models_agree(models: Models, compare: Compare, name: str) -> None:
    folder, theirs = models(name)
    compare(load_model(folder), theirs)


@pytest.mark.parametrize("broken", MUTATIONS)
def test_a_broken_model_is_told_apart(
    models: Models, compare: Compare, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    name, where, edits = MUTATIONS[broken]
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
