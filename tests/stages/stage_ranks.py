"""One stage on any number of ranks: torchrun ... stage_ranks.py KIND CONFIG OUT [RANK LINES]: that rank is killed as
soon as so many steps are logged."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from slingshot.stages.kinds import STAGES


def die(log: Path, lines: int) -> None:
    while not (log.is_file() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    kind, config, out, *killed = sys.argv[1:]
    if killed and killed[0] == os.environ["RANK"]:
        log = Path(f"{out}.partial/metrics.jsonl")
        threading.Thread(target=die, args=(log, int(killed[1])), daemon=True).start()
    stage = STAGES[kind]
    stage.run(stage.config.parse(json.loads(Path(config).read_text())), Path(out))
