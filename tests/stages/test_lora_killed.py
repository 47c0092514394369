"""kill -9 in the middle of a stage with adapters, or of moving rounded numbers: it goes on bit for bit."""

import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from slingshot.stages import quantize, rl, sft

RUN = """
import sys
from pathlib import Path
from slingshot.stages.kinds import STAGES
from importlib import import_module
kind, config, out = sys.argv[1:]
import_module(STAGES[kind].module).run(STAGES[kind].config.model_validate_json(Path(config).read_text()), Path(out))
"""
LORA = {"rank": 4, "targets": ["attention", "mlp", "experts"]}


@pytest.fixture
def stages(training, tuning, full, stored, sums):
    """A stage of some twenty steps of each kind that trains adapters, saved after each; one over int4 numbers."""
    given = {"model": str(full), "tasks": [sums], "calibrate": 0, "problems": 1, "threads": 1, "save_seconds": 0.0}
    moved = {"distill": 20, "prompts_per_step": 4, "sampling": {"max_tokens": 12}}
    return {
        "distilled int4": (quantize, quantize.QuantizeConfig.parse(given | moved, "quantize")),
        "over int4": (sft, tuning(stored("int4"), epochs=4, save_seconds=0.0)),
        "rl": (rl, training(lora=LORA, loss={"kl": 0.01}, minibatches=2, steps=20, save_seconds=0.0)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rl", "over int4", "distilled int4"])
def test_a_stage_that_is_killed_goes_on_bit_for_bit(kind, stages, metrics, tmp_path):
    stage, config = stages[kind]
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", RUN, stage.__name__.rpartition(".")[2], tmp_path / "config.json", tmp_path / "out"]
    log = tmp_path / "out.partial" / "metrics.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 4):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "ended before it was killed"
    states = list(log.parent.glob("state-*/tensors.safetensors"))
    assert states
    if kind != "distilled int4":
        assert all(".lora_" in name for state in states for name in load_file(state))
    for folder in ("out", "whole"):
        stage.run(config, tmp_path / folder)
    alone = ["adapter_model.safetensors", "adapter_config.json"]
    files = {"over int4": alone, "distilled int4": ["model.safetensors"]}
    for file in files.get(kind, ["model.safetensors", *(f"adapter/{file}" for file in alone)]):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
