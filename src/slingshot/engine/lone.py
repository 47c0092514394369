"""The step of the only sequence that runs, in one native call: forward pass, draws, what is kept of the guesses, and
the MTP module's next ones. At tiny's size Python around these would take longer than they do.

    decoder = LoneDecoder(runner)
    tokens = decoder.step(resident, position, table, most=4)      # (id, logprob) of each that counts, in order

The same as TorchRunner, RowSampler and Speculator do by turns: native/chain.cpp.
"""

from __future__ import annotations

import ctypes

import torch

from slingshot.engine.batch import PAGE
from slingshot.engine.native_runner import NativeRunner
from slingshot.engine.rows import Resident

CHAIN = 8  # native/model.h's


class NativeChain(ctypes.Structure):
    """native/model.h's Chain."""

    _fields_ = [
        *((name, ctypes.c_int) for name in (
            "tokens", "position", "pages", "threads", "most", "mtp_from", "mtp_page", "greedy",
        )),
        ("divisor", ctypes.c_float), ("top_p", ctypes.c_float), ("min_p", ctypes.c_float),
        ("top_k", ctypes.c_int64), ("stream", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("table", "cos", "sin", "keys", "values")),
        ("ids", ctypes.c_int64 * CHAIN), ("drawn", ctypes.c_int64 * CHAIN), ("logprobs", ctypes.c_float * CHAIN),
        ("taken", ctypes.c_int), ("guessed", ctypes.c_int), ("guesses", ctypes.c_int64 * CHAIN),
    ]  # fmt: skip


class LoneDecoder:
    """Steps of one plain sequence at a time over a runner's model and cache."""

    def __init__(self, runner: NativeRunner) -> None:
        self._runner, self._chain = runner, NativeChain()
        self._resident: Resident | None = None

    def step(self, resident: Resident, position: int, table: int, most: int) -> list[tuple[int, float]]:
        """Run its last token, at `position`, and its drafts; -> the tokens that count and their logprobs.

        table: the address of its page numbers. most: guesses for the next step; 0: the module stays out of it.
        Changes the resident's `guesses` and where the module is.
        """
        chain = self._chain
        if resident is not self._resident:
            self._take(resident)
        ids = chain.ids
        ids[0] = (resident.sequence.token_ids or resident.known)[-1]
        for place, draft in enumerate(resident.drafts, 1):
            ids[place] = draft
        chain.tokens, chain.position, chain.pages = 1 + len(resident.drafts), position, len(resident.pages)
        chain.threads, chain.table, chain.most = torch.get_num_threads(), table, most
        if most:
            if resident.mtp_next != position:
                resident.mtp_page = -(-position // PAGE)
                resident.mtp_next = resident.mtp_page * PAGE
            chain.mtp_page, chain.mtp_from = resident.mtp_page, resident.mtp_next
        self._runner.run_chain(chain, position + CHAIN)
        taken = chain.taken
        resident.guesses = chain.guesses[: chain.guessed]
        if most:
            resident.mtp_next = max(resident.mtp_next, position + taken)
        return list(zip(chain.drawn[:taken], chain.logprobs[:taken], strict=True))

    def _take(self, resident: Resident) -> None:
        self._resident, chain, params = resident, self._chain, resident.sequence.request.params
        chain.greedy, chain.divisor = params.temperature == 0, params.temperature or 1.0
        chain.top_p, chain.top_k, chain.min_p = params.top_p, params.top_k, params.min_p
        chain.stream = resident.sequence.stream
