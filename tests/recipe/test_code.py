"""The recipe `code`, shortened: a base, then reinforcement learning on what programs earn."""

import subprocess
import sys

import pytest

from slingshot.base.files import read_jsonl


@pytest.mark.slow
def test_the_recipe_code_runs_to_its_report(tmp_path):
    few = ["base.steps=2", "base.batch_size=4", "base.documents.count=60", "base.evaluation=false"]
    few += ["rl.steps=1", "rl.prompts_per_step=2", "rl.group_size=2", "evaluation.problems=2"]
    command = [sys.executable, "-m", "slingshot", "run", "code", *few, "--out", tmp_path / "run"]
    subprocess.run(command, check=True, timeout=600)
    (row,) = read_jsonl(tmp_path / "run" / "rl" / "metrics.jsonl")
    assert row["step"] == 1 and (tmp_path / "run" / "report.html").is_file()
