"""A stage's command on any number of ranks: torchrun ... stage_ranks.py KIND CONFIG OUT TROUBLE. The last is JSON: for
one `rank` how it is in trouble."""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import slingshot


def die(log: Path, lines: int) -> None:
    while not (log.is_file() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    kind, config, out, trouble = sys.argv[1:]
    mine = json.loads(trouble)
    if mine.get("rank") != int(os.environ["RANK"]):
        mine = {}
    if lines := mine.get("dies_at"):
        threading.Thread(target=die, args=(Path(f"{out}.partial/metrics.jsonl"), lines), daemon=True).start()
    if size := mine.get("largest_file"):  # as on a full disk, writing fails
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if place := mine.get("works_in"):
        os.chdir(place)
    slingshot.__version__ = mine.get("version", slingshot.__version__)
    from slingshot.cli.main import main

    sys.argv = ["slingshot", kind, "--config", config, "--out", out, *mine.get("options", [])]
    main()
