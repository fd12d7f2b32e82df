"""ASGI middleware for a server behind a proxy that serves it below a path."""

from __future__ import annotations

from compiledllm.server.security import App, Receive, Scope, Send


class BelowRoot:
    """Takes the prefix off a request's path, for proxies that leave it there."""

    def __init__(self, app: App, root_path: str) -> None:
        self._app = app
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._root or path.startswith(self._root + "/"):
            raw = scope.get("raw_path") or b""
            rest = raw.removeprefix(self._root.encode()) or b"/"
            scope = {**scope, "path": path.removeprefix(self._root) or "/", "raw_path": rest}
        await self._app(scope, receive, send)
