"""One stage of RL on any number of ranks: torchrun ... rl_ranks.py CONFIG OUT; OUT.RANK tells a rank's process."""

import json
import os
import sys
from pathlib import Path

from slingshot.stages import rl

if __name__ == "__main__":
    Path(f"{sys.argv[2]}.{os.environ['RANK']}").write_text(str(os.getpid()))
    rl.run(rl.RLConfig.parse(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
