"""An exchange as the Responses API tells it: items, and the events by which they grow.

answer = ResponseAnswer(await gateway.ask(body.question(), account), body)
await answer.whole(), or answer.events() where it is streamed
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from slingshot.serving.answer import AnsweredCall, Piece
from slingshot.serving.errors import ApiError
from slingshot.serving.exchange import Exchange
from slingshot.serving.question import Question
from slingshot.serving.responses import ResponseRequest
from slingshot.serving.sse import typed_event, typed_events


class ResponseAnswer:
    """An exchange told as a response's items, and as the events by which they grow."""

    def __init__(self, exchange: Exchange, body: ResponseRequest) -> None:
        self._exchange, self._body = exchange, body
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None  # the one that grows
        self._text = ""
        self._told = 0  # events
        self._begun = False  # whether a client knows that there is an answer

    async def whole(self) -> dict[str, Any]:
        """The response in one object."""
        response: dict[str, Any] = {}
        async with contextlib.aclosing(self._events()) as events:
            async for event in events:
                response = event.get("response", response)
        return response

    def events(self) -> AsyncGenerator[str, None]:
        """As server-sent events."""
        return typed_events(self._events())

    def failed(self, error: ApiError) -> str:
        """The last event where an answer breaks off."""
        its = {"error": {"code": error.code or "server_error", "message": error.message}}
        return typed_event(self._event("response.failed", response=self._response("failed") | its))

    def waiting(self) -> str:
        """What breaks a silence: the Codex CLI counts events, and gives up where comments alone come."""
        return typed_event(self._begin())

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        async with contextlib.aclosing(self._exchange.pieces()) as pieces:
            async for _, piece in pieces:
                if not self._begun:
                    yield self._begin()
                    yield self._begin()
                for event in self._grow(piece):
                    yield event
        if not self._begun:
            yield self._begin()
        status = "incomplete" if self._exchange.answers[0].finish_reason == "length" else "completed"
        for event in self._end_item(status):
            yield event
        yield self._event(f"response.{status}", response=self._response(status))

    def _begin(self) -> dict[str, Any]:
        kind, self._begun = "in_progress" if self._begun else "created", True
        return self._event(f"response.{kind}", response=self._response("in_progress"))

    def _grow(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.call is not None:
            if piece.begins:
                yield from self._end_item()
                yield from self._begin_call(piece.call)
            self._text += piece.text
            yield self._of_item("response.function_call_arguments.delta", delta=piece.text)
            if piece.ends:
                yield from self._end_item()
            return
        kind = "reasoning" if piece.kind == "reasoning" else "message"
        if self._item is None or self._item["type"] != kind:
            yield from self._end_item()
            yield from self._begin_item(kind)
        self._text += piece.text
        yield self._of_part(f"response.{_PARTS[kind]}.delta", delta=piece.text, **_LOGPROBS[kind])

    def _begin_item(self, kind: str) -> Iterator[dict[str, Any]]:
        reasoning = kind == "reasoning"
        more: dict[str, Any] = {"summary": []} if reasoning else {"role": "assistant"}
        self._item, self._text = {"id": self._id("rs" if reasoning else "msg"), "type": kind} | more, ""
        item = self._item | {"content": [], "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=len(self._output), item=item)
        yield self._of_part("response.content_part.added", part=self._part())

    def _end_item(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        if self._item is None:
            return
        kind = self._item["type"]
        if kind == "function_call":
            its = {"name": self._item["name"], "arguments": self._text}
            yield self._of_item("response.function_call_arguments.done", **its)
            yield from self._end(self._item | {"arguments": self._text, "status": status})
            return
        yield self._of_part(f"response.{_PARTS[kind]}.done", text=self._text, **_LOGPROBS[kind])
        yield self._of_part("response.content_part.done", part=self._part())
        yield from self._end(self._item | {"content": [self._part()], "status": status})

    def _end(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._item = None
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _begin_call(self, call: AnsweredCall) -> Iterator[dict[str, Any]]:
        its = {"id": self._id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        self._item, self._text = its, ""
        item = its | {"arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _of_item(self, kind: str, **more: Any) -> dict[str, Any]:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self._output), **more)

    def _part(self) -> dict[str, Any]:
        """What the item at hand says so far."""
        assert self._item is not None
        kind = self._item["type"]
        part: dict[str, Any] = {"type": _PARTS[kind], "text": self._text, **_LOGPROBS[kind]}
        return part if kind == "reasoning" else part | {"annotations": []}

    def _of_part(self, kind: str, **more: Any) -> dict[str, Any]:
        return self._of_item(kind, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        number, self._told = self._told, self._told + 1
        return {"type": kind, "sequence_number": number, **more}

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._exchange.id}_{len(self._output)}"

    def _response(self, status: str) -> dict[str, Any]:
        body, question, usage = self._body, self._exchange.question, self._exchange.usage
        wanted = body.response_format
        told = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        }
        return {
            "id": f"resp_{self._exchange.id}",
            "object": "response",
            "created_at": self._exchange.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "max_output_tokens": body.max_output_tokens,
            "model": self._exchange.model.name,
            "output": self._output,
            "parallel_tool_calls": question.parallel,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": question.params.temperature,
            "text": {"format": {"type": "text" if wanted is None else wanted.type}},
            "tool_choice": _choice(question),
            "tools": [_told_tool(tool["function"], question) for tool in question.tools],
            "top_p": question.params.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else told,
        }


def _choice(question: Question) -> Any:
    name = question.function
    return question.tool_choice if name is None else {"type": "function", "name": name}


def _told_tool(function: dict[str, Any], question: Question) -> dict[str, Any]:
    return {"type": "function", "strict": function["name"] in question.strict, **function}


_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}  # what an item's text is called
_LOGPROBS: dict[str, dict[str, Any]] = {"reasoning": {}, "message": {"logprobs": []}}
