"""What every test shares: one thread, so that timings and sums do not depend on the machine, and a cache of its own."""

from __future__ import annotations

import functools
import os
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from slingshot.model.config import ModelConfig
    from slingshot.model.transformer import Transformer

# Before anything imports torch. Products this small gain nothing from a second thread, and lose much on a busy machine:
# OpenMP threads spin.
os.environ["OMP_NUM_THREADS"] = "1"

# Every HTTP client reads the system's certificates, which takes longer than most of what is asked of a server.
ssl.create_default_context = functools.cache(ssl.create_default_context)

# What is drawn is the same every time, and fixtures are as good for each draw as for the first.
shared = [HealthCheck.function_scoped_fixture]
settings.register_profile("house", derandomize=True, deadline=None, max_examples=25, suppress_health_check=shared)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    config.parity = []  # (family, {kind: deviation}) of every comparison with transformers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one keeps a worker at work while the others are done."""
    longest = ["test_end_to_end.py", "test_ranks.py", "test_parallel.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = session.config.parity


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.parity += getattr(node, "workeroutput", {}).get("parity", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was compared with transformers, and the worst deviations of each family."""
    if not config.parity:
        return
    terminalreporter.section("parity with transformers, worst relative deviations")
    kinds = list(config.parity[0][1])
    terminalreporter.write_line(f"{'':28}configs" + "".join(f"{kind:>10}" for kind in kinds))
    for family in sorted({family for family, _ in config.parity}):
        found = [measured for name, measured in config.parity if name == family]
        worst = "".join(f"{max(measured[kind] for measured in found):10.1e}" for kind in kinds)
        terminalreporter.write_line(f"{family:28}{len(found):7d}{worst}")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the tests away from what `slingshot doctor` measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield cache


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Stages and commands take over the signals; give them back after every test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """make_model(config, seed=0): a model far from its initial state, in which every tensor matters.

    Matrices are large enough for logits with a standard deviation of 1 and more; norm gains, projection biases and
    router biases are spread.
    """
    import torch  # here, for the rooms that are tested without it

    from slingshot.model.transformer import Transformer

    def make(config: ModelConfig, seed: int = 0) -> Transformer:
        model, generator = Transformer(config), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.9 * parameter.shape[-1] ** -0.5, generator=generator)
                else:
                    parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            model.model.embed_tokens.weight.normal_(0.0, 1.0, generator=generator)
            if not config.tie_word_embeddings:
                model.lm_head.weight.mul_(2.0)
            for layer in model.moe_layers():
                layer.gate.e_score_correction_bias.normal_(0.0, 0.2, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def deepseek() -> Callable[..., ModelConfig]:
    """deepseek(**changes): a DeepSeek-V3 config of a few thousand parameters with every part of the architecture."""
    from slingshot.model.config import ModelConfig

    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    }  # fmt: skip
    mla = {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10}
    moe = {
        "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2,
    }  # fmt: skip
    rest = {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}
    return lambda **changes: ModelConfig(family="deepseek_v3", **{**shape, **mla, **moe, **rest, **changes})


@pytest.fixture(scope="session")
def dense() -> Callable[..., ModelConfig]:
    """dense(**changes): a small Llama; attention_bias makes it a Qwen2, qk_norm a Qwen3."""
    from slingshot.model.config import ModelConfig

    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    return lambda **changes: ModelConfig(family="dense", **{**shape, **changes})
