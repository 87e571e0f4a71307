"""Who may talk to a vLLM server: callers that know the run's token. Put in front of the server by ``--middleware``.

vLLM's own ``--api-key`` guards generation, and leaves open what pauses the engine and replaces its weights.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import urllib.request
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

TOKEN = "MEGARL_ENGINE_TOKEN"  # in the server's environment: command lines can be read by everybody on the machine
# For calls of servers: a site's proxy for the internet knows nothing of them.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
Message = MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequireToken:
    """ASGI middleware: 401 for every request without ``Authorization: Bearer TOKEN``."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[TOKEN]}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._knows(scope):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"megarl: the run's token is missing or wrong"})
        elif scope["type"] in ("http", "lifespan"):
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    def _knows(self, scope: Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._expected)


def token_of(folder: Path) -> str:
    """The token of the servers that meet in a folder; made by whoever comes first, and readable by this user alone."""
    path = folder / "token"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".token-") as file:  # mode 600
            file.write(secrets.token_urlsafe(32))
            file.flush()
            try:
                os.link(file.name, path)  # whole, or not at all
            except FileExistsError:
                return path.read_text()  # another came first
    return path.read_text()
