"""Tools of an MCP server (modelcontextprotocol.io), by its official SDK: a program to be started, or a URL.

    server = McpServer("npx -y @modelcontextprotocol/server-everything")      # or "https://example.org/mcp"
    server.tools()[0].call({"message": "hello"})

A program sees PATH and LANG of the environment and an empty home; `env KEY=VALUE program` gives it more. It is asked
for its tools and to call them, and may ask nothing back. One that dies is started again at the next call.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from slingshot.base.errors import SlingshotError
from slingshot.environments.tool import SECONDS, ToolError

T = TypeVar("T")

_START_SECONDS = 30.0
_PAGES, _MOST_TOOLS = 20, 128
_DESCRIPTION = 2000  # characters that a server may tell of a tool
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Ends with the worker that started it, even if that is killed; the worker's limit of address space is not its own.
_LAUNCH = """
import ctypes, os, resource, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error.strerror}")
"""


class McpServer:
    """Raises SlingshotError where the server does not start, or offers no tools."""

    def __init__(self, named: str) -> None:
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise SlingshotError(
                "tools of MCP servers need the mcp package: pip install 'slingshot-lm[mcp]'"
            ) from error
        if not shlex.split(named):
            raise SlingshotError("mcp: names no server; give mcp:COMMAND, or mcp:URL")
        self.named = named
        self._ends: contextlib.ExitStack | None = None  # of the thread that talks to it, where it runs
        self._loop: Any = None
        self._client: Any = None

    def tools(self) -> list[McpTool]:
        """What it offers now."""
        try:
            listed = self._ask(self._listed, _START_SECONDS)
        except ToolError as error:
            raise SlingshotError(f"mcp:{self.named}: {error}") from error
        if not listed:
            raise SlingshotError(f"mcp:{self.named}: offers no tools that could be called")
        return listed

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        result = self._ask(lambda client: client.call_tool(name, arguments), SECONDS)
        said = [_text(part) for part in result.content]
        if not said and result.structured_content is not None:
            said = [str(result.structured_content)]
        if result.is_error:
            raise ToolError("\n".join(said) or f"{name} failed without a word")
        return "\n".join(said)

    async def _listed(self, client: Any) -> list[McpTool]:
        tools, cursor = list[McpTool](), None
        for _ in range(_PAGES):  # a server may turn its pages for ever
            page = await client.list_tools(cursor=cursor)
            tools += [McpTool(self, each) for each in page.tools if _NAME.fullmatch(each.name)]
            cursor = page.next_cursor
            if cursor is None or len(tools) >= _MOST_TOOLS:
                break
        return tools[:_MOST_TOOLS]

    def _ask(self, question: Callable[[Any], Awaitable[T]], seconds: float) -> T:
        """The answer to a question to the server, which is started where it does not run."""
        import anyio

        async def bounded() -> T:
            with anyio.fail_after(seconds):
                return await question(self._client)

        try:
            if self._ends is None:
                self._start()
            answered: T = self._loop.call(bounded)
            return answered
        except Exception as error:
            if _is_refusal(error):
                raise ToolError(str(error)) from error
            self._close()
            first = _first(error)
            if isinstance(first, TimeoutError):
                raise ToolError(f"the server did not answer in {seconds:g} s") from error
            words = " ".join((str(first) or type(first).__name__).split())
            raise ToolError(f"the server failed: {words:.300}") from error

    def _start(self) -> None:
        """Connect, in a thread of its own. Who does not answer the first greeting in time is no server."""
        from anyio.from_thread import start_blocking_portal

        self._ends, connected = contextlib.ExitStack(), Future[Any]()
        self._loop = self._ends.enter_context(start_blocking_portal())
        running = self._loop.start_task_soon(self._live, connected)
        self._ends.callback(running.cancel)
        self._client = connected.result(_START_SECONDS)

    async def _live(self, connected: Future[Any]) -> None:
        """Hold the connection, until cancelled."""
        import anyio
        from mcp import Client, StdioServerParameters, stdio_client

        try:
            with open(os.devnull, "w") as nowhere:
                server: Any = self.named
                if not re.match(r"https?://", self.named):
                    inherited = {key: os.environ[key] for key in ("PATH", "LANG", "HOME", "TMPDIR")}
                    command = ["-c", _LAUNCH, *shlex.split(self.named)]
                    server = StdioServerParameters(command=sys.executable, args=command, env=inherited)
                    server = stdio_client(server, errlog=nowhere)
                async with Client(server) as client:
                    connected.set_result(client)
                    await anyio.sleep_forever()
        except Exception as error:
            if not connected.done():
                connected.set_exception(error)

    def _close(self) -> None:
        ends, self._ends = self._ends, None
        if ends is not None:
            with contextlib.suppress(Exception):  # what has failed may fail to close, too
                ends.close()


class McpTool:
    """A tool as a server tells of it; its schema and description are the server's words, and no more than words."""

    def __init__(self, server: McpServer, told: Any) -> None:
        self._server, self.name = server, told.name
        self.description = (told.description or told.title or told.name)[:_DESCRIPTION]
        shape = told.input_schema if isinstance(told.input_schema, Mapping) else {}
        properties = shape.get("properties")
        required = shape.get("required")
        self.parameters: Mapping[str, Any] = {
            "type": "object",
            "properties": _schemas(properties) if isinstance(properties, Mapping) else {},
            "required": [name for name in required if isinstance(name, str)] if isinstance(required, list) else [],
        }

    def call(self, arguments: dict[str, Any]) -> str:
        return self._server.call(self.name, arguments)


def _schemas(properties: Mapping[str, Any]) -> dict[str, Any]:
    """A schema may also be true: anything."""
    return {name: each if isinstance(each, Mapping) else {} for name, each in properties.items()}


def _text(part: Any) -> str:
    text = getattr(part, "text", None)
    return text if isinstance(text, str) else f"({getattr(part, 'type', 'something')}: this model reads text only)"


def _first(error: BaseException) -> BaseException:
    """Of a group the first of its errors."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _is_refusal(error: BaseException) -> bool:
    """Whether a server that lives said no, rather than that it could not be asked."""
    from mcp import MCPError
    from mcp.types import CONNECTION_CLOSED, REQUEST_TIMEOUT

    return isinstance(error, MCPError) and error.error.code not in (CONNECTION_CLOSED, REQUEST_TIMEOUT)
