"""Every kind of stage: the one table from a kind's name to its config and its run.

STAGES["rl"].config            # RLConfig; the module is imported when asked for, since it brings torch
STAGES["rl"].run(config, out)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slingshot.base.config import StageConfig


@dataclass(frozen=True)
class StageKind:
    """A module of this room, its config's class by name, what it does in a few words, whether it makes a checkpoint."""

    module: str
    config_name: str
    what: str
    makes_checkpoint: bool = True

    @property
    def config(self) -> type[StageConfig]:
        found: type[StageConfig] = getattr(importlib.import_module(self.module), self.config_name)
        return found

    def run(self, config: StageConfig, out: Path, **more: Any) -> None:
        """more: what stands in for a part of the stage, such as a sampler."""
        importlib.import_module(self.module).run(config, out, **more)


# Of each module of this room: its config, what it does, and False where that is no checkpoint.
_KINDS: dict[str, tuple[Any, ...]] = {
    "tokenize": ("TokenizeConfig", "writes a corpus as token shards, read by many runs", False),
    "pretrain": ("PretrainConfig", "trains a new model from scratch"),
    "sft": ("SFTConfig", "supervised fine-tuning"),
    "rl": ("RLConfig", "reinforcement learning with verified rewards (GRPO)"),
    "distill": ("DistillConfig", "on-policy distillation: teachers judge a student's own samples"),
    "sample": ("SampleConfig", "rejection sampling: keeps what the verifier accepts", False),
    "evaluate": ("EvaluateConfig", "scores a model on held-out problems", False),
    "quantize": ("QuantizeConfig", "weights of 8 or 4 bits, and what is lost by it"),
    "convert": (
        "ConvertConfig",
        "writes a checkpoint in another dtype, from a folder, a GGUF file, a package or the hub",
    ),
}
STAGES = {kind: StageKind(f"slingshot.stages.{kind}", *told) for kind, told in _KINDS.items()}
