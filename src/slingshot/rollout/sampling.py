"""The table `sampling` of the stages that sample: rl, sample and evaluate."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from slingshot.base.config import Strict
from slingshot.engine.sampling import SamplingParams


class SamplingConfig(Strict):
    """What a recipe says of how responses are drawn. `top_p` 1 and `top_k` 0 keep the whole vocabulary, `temperature` 0 is greedy."""

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.params(n=1, seed=0)
        return self

    def params(self, n: int, seed: int) -> SamplingParams:
        """What the engine is asked for: `n` samples of each prompt, their noise keyed by `seed`."""
        return SamplingParams(self.max_tokens, self.temperature, self.top_p, self.top_k, n, seed)


MOVED_TO_SAMPLING = {key: f"sampling.{key}" for key in SamplingConfig.model_fields}
