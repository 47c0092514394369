"""How a training run is laid out over devices. No torch.

Ways: tp splits every matrix but the experts' (Megatron-LM, arXiv 1909.08053, with sequence parallelism, 2205.05198), pp
the blocks (1F1B), ep the routed experts over the devices of a pipeline stage, dp the batch; ZeRO stage 1, 2, 3 shards
optimizer, gradients, weights over dp (1910.02054).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slingshot.base.errors import SlingshotError
from slingshot.model.config import ModelConfig

Recompute = Literal["none", "selective", "full"]
Zero = Literal[0, 1, 2, 3]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Layout:
    """dp x tp x pp devices; ep divides dp x tp. `recompute`: which activations the backward pass computes again."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    zero: Zero = 1
    recompute: Recompute = "none"

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def expert_dp(self) -> int:
        """How many copies of each expert's weights there are."""
        return self.dp * self.tp // self.ep

    def __str__(self) -> str:
        ways = {"data": self.dp, "tensor": self.tp, "pipeline": self.pp, "expert": self.ep}
        parts = [f"{name} {size}" for name, size in ways.items() if size > 1] or ["one device"]
        return ", ".join(parts + [f"ZeRO-{self.zero}"] * (self.zero > 0) + [f"recompute {self.recompute}"])


def layouts(config: ModelConfig, count: int, per_node: int = 8, **given: Any) -> list[Layout]:
    """Every layout with the `given` ways; but for those, tp stays within a node and ZeRO begins at stage 1.

    SlingshotError with the nearest valid value where a way does not divide what it splits.
    """
    experts = config.n_routed_experts if config.n_moe_layers else 1
    found = [
        Layout(count // tp // pp, tp, pp, ep, zero, recompute)
        for tp in _divisors(math.gcd(count, config.num_attention_heads))
        if "tp" in given or tp <= per_node
        for pp in range(1, config.num_hidden_layers + 1)
        if count // tp % pp == 0
        for ep in _divisors(math.gcd(count // pp, experts))
        for recompute in ((given["recompute"],) if "recompute" in given else RECOMPUTE)
        for zero in ((given["zero"],) if "zero" in given else (1, 2, 3) if count > tp * pp else (0,))
    ]
    for way, what in {"tp": "attention heads", "pp": "blocks", "ep": "experts"}.items():
        wanted, valid = given.get(way), {getattr(layout, way) for layout in found}
        if wanted is not None and wanted not in valid:
            nearest = min(valid, key=lambda value: (abs(value - wanted), value))
            trouble = f"does not divide {count} devices and the model's {what}"
            raise SlingshotError(f"{way} {wanted} {trouble}; the nearest valid value is {nearest}")
        found = [layout for layout in found if wanted in (None, getattr(layout, way))]
    return found


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
