"""An exchange as Anthropic's API tells it: a message of blocks, and the events by which they grow.

    answer = MessageAnswer(await gateway.ask(body.question(), account))
    await answer.whole(), or answer.events() where it is streamed

Reasoning comes as blocks of thinking. Their signature is the answer's id: nothing is checked when they come back.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from pydantic_core import from_json

from slingshot.serving.answer import Piece
from slingshot.serving.errors import ApiError
from slingshot.serving.exchange import Exchange
from slingshot.serving.sse import typed_event, typed_events

PING = 'event: ping\ndata: {"type": "ping"}\n\n'


def broken_off(error: ApiError) -> str:
    """The last event where an answer fails midway."""
    return typed_event(error.body_at("/v1/messages"))


class MessageAnswer:
    """An exchange told as a message's blocks, and as the events by which they grow."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # whether the last of them still grows

    async def whole(self) -> dict[str, Any]:
        """The message in one object."""
        async with contextlib.aclosing(self._events()) as events:
            async for _ in events:
                pass
        return self._message() | self._end() | {"usage": self._usage()}

    def events(self) -> AsyncGenerator[str, None]:
        """As server-sent events."""
        return typed_events(self._events())

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        begun = False
        async with contextlib.aclosing(self._exchange.pieces()) as pieces:
            async for _, piece in pieces:
                if not begun:
                    begun = True
                    yield {"type": "message_start", "message": self._message()}
                for event in self._grow(piece):
                    yield event
        if not begun:
            yield {"type": "message_start", "message": self._message()}
        for event in self._close_block():
            yield event
        yield {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _grow(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.call is not None:
            if piece.begins:
                yield from self._close_block()
                its = {"type": "tool_use", "id": piece.call.id, "name": piece.call.name}
                yield from self._open_block(its | {"input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": piece.text})
            if piece.ends:
                yield from self._close_block()
            return
        kind = "thinking" if piece.kind == "reasoning" else "text"
        if not self._open or self._blocks[-1]["type"] != kind:
            yield from self._close_block()
            yield from self._open_block({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
        self._blocks[-1][kind] += piece.text
        yield self._delta({"type": f"{kind}_delta", kind: piece.text})

    def _open_block(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._blocks.append(block)
        self._open = True
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _close_block(self) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        if self._blocks[-1]["type"] == "tool_use":
            with contextlib.suppress(ValueError):  # what is no JSON was told as it came; here an object must stand
                number = sum(block["type"] == "tool_use" for block in self._blocks) - 1
                arguments = self._exchange.answers[0].calls[number].arguments
                self._blocks[-1]["input"] = from_json(arguments, allow_partial=True)
        if self._blocks[-1]["type"] == "thinking":
            self._blocks[-1]["signature"] = self._exchange.id
            yield self._delta({"type": "signature_delta", "signature": self._exchange.id})
        self._open = False
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _message(self) -> dict[str, Any]:
        return {
            "id": f"msg_{self._exchange.id}",
            "type": "message",
            "role": "assistant",
            "model": self._exchange.model.name,
            "content": self._blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _end(self) -> dict[str, Any]:
        answer = self._exchange.answers[0]
        if answer.finish_reason == "length":
            reason = "max_tokens"
        elif answer.stopped is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if answer.calls and answer.calls[-1].whole else "end_turn"
        return {"stop_reason": reason, "stop_sequence": answer.stopped}

    def _usage(self) -> dict[str, Any]:
        """What came from the cache is not counted as input here."""
        usage = self._exchange.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.completion,
        }
