"""What serving needs of an engine: token ids in, deltas out, abort.

    async with contextlib.aclosing(backend.generate(Generation(ids, params, key="0"))) as deltas:
        async for delta in deltas: ...          # leaving early aborts the sample within a step

A backend runs in this process (local.py) or is a server somewhere else (upstream.py). It knows nothing of text, but
for what SamplingParams ask of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from slingshot.engine.sampling import SamplingParams
from slingshot.engine.scheduler import EngineCounters
from slingshot.engine.sequence import FinishReason


@dataclass
class Untold:
    """tokens: made of a sample whose reader left before they were told."""

    tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """One sample to be made.

    params: n is 1 and stop is empty: stop strings act on the answer, which the gateway reads. key: names the noise
    together with params.seed. salt: only prompts of the same one share cached prefixes. untold: for the backend.
    logprobs: whether anybody reads them; where nobody does, those of a delta may be 0. glass: tell the experts of each
    token and whether it was drafted, as far as the backend knows. said: so many of the prompt's last ids are the
    sample's own, from before. adapter: the name of what stands beside the engine's base, if anything.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    key: str
    salt: str = ""
    untold: Untold = field(default_factory=Untold)
    logprobs: bool = True
    glass: bool = False
    said: int = 0
    adapter: str | None = None


@dataclass(slots=True)  # unlike a frozen one it is made quickly
class TokenDelta:
    """What a sample grew by: at least a token, or its end.

    top_logprobs, experts ([layers][experts a token]), drafted: of each token, where asked for. The experts are those
    that made the token before it into this one; drafted: whether it was guessed before it was computed. cached: tokens
    of the prompt that were not computed. prompt_logprobs, where asked for, come with the first delta. waited: seconds
    in the backend's queue, as far as it tells.
    """

    token_ids: list[int]
    logprobs: list[float]
    cached: int = 0
    finish_reason: FinishReason | None = None
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    experts: list[list[list[int]]] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    waited: float = 0.0


class Backend(Protocol):
    """max_length: tokens of a prompt and its answer together at most. obstacle: why nothing can be asked any more, or
    at present; None: all is well. counters: of its engine; None: it is a server's elsewhere."""

    max_length: int

    @property
    def obstacle(self) -> str | None: ...

    @property
    def counters(self) -> EngineCounters | None: ...

    async def start(self) -> None:
        """Begin, in the event loop that asks; SlingshotError where that cannot be."""

    def generate(self, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        """Yield what one sample grows by; the last delta has a finish_reason. Closing it aborts the sample.

        Raises SlingshotError for what the engine refuses, ApiError 503 where it cannot be reached, 500 where it fails.
        """

    async def close(self) -> None:
        """Stop; samples on their way end with finish_reason "abort"."""
