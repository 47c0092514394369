"""What goes wrong with a request, as clients of OpenAI's and DeepSeek's API know it.

    raise ApiError(404, "there is no model 'x'; this server has tiny", code="model_not_found", param="model")

The body is {"error": {"message", "type", "param", "code"}} (OpenAI's; DeepSeek's has the same), and below /v1/messages
{"type": "error", "error": {"type", "message"}} (Anthropic's).
"""

from __future__ import annotations

import traceback
from typing import Any

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "insufficient_quota", 403: "permission_error",
    404: "not_found_error", 413: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error",
    500: "server_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip

_OF_MESSAGES = {
    402: "billing_error", 413: "request_too_large", 500: "api_error",
}  # fmt: skip


class ApiError(Exception):
    """A request that cannot be served. retry_after: seconds after which it may, where that is known."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after
        self.type = _TYPES.get(status, "api_error")

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body_at(self, path: str) -> dict[str, Any]:
        """As clients of this path read it. Claude Code shortens a conversation whose prompt is said to be too long."""
        if not path.startswith("/v1/messages"):
            return self.body
        long = "prompt is too long: " if self.code == "context_length_exceeded" else ""
        its = {"type": _OF_MESSAGES.get(self.status, self.type), "message": long + self.message}
        return {"type": "error", "error": its}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def places(error: BaseException) -> str:
    """The last lines of an error's traceback, for the log: its text may hold what was asked."""
    frames = traceback.extract_tb(error.__traceback__)
    return "; ".join(f"{frame.name}, {frame.filename}:{frame.lineno}" for frame in frames[-3:])
