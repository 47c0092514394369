"""Every kind of stage: the one table from a kind's name to its config and its run.

STAGES["rl"].config            # RLConfig; the module is imported when asked for, since it brings torch
STAGES["rl"].run(config, out)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

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

    def run(self, config: StageConfig, out: Path) -> None:
        importlib.import_module(self.module).run(config, out)


STAGES = {
    "tokenize": StageKind(
        "slingshot.stages.tokenize", "TokenizeConfig", "writes a corpus as token shards, read by many runs", False
    ),
    "pretrain": StageKind("slingshot.stages.pretrain", "PretrainConfig", "trains a new model from scratch"),
    "sft": StageKind("slingshot.stages.sft", "SFTConfig", "supervised fine-tuning"),
    "rl": StageKind("slingshot.stages.rl", "RLConfig", "reinforcement learning with verified rewards (GRPO)"),
    "distill": StageKind(
        "slingshot.stages.distill", "DistillConfig", "on-policy distillation: teachers judge a student's own samples"
    ),
    "sample": StageKind(
        "slingshot.stages.sample", "SampleConfig", "rejection sampling: keeps what the verifier accepts", False
    ),
    "evaluate": StageKind("slingshot.stages.evaluate", "EvaluateConfig", "scores a model on held-out problems", False),
    "quantize": StageKind(
        "slingshot.stages.quantize", "QuantizeConfig", "weights of 8 or 4 bits, and what is lost by it"
    ),
    "convert": StageKind(
        "slingshot.stages.convert",
        "ConvertConfig",
        "writes a checkpoint in another dtype, from a folder, a GGUF file, a package or the hub",
    ),
}
