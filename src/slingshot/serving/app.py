"""The HTTP API.

app = create_app(Gateway([ServedModel("tiny", tokenizer, backend)]))
uvicorn.run(app)
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from slingshot import __version__
from slingshot.base.errors import SlingshotError
from slingshot.serving.chat_completions import ChatCompletionRequest, chat_completion, chunks
from slingshot.serving.chat_page import serve_page
from slingshot.serving.errors import ApiError
from slingshot.serving.gateway import Gateway
from slingshot.serving.sse import ClientGone, event_stream, unless_gone


def create_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(title="slingshot", version=__version__, docs_url=None, redoc_url=None)
    _answer_errors(app)
    serve_page(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [
            {"id": model.name, "object": "model", "created": model.created, "owned_by": "slingshot"}
            for model in gateway.models.values()
        ]
        return {"object": "list", "data": data}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Any:
        exchange = gateway.ask(body.question())
        if not body.stream:
            return await unless_gone(request, chat_completion(exchange, body.logprobs))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return event_stream(chunks(exchange, body.logprobs, include_usage))

    return app


def _answer_errors(app: FastAPI) -> None:
    """Every error has a body as the API's clients know it."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(SlingshotError)
    async def impossible(request: Request, error: SlingshotError) -> Response:
        return JSONResponse(ApiError(400, str(error)).body, 400)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return JSONResponse(ApiError(400, message, param=where or None).body, 400)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it
