"""Structures that strangers ask for: each is compiled in a process of its own first, which is killed where it is slow.

    careful = CarefulGrammars()
    grammar = await careful.compile(engine.grammars, structure)     # GrammarError for what is none, or takes too long

What passes there takes as little here. Small schemas without patterns, and small choices, are known to take no time:
where nothing else is asked for, the process is never started.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slingshot.engine.sampling import SamplingError, Structure
from slingshot.engine.structured import GrammarMatcher, Grammars, unusable
from slingshot.sandbox.worker import SandboxError, Target, WorkerPool

if TYPE_CHECKING:
    import xgrammar

SECONDS = 5.0  # to compile a structure, and to follow an answer's beginning
MOST = 1 << 18  # characters of one
_SMALL = 4096  # characters of one that needs no trial
_BEGINNING = 64  # tokens
_MEMORY = 8 << 30  # bytes of address space, of which torch takes most


class CarefulGrammars:
    """The process is started when it is first needed, and again where it was killed; one structure at a time."""

    def __init__(self) -> None:
        self._pool = WorkerPool(1)
        self.close = self._pool.close

    async def compile(self, grammars: Grammars, structure: Structure) -> xgrammar.CompiledGrammar:
        if found := grammars.kept(structure):
            return found
        kind, source = structure
        size = len(source) if isinstance(source, str) else sum(map(len, source))
        if size > MOST:
            raise unusable(structure, f"it has {size} characters, at most {MOST} are compiled")
        plain = kind in ("json_schema", "structural_tag") and "attern" not in source
        small = size <= _SMALL and (kind == "choice" or plain)
        if not small:
            texts = [text.decode("latin-1") for text in grammars.texts]
            target = Target(f"{__name__}:Trial", (texts, grammars.ends), timeout=SECONDS, memory=_MEMORY)
            tried = self._pool.submit(lambda worker: worker.call(target, "refusal", kind, source))
            try:
                refusal = await asyncio.wrap_future(tried)
            except SandboxError as error:
                raise unusable(structure, f"compiling it {error}; make it simpler") from error
            if refusal is not None:
                raise SamplingError(refusal)
        return await asyncio.to_thread(grammars.compile, structure)


class Trial:
    """In the process: compiles with a table of its own. texts: bytes as the characters of Latin-1."""

    def __init__(self, texts: Sequence[str], ends: Sequence[int]) -> None:
        os.nice(10)  # those who are answered come first
        self._grammars = Grammars([text.encode("latin-1") for text in texts], ends)

    def refusal(self, kind: str, source: str | list[str]) -> str | None:
        """Why it cannot be used."""
        structure = kind, source if isinstance(source, str) else tuple(source)
        try:
            grammar = self._grammars.compile(structure)
        except SamplingError as error:
            return str(error)
        matcher, draw = GrammarMatcher(grammar, self._grammars.size), random.Random(0)
        for _ in range(_BEGINNING):
            bits = np.unpackbits(matcher.mask().numpy().view(np.uint8), bitorder="little")
            bits[self._grammars.ends] = 0
            if not bits.any():
                break
            matcher.push(int(draw.choice(np.flatnonzero(bits))))
            if matcher.slow:
                return str(unusable(structure, "it takes too long to be followed; make it simpler"))
        return None
