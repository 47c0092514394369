"""From a question to its exchange: whether it may be asked, the prompt rendered and checked, its tokens reserved.

    gateway = Gateway([ServedModel("tiny", tokenizer, backend)], ledger)
    exchange = await gateway.ask(question, account)

An answer that would be longer than what the context has left ends there, with finish_reason "length"; only a prompt
that leaves no room for a token is refused. Nothing is cut silently.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean
from slingshot.serving.access_log import REQUEST
from slingshot.serving.errors import ApiError
from slingshot.serving.exchange import Exchange
from slingshot.serving.ledger import LOCAL, Account, Ledger
from slingshot.serving.load import Limits, WaitingRoom
from slingshot.serving.metrics import Metrics
from slingshot.serving.question import Question
from slingshot.serving.served_model import ServedModel

_LOG = logging.getLogger(__name__)
_LONG = 20_000  # characters of a prompt that are tokenized aside, while others go on


class Gateway:
    """The models that are served, and the way to them. Without a ledger nothing is booked.

    apart: keys share no cached prefixes. draining: nothing new is taken on.
    """

    def __init__(
        self,
        models: Iterable[ServedModel],
        ledger: Ledger | None = None,
        limits: Limits | None = None,
        apart: bool = False,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.ledger, self.limits, self.draining = ledger, limits or Limits(), False
        self._apart = apart
        self.waiting = {name: WaitingRoom(self.limits.queue_tokens) for name in self.models}
        self.failed: SlingshotError | None = None  # why it could not start
        self._running: dict[str, tuple[Exchange, Account]] = {}
        self._ticking: asyncio.Task[None] | None = None
        # Prompts aside: whoever comes meanwhile would wait for them, since chats are rendered in turn.
        self._encoding = 0
        self.metrics = Metrics(self)

    @property
    def running(self) -> int:
        """Exchanges that were begun and are not booked yet."""
        return len(self._running)

    @property
    def running_models(self) -> list[str]:
        """The model of each of them."""
        return [exchange.model.name for exchange, _ in self._running.values()]

    @property
    def obstacle(self) -> str | None:
        """Why a model can answer nothing any more; None: all is well."""
        return next((why for model in self.models.values() if (why := model.backend.obstacle)), None)

    def model(self, name: str, account: Account = LOCAL) -> ServedModel:
        if name not in self.models:
            hint = did_you_mean(name, list(self.models))
            raise ApiError(404, f"there is no model {name!r}; {hint}", code="model_not_found", param="model")
        if not account.may_use(name):
            known = ", ".join(account.models or ()) or "none"
            message = f"this key may not use the model {name!r}; it may use {known}"
            raise ApiError(403, message, code="model_not_allowed", param="model")
        return self.models[name]

    async def ask(self, question: Question, account: Account = LOCAL) -> Exchange:
        """Begin an exchange, whose `pieces` must be taken; ApiError where the question cannot be answered."""
        if self.draining:
            raise ApiError(503, "the server is stopping; ask another one", code="stopping", retry_after=5)
        began, record = time.perf_counter(), REQUEST.get()
        model = self.model(question.model, account)
        if record is not None:
            record.model = model.name
        if model.backend.obstacle:
            raise ApiError(503, model.backend.obstacle, code="unavailable", retry_after=5)
        prompt_ids = await self.encode(model, question)
        room = model.backend.max_length - len(prompt_ids)
        if room < 1:
            full = f"the prompt has {len(prompt_ids)} tokens, this model's context {model.backend.max_length}"
            message = f"{full}: no room for an answer is left; shorten the prompt"
            raise ApiError(400, message, code="context_length_exceeded", param="messages")
        if not prompt_ids:
            raise ApiError(400, "the prompt is empty: nothing says where to begin", param="prompt")
        most = min(room, question.most or room)
        params, samples = model.params(question, prompt_ids, most), question.params.n
        place = self.waiting[model.name].enter(len(prompt_ids) + samples, account)
        salt = question.user if not self._apart else f"{account.id}\n{question.user}"
        meter = self.metrics.meters[model.name]
        exchange = Exchange(model, question, prompt_ids, params, place, self.limits.first_token, meter, began, salt)
        if record is not None:
            exchange.id = record.id + (str(len(record.exchanges)) if record.exchanges else "")
        try:
            if self.ledger is not None:
                asked = account, model.name, len(prompt_ids), most * samples, exchange.id
                exchange.reservation = await self.ledger.aside(self.ledger.reserve, *asked)
        except BaseException:
            place.leave()
            raise
        if record is not None:
            record.exchanges.append(exchange)
        self._running[exchange.id] = exchange, account
        exchange.on_end = self._forget
        return exchange

    def card(self, model: ServedModel) -> dict[str, Any]:
        """As GET /v1/models tells of it, with its price of the moment in dollars per million tokens."""
        price = {} if self.ledger is None else self.ledger.prices.of(model.name).at(datetime.now(UTC))
        return model.card | ({"price": price} if any(price.values()) else {})

    async def ask_all(self, questions: Iterable[Question], account: Account = LOCAL) -> list[Exchange]:
        """Several at once, all of them or none."""
        exchanges = list[Exchange]()
        try:
            for question in questions:
                exchanges.append(await self.ask(question, account))
        except BaseException:
            for exchange in exchanges:
                await exchange.close()
            raise
        return exchanges

    def find(self, exchange_id: str, account: Account) -> Exchange:
        """A running exchange of this account's, by the id that its answer carries; ApiError 404 for none."""
        exchange, owner = self._running.get(exchange_id.rpartition("-")[2].rpartition("_")[2], (None, account))
        if exchange is None or owner.id != account.id:
            raise ApiError(404, f"no answer {exchange_id!r} is running", code="not_found", param="id")
        return exchange

    async def start(self) -> None:
        """Begin, in the event loop that serves: backends, and the ledger's signs of life."""
        for model in self.models.values():
            try:
                await model.backend.start()
            except SlingshotError as error:
                self.failed = error
                raise
        if self.ledger is not None:
            self._ticking = asyncio.create_task(self._tick(self.ledger))

    async def close(self) -> None:
        """Stop the backends, and book what they end."""
        for model in self.models.values():
            await model.backend.close()
        for _ in range(200):
            if self._running:
                await asyncio.sleep(0.01)
        if self._ticking is not None:
            self._ticking.cancel()

    async def _tick(self, ledger: Ledger) -> None:
        for second in itertools.count():
            try:
                await ledger.aside(ledger.tick)
                if second % 15 == 0:
                    await ledger.aside(ledger.settle_dead)
            except Exception as error:  # the database may come back
                _LOG.error("the ledger does not answer: %s", type(error).__name__)
            await asyncio.sleep(1.0)

    def _forget(self, exchange: Exchange) -> None:
        self._running.pop(exchange.id, None)

    async def encode(self, model: ServedModel, question: Question) -> list[int]:
        """The prompt's ids; ApiError 400 where there can be none."""
        said = question.prompt if question.messages is None else question.messages
        if not self._encoding and len(str(said)) <= _LONG:
            return model.encode(question)
        self._encoding += 1
        try:
            return await asyncio.to_thread(model.encode, question)
        finally:
            self._encoding -= 1
