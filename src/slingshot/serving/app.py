"""The HTTP API.

    app = create_app(Gateway([ServedModel("tiny", tokenizer, backend)]))
    uvicorn.run(app)

Without a ledger, or with `keyless`, whoever comes without a key uses the local account.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from slingshot import __version__
from slingshot.base.errors import SlingshotError
from slingshot.serving.access_log import AccessLog, RequestWatch
from slingshot.serving.callers import Caller, KeyedRoute, Owner
from slingshot.serving.chat_completions import (
    ChatCompletionRequest,
    ToldToClient,
    chat_completion,
    chunks,
    error_events,
)
from slingshot.serving.chat_page import serve_page
from slingshot.serving.completions import CompletionRequest, completion, completion_chunks
from slingshot.serving.errors import ApiError
from slingshot.serving.gateway import Gateway
from slingshot.serving.guard import Guard, error_response
from slingshot.serving.ledger import Account
from slingshot.serving.message_answer import PING, MessageAnswer, broken_off
from slingshot.serving.messages import CountTokensRequest, MessageRequest
from slingshot.serving.prices import PICO
from slingshot.serving.response_answer import ResponseAnswer
from slingshot.serving.responses import ResponseRequest
from slingshot.serving.resumable import ResumableAnswers
from slingshot.serving.sse import ClientGone, event_stream, unless_gone
from slingshot.serving.status import StatusBoard
from slingshot.serving.tokenization import DetokenizeRequest, TokenizeRequest, tokenizer_info


class ControlRequest(BaseModel):
    """id: as the running answer's chunks carry it. stop: for an answer that would run on without its reader."""

    id: str
    action: Literal["reasoning_end", "stop"]


def create_app(
    gateway: Gateway,
    keyless: bool = True,
    also_reasoning: bool = False,
    hosts: frozenset[str] | None = None,
    log: AccessLog | None = None,
) -> FastAPI:
    """also_reasoning: reasoning is sent as `reasoning` too. hosts: names by which it may be called, None: any."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        await gateway.start()
        yield
        await gateway.close()

    app = FastAPI(title="slingshot", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.gateway, app.state.keyless = gateway, keyless
    board, kept = StatusBoard(gateway), ResumableAnswers(gateway.limits.resume)
    app.add_middleware(Guard, most=gateway.limits.body, hosts=hosts)
    app.add_middleware(RequestWatch, metrics=gateway.metrics, log=log)
    _answer_errors(app)
    serve_page(app)

    @app.get("/health")
    async def health() -> Response:
        why = gateway.obstacle
        return JSONResponse({"status": "failed", "reason": why} if why else {"status": "ok"}, 503 if why else 200)

    @app.get("/ready")
    async def ready() -> Response:
        why = "stopping" if gateway.draining else gateway.obstacle
        return JSONResponse({"status": "not ready", "reason": why} if why else {"status": "ok"}, 503 if why else 200)

    app.router.route_class = KeyedRoute

    @app.get("/metrics")
    async def metrics(account: Owner) -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status.json")
    async def status(account: Owner) -> dict[str, Any]:
        return await board.read()

    @app.get("/v1/models")
    async def models(account: Caller) -> dict[str, Any]:
        its = [gateway.card(model) for model in gateway.models.values() if account.may_use(model.name)]
        return {"object": "list", "data": its}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, account: Caller) -> dict[str, Any]:
        return gateway.card(gateway.model(name, account))

    @app.get("/v1/balance")
    async def balance(account: Caller) -> dict[str, Any]:
        left = await _balance(gateway, account)
        return {"object": "balance", "currency": "USD", "balance": left, "limited": left is not None}

    @app.get("/user/balance")
    async def deepseek_balance(account: Caller) -> dict[str, Any]:
        left = await _balance(gateway, account)
        told = "0.00" if left is None else f"{left:.2f}"
        info = {"currency": "USD", "total_balance": told, "granted_balance": "0.00", "topped_up_balance": told}
        return {"is_available": left is None or left > 0, "balance_infos": [info]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request, account: Caller) -> Any:
        told = ToldToClient(bool(body.logprobs), bool(body.glass), body.tells_usage, also_reasoning)
        exchange = await gateway.ask(body.question(), account)
        if not body.stream:
            return JSONResponse(await unless_gone(request, chat_completion(exchange, told)))
        events = chunks(exchange, told)
        if "x-resumable" in request.headers:
            events = kept.keep(exchange.id, account, events)
        return await event_stream(request, events, error_events)

    @app.get("/v1/chat/completions/{id}/events", response_model=None)
    async def events_again(id: str, request: Request, account: Caller, after: Annotated[int, Query(ge=0)] = 0) -> Any:
        return await event_stream(request, kept.find(id, account).read(after), error_events)

    @app.post("/v1/chat/completions/control")
    async def control(body: ControlRequest, account: Caller) -> dict[str, Any]:
        told: dict[str, Any] = {"id": body.id, "object": "chat.completion.control", "action": body.action}
        if body.action == "reasoning_end":
            return told | {"closed": gateway.find(body.id, account).answer_now()}
        kept.find(body.id, account).stop()
        return told

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request, account: Caller) -> Any:
        exchanges = await gateway.ask_all(body.questions(), account)
        if not body.stream:
            return JSONResponse(await unless_gone(request, completion(exchanges, body)))
        return await event_stream(request, completion_chunks(exchanges, body), error_events)

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponseRequest, request: Request, account: Caller) -> Any:
        answer = ResponseAnswer(await gateway.ask(body.question(), account), body)
        if not body.stream:
            return JSONResponse(await unless_gone(request, answer.whole()))
        return await event_stream(request, answer.events(), answer.failed, answer.waiting)

    @app.post("/v1/messages", response_model=None)
    async def messages(body: MessageRequest, request: Request, account: Caller) -> Any:
        answer = MessageAnswer(await gateway.ask(body.question(), account))
        if not body.stream:
            return JSONResponse(await unless_gone(request, answer.whole()))
        return await event_stream(request, answer.events(), broken_off, lambda: PING)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest, account: Caller) -> dict[str, Any]:
        return {"input_tokens": len(await gateway.encode(gateway.model(body.model, account), body.question()))}

    async def told(body: TokenizeRequest | DetokenizeRequest, account: Account) -> Response:
        """What takes long for long texts is done aside."""
        model = gateway.model(body.model or next(iter(gateway.models)), account)
        return await asyncio.to_thread(lambda: JSONResponse(body.answer(model)))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, account: Caller) -> Response:
        return await told(body, account)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, account: Caller) -> Response:
        return await told(body, account)

    @app.get("/tokenizer_info")
    async def info(account: Caller) -> dict[str, Any]:
        return tokenizer_info(gateway.model(next(iter(gateway.models)), account))

    return app


async def _balance(gateway: Gateway, account: Account) -> float | None:
    """Dollars that the account may still spend; None without limit."""
    if gateway.ledger is None:
        return None
    left = await gateway.ledger.aside(gateway.ledger.balance, account)
    return None if left is None else left / PICO


def _answer_errors(app: FastAPI) -> None:
    """Every error has a body as the API's clients know it."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error, request.url.path)

    @app.exception_handler(SlingshotError)
    async def impossible(request: Request, error: SlingshotError) -> Response:
        return error_response(ApiError(400, str(error)), request.url.path)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = str(first["msg"]).removeprefix("Value error, ")
        told = ApiError(400, f"{where}: {message}" if where else message, param=where or None)
        return error_response(told, request.url.path)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, str(error.detail)), request.url.path)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it
