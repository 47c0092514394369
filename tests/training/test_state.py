"""A state on disk, of one process; of several: tests/training/test_parallel.py and tests/stages/test_ranks.py."""

from pathlib import Path

import torch

from slingshot.base.config import StageConfig
from slingshot.training.checkpointer import Checkpointer, restore
from slingshot.training.optimizer import Optimizer, OptimizerConfig
from slingshot.training.parallel import Parallel


def test_a_state_that_was_taken_back_is_the_same_and_holds_no_file(make_model, deepseek, tmp_path):
    """A file that is open would take its room on the disk for as long as training lasts."""
    model, again = make_model(deepseek()), make_model(deepseek(), seed=1)
    optimizer, taken = (Optimizer(each, OptimizerConfig()) for each in (model, again))
    model(torch.arange(6)[None], mtp=True).logits_BTV.sum().backward()
    optimizer.step(1.0)
    with Checkpointer(tmp_path / "stage", "sft", StageConfig(save_seconds=0.0), Parallel()) as work:
        work.keep(1, lambda: work.training_state(model, optimizer))
        saved = work.load()
    assert saved.step == 1
    restore(saved, again, taken)
    assert "tensors.safetensors" not in Path("/proc/self/maps").read_text()
    for mine, its in ((model.state_dict(), again.state_dict()), (optimizer.state(), taken.state())):
        assert mine.keys() == its.keys() and all(torch.equal(tensor, its[name]) for name, tensor in mine.items())
