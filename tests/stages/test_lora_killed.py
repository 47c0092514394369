"""kill -9 in the middle of a stage with adapters, or of moving rounded numbers: it goes on bit for bit."""

import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from slingshot.base.files import write_jsonl
from slingshot.stages import pretrain, quantize, rl, sft

RUN = """
import sys
from pathlib import Path
from slingshot.stages.kinds import STAGES
from importlib import import_module
kind, config, out = sys.argv[1:]
import_module(STAGES[kind].module).run(STAGES[kind].config.model_validate_json(Path(config).read_text()), Path(out))
"""
LORA = {"rank": 4, "targets": ["attention", "mlp", "experts"]}


@pytest.fixture(scope="module")
def small(pretraining, sums, tmp_path_factory):
    """What makes int4 of a model that is wide enough for it; and it is made."""
    folder = tmp_path_factory.mktemp("small")
    widths = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "v_head_dim": 16}
    pretrain.run(pretraining(model=pretraining().model | widths, steps=10), folder / "full")
    config = {"model": str(folder / "full"), "tasks": [sums], "calibrate": 0, "problems": 1, "threads": 1}
    quantize.run(quantize.QuantizeConfig.parse(config, "quantize"), folder / "int4")
    return config, folder / "int4"


@pytest.fixture
def stages(training, base, tmp_path, small):
    """A stage of some twenty steps of each kind that trains adapters, saved after each; one over int4 numbers."""
    loss, (given, int4) = {"kl": 0.01}, small
    lines = [{"prompt": f"{a}+{b}=", "reasoning": "so", "answer": str(a + b)} for a in range(9) for b in range(9)]
    write_jsonl(tmp_path / "data.jsonl", lines)
    data = {"model": str(base), "data": [str(tmp_path / "data.jsonl")], "dtype": "float32", "threads": 1}
    sizes = {"sequence_length": 48, "batch_size": 4, "epochs": 5, "lora": LORA, "save_seconds": 0.0}
    moved = {"distill": 20, "prompts_per_step": 4, "save_seconds": 0.0, "sampling": {"max_tokens": 12}}
    return {
        "distilled int4": (quantize, quantize.QuantizeConfig.parse(given | moved, "quantize")),
        "over int4": (sft, sft.SFTConfig.parse(data | sizes | {"model": str(int4)}, "sft")),
        "rl": (rl, training(lora=LORA, loss=loss, minibatches=2, steps=20, save_seconds=0.0)),
        "sft": (sft, sft.SFTConfig.parse(data | sizes, "sft")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rl", "sft", "over int4", "distilled int4"])
def test_a_stage_that_is_killed_goes_on_bit_for_bit(kind, stages, metrics, tmp_path):
    stage, config = stages[kind]
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [
        sys.executable,
        "-c",
        RUN,
        stage.__name__.rpartition(".")[2],
        str(tmp_path / "config.json"),
        str(tmp_path / "out"),
    ]
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stage.run(config, tmp_path / "whole")
    alone = ["adapter_model.safetensors", "adapter_config.json"]
    files = {"over int4": alone, "distilled int4": ["model.safetensors"]}
    for file in files.get(kind, ["model.safetensors", *(f"adapter/{file}" for file in alone)]):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
