"""What a benchmark for GPUs measures, it measures at a size of nothing on any machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_training_decoding_and_reinforcement_are_measured(tmp_path):
    def run(minutes):
        options = ["--shape", "tiny", "--rounds", "1", "--minutes", minutes, "--out", tmp_path / f"{minutes}.json"]
        command = [sys.executable, BENCHMARKS / "gpu_train.py", *options]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout

    run("60")
    parts = json.loads((tmp_path / "60.json").read_text())["parts"]
    assert len(parts) == 5 and all(parts[name]["mfu"] > 0 for name in parts if name.startswith("training"))
    assert 0 < parts["reinforcement"]["tokens_sampled"] <= 2 * 8 * 8 and "batch 4" in parts["decoding"]
    assert "reinforcement: left out, 0 minutes are over" in run("0") and not (tmp_path / "0.json").exists()
