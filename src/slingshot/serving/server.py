"""The server's process: it listens, and on SIGTERM or Ctrl-C it ends the answers that run before it leaves.

with listening("127.0.0.1", 8000) as listener:
    DrainingServer(create_app(gateway), gateway).run([listener])
"""

from __future__ import annotations

import errno
import gc
import ipaddress
import logging
import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from slingshot.base.errors import SlingshotError
from slingshot.serving.gateway import Gateway

_LOG = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. SlingshotError where another has the port, or none may."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small packets at once (TCP_NODELAY) only where the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        way_out = f"port {port} is taken; choose another, such as --port {port + 1}, or --port 0 for a free one"
        reason = getattr(error, "strerror", None) or str(error)
        message = way_out if taken else f"{reason}; mend --host or --port"
        raise SlingshotError(f"cannot listen on {host}:{port}: {message}") from error
    return listener


class DrainingServer(uvicorn.Server):
    """The first signal to stop lets what runs come to its end, for `gateway.limits.drain` seconds; a second one does
    not wait. Meanwhile new questions are refused with 503, and /ready says that it is stopping."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, timeout_graceful_shutdown=1, server_header=False, backlog=2048
            )
        )
        self._gateway, self._deadline = gateway, float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what was loaded stays: it need not be walked through for what requests leave behind

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gateway.draining:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        self._gateway.draining = True
        self._deadline = time.monotonic() + self._gateway.limits.drain
        if running := self._gateway.running:
            _LOG.warning("stopping: %d answers come to their end; once more stops at once", running)

    async def on_tick(self, counter: int) -> bool:
        if self._gateway.draining and (not self._gateway.running or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)
