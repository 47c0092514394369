"""slingshot builds, owns and serves a DeepSeek-style reasoning model on the hardware its user has.

    import slingshot
    engine = slingshot.Engine.load("runs/tiny/rl_final")
    outputs = engine.generate(["What is 3+4-2?"], slingshot.SamplingParams(temperature=0.6))

Importing it is light: what it offers is loaded when it is first used.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is not light: programs of a few milliseconds start here
    from typing import Any

    from slingshot.checkpoint.load_save import load_model, load_tokenizer
    from slingshot.engine.engine import Engine
    from slingshot.engine.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams", "load_model", "load_tokenizer"]

_HOMES = {
    "Engine": "slingshot.engine.engine",
    "SamplingParams": "slingshot.engine.sampling",
    "load_model": "slingshot.checkpoint.load_save",
    "load_tokenizer": "slingshot.checkpoint.load_save",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slingshot' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
