"""Who calls: whose key a request carries, looked at before anything of its body is read.

app.router.route_class = KeyedRoute          # every door that is made from here on asks for a key
async def models(account: Caller): ...
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from slingshot.serving.access_log import REQUEST
from slingshot.serving.accounts import authenticate, is_ours
from slingshot.serving.errors import ApiError
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import LOCAL, Account


class KeyedRoute(APIRoute):
    """Refuses an unknown caller first: what a route depends on comes only after its body is read and parsed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def keyed(request: Request) -> Response:
            request.state.account = await _account(request)
            return await handle(request)

        return keyed


async def _account(request: Request) -> Account:
    """ApiError 401 where the key is none, 503 where the ledger cannot tell."""
    gateway: Gateway = request.app.state.gateway
    ledger = gateway.ledger
    if ledger is None:
        return LOCAL
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    bearer = secret.strip() if scheme.lower() == "bearer" else ""
    key = bearer or request.headers.get("x-api-key") or None
    keyless: bool = request.app.state.keyless
    account = LOCAL if keyless and not is_ours(key) else await ledger.aside(authenticate, ledger, key, keyless)
    if record := REQUEST.get():
        record.key = account.name
    return account


async def _caller(request: Request) -> Account:
    account: Account = request.state.account
    return account


Caller = Annotated[Account, Depends(_caller)]


async def _owner(request: Request, account: Caller) -> Account:
    """Who may look at what the whole server does; ApiError 403 for those who were given a balance."""
    ledger = request.app.state.gateway.ledger
    if ledger is not None and await ledger.aside(ledger.balance, account) is not None:
        raise ApiError(403, "this is for the server's owner: use a key without a balance", code="not_the_owner")
    return account


Owner = Annotated[Account, Depends(_owner)]
