"""What the plan says that training sends is what four processes send."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slingshot.cost.devices import device
from slingshot.planning.layout import Layout
from slingshot.planning.memory import PRECISIONS, Blocks
from slingshot.planning.network import transfers
from tests.planning.sent_ranks import CONFIG, CONTEXT, MICROBATCHES

SCRIPT = Path(__file__).with_name("sent_ranks.py")
RANKS = 4


@pytest.mark.slow
@pytest.mark.parametrize("shared", [1, 2, 4], ids=["dp 4", "dp 2 x ep 2", "ep 4"])
def test_four_processes_send_what_is_planned(shared, tmp_path):
    """A step with its MTP module in float32, weights gathered for every micro-batch, in bytes of a process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    done = subprocess.run([*torchrun, SCRIPT, tmp_path, str(shared)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    layout, blocks = Layout(dp=RANKS, ep=shared, zero=3), Blocks(CONFIG, PRECISIONS["float32"])
    sent = transfers(blocks, layout, device("h800"), tokens=RANKS * MICROBATCHES * CONTEXT, context=CONTEXT)
    planned = {transfer.purpose: transfer.n_bytes for transfer in sent}
    crossing = planned.pop("experts, within a node", 0.0)
    assert sum(rank.pop("experts", 0.0) for rank in ranks) / RANKS == pytest.approx(crossing, rel=0.1)
    assert sum(sum(rank.values()) for rank in ranks) / RANKS == pytest.approx(sum(planned.values()), rel=0.1)
