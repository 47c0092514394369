"""How much a server takes on: what it holds a client to, and the queue before each model.

limits = Limits(queue_tokens=1 << 18)
place = WaitingRoom(limits.queue_tokens).enter(tokens, account)    # ApiError 429 or 503 where it is full
place.leave()                                                      # the first token is there, or the client is gone
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from slingshot.serving.errors import ApiError
from slingshot.serving.ledger import LOCAL, Account


@dataclass(frozen=True)
class Limits:
    """queue_tokens: of the prompts that wait for a model at most. first_token: seconds until it at most. drain: seconds
    that running answers have to end in when the server stops. body: bytes of a request at most. resume: seconds that an
    answer runs on for a client that may come back."""

    queue_tokens: int = 1 << 18
    first_token: float = 600.0
    drain: float = 30.0
    body: int = 16 << 20
    resume: float = 30.0


@dataclass(eq=False)
class Place:
    """A request's in the queue; it is left once, however often `leave` is called."""

    room: WaitingRoom
    account: Account
    tokens: int
    left: bool = False

    def leave(self, served: bool = False) -> None:
        """served: its first token came."""
        if not self.left:
            self.left = True
            self.room.left(self, served)


class WaitingRoom:
    """Requests of one model that have had no token yet, bounded by the tokens of their prompts.

    One is always let in where nobody waits. A key of its own may fill half of the room, so that the others find some.
    clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._tokens = Counter[str]()
        self._served: deque[tuple[float, int]] = deque(maxlen=64)  # when, and tokens of it

    @property
    def tokens(self) -> int:
        return self._tokens.total()

    def enter(self, tokens: int, account: Account) -> Place:
        waiting, its = self.tokens, self._tokens[account.id]
        if waiting and waiting + tokens > self._most:
            message = f"the server is busy: {waiting} tokens of prompts wait already; try again later"
            raise ApiError(503, message, code="overloaded", retry_after=self.seconds)
        if its and account != LOCAL and its + tokens > self._most // 2:
            message = f"this key has {its} tokens of prompts waiting already; wait for answers"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=self.seconds)
        self._tokens[account.id] += tokens
        return Place(self, account, tokens)

    def left(self, place: Place, served: bool) -> None:
        self._tokens[place.account.id] -= place.tokens
        if not self._tokens[place.account.id]:
            del self._tokens[place.account.id]
        if served:
            self._served.append((self._clock(), place.tokens))

    @property
    def seconds(self) -> int:
        """Until those who wait now are served, as far as the last ones tell; from 1 to 60."""
        if not self._served:
            return 1
        took = self._clock() - self._served[0][0]
        return max(1, min(60, math.ceil(self.tokens * took / sum(tokens for _, tokens in self._served))))
