"""What reading token shards takes: memory and seconds of a process that reads batches, without torch.

python benchmarks/shards.py --folder /tmp/shards --tokens 1_000_000_000      # 2 GB, made once; remove it after
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from slingshot.base.files import write_json
from slingshot.data.mixing import RowMix
from slingshot.data.shards import INDEX, ShardIndex, ShardWriter, TokenShards

EOS, LENGTH, BATCH, BATCHES = 1, 256, 32, 5000


def make(folder: Path, total: int) -> None:
    """Random ids in documents of about 500."""
    folder.mkdir(parents=True)
    writer, rng, documents = ShardWriter(folder, "tokens", 1 << 16, 1 << 24), np.random.default_rng(0), 0
    for start in range(0, total, 1 << 20):
        ids = rng.integers(2, 1 << 16, min(1 << 20, total - start), dtype=np.uint16)
        ids[rng.random(len(ids)) < 1 / 500] = ids[-1] = EOS
        writer.add(ids)
        documents += int((ids == EOS).sum())
    writer.flush()
    index = ShardIndex(
        tokenizer="none", eos_id=EOS, documents=documents, bytes=4 * total, heldout_bytes=0, tokens=writer.shards
    )
    write_json(folder / INDEX, index.model_dump())


def megabytes(key: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    asked = parser.parse_args()
    if not asked.folder.exists():
        make(asked.folder, asked.tokens)
        print(f"made {asked.folder}; run it again to measure")
        return
    before, begin = megabytes("VmRSS"), time.perf_counter()
    shards = TokenShards.open(asked.folder)
    mix = RowMix([shards.rows(LENGTH)], [1.0], seed=0)
    shards.read(mix.rows(0, BATCH)[1], LENGTH)
    first = time.perf_counter()
    for step in range(BATCHES):
        shards.read(mix.rows(step * BATCH, BATCH)[1], LENGTH)
    rate = BATCHES * BATCH * LENGTH / (time.perf_counter() - first)
    print(f"{shards.tokens:,} tokens, {len(shards.index.tokens)} shards; first batch after {first - begin:.3f} s")
    print(f"{BATCHES} batches of {BATCH} x {LENGTH}: {rate / 1e6:.1f}M tokens/s")
    print(f"resident {before:.0f} MB before, {megabytes('VmRSS'):.0f} MB after, {megabytes('VmHWM'):.0f} MB at most")


if __name__ == "__main__":
    main()
