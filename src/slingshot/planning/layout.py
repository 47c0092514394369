"""How a training run is laid out over devices. No torch.

    layouts(config, 2048, tp=8)        # every layout of that tp over exactly 2048 devices

Ways: tp splits every matrix but the experts' (Megatron-LM, arXiv 1909.08053, with sequence parallelism, 2205.05198), pp
the blocks (1F1B), ep the routed experts over the devices of a pipeline stage, dp the batch; ZeRO stage 1, 2, 3 shards
optimizer, gradients, weights over dp (1910.02054).
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.model.config import ModelConfig

Recompute = Literal["none", "selective", "full"]
Zero = Literal[0, 1, 2, 3]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


class Layout(Strict):
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
    if given.get("ep", 1) > 1 and not config.n_moe_layers:
        raise SlingshotError(f"ep {given['ep']}: this model has no experts; the nearest valid value is 1")

    def ways(name: str, devices: int) -> list[int]:
        if name == "pp":
            return [way for way in _divisors(devices) if way <= config.num_hidden_layers]
        split = config.num_attention_heads if name == "tp" else config.n_routed_experts if config.n_moe_layers else 1
        return _divisors(math.gcd(devices, split))

    shared = {"tp": count, "pp": count // given.get("tp", 1), "ep": count // given.get("pp", 1)}
    names = {"tp": "attention heads", "pp": "blocks", "ep": "experts"}
    for name, devices in shared.items():
        if name in given and given[name] not in (valid := ways(name, devices)):
            nearest = min(valid, key=lambda way: (abs(way - given[name]), way))
            what = f"{devices} devices and the model's {names[name]}"
            raise SlingshotError(f"{name} {given[name]} does not divide {what}; the nearest valid value is {nearest}")
    found = []
    for tp in (way for way in ways("tp", count) if given.get("tp", min(way, per_node)) == way):
        for pp in (way for way in ways("pp", count // tp) if given.get("pp", way) == way):
            dp = count // tp // pp
            zeros = (given["zero"],) if "zero" in given else (1, 2, 3) if dp > 1 else (0,)
            for ep in (way for way in ways("ep", dp * tp) if given.get("ep", way) == way):
                for recompute in (given["recompute"],) if "recompute" in given else RECOMPUTE:
                    found += [
                        Layout.model_construct(dp=dp, tp=tp, pp=pp, ep=ep, zero=zero, recompute=recompute)
                        for zero in zeros
                    ]
    if not found:
        raise SlingshotError(f"no layout over {count} devices has {given}; leave one of them open")
    return found


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
