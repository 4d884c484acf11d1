"""A crowd of new requests and the tokens of those that run take turns."""

import asyncio
from collections import deque

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

_AT_ONCE = 64  # beginning takes some 0.3 ms each


class Turns:
    """Begins a few dozen requests for work between two looks at the sockets (ASGI middleware); others are short.

    An event loop does all that is due before it looks: hundreds of requests that come at once would be read to the last
    before the first token of anyone's goes out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._left = _AT_ONCE
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI) in its turn."""
        if scope["type"] == "http" and scope["method"] == "POST":
            await self._turn()
        await self._app(scope, receive, send)

    async def _turn(self) -> None:
        if self._left == _AT_ONCE:
            asyncio.get_running_loop().call_soon(self._look_again)
        if self._left and not self._waiting:
            self._left -= 1
            return
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting

    def _look_again(self) -> None:
        """The sockets were looked at: as many again may begin, those that wait first."""
        self._left = _AT_ONCE
        while self._waiting and self._left:
            waiting = self._waiting.popleft()
            if not waiting.done():  # it may be cancelled
                waiting.set_result(None)
                self._left -= 1
        if self._left < _AT_ONCE:
            asyncio.get_running_loop().call_soon(self._look_again)


def take_turns(app: FastAPI) -> None:
    """Have the application's requests begin in turns."""
    app.add_middleware(Turns)
