"""Bills that others published, to stand beside plans of the same work. No torch."""

from __future__ import annotations

from slingshot.base.config import Strict
from slingshot.model.config import ModelConfig


class PublishedBill(Strict):
    """Device-hours by stage, named as plans name them, of training on so many tokens; `price` is the source's own."""

    source: str
    device: str
    tokens: float
    device_hours: dict[str, float]
    price: float | None = None


PUBLISHED = {
    "deepseek-v3": PublishedBill(
        source="DeepSeek-V3, arXiv 2412.19437, Table 1", device="h800", tokens=14.8e12, price=2.0,
        device_hours={"pre-training": 2664e3, "context extension": 119e3, "post-training": 5e3},
    ),
    "llama-3.1-405b": PublishedBill(
        source="Llama 3.1's model card, tokens by arXiv 2407.21783, 3.2", device="h100", tokens=15.6e12,
        device_hours={"pre-training": 30.84e6},
    ),
}  # fmt: skip


def published(config: ModelConfig, model: str, device: str, tokens: float) -> PublishedBill | None:
    """What was published of training this preset on these devices with as many tokens, a percent more or less."""
    bill = PUBLISHED.get(model)
    if bill is None or bill.device != device or abs(tokens / bill.tokens - 1) >= 0.01:
        return None
    return bill if config == ModelConfig.preset(model) else None
