"""Cross-origin requests: which pages' scripts may call the proxy from a browser."""

from collections.abc import Awaitable, Callable

from aiohttp import web

# For how long a browser may remember a preflight's answer; Chromium caps it at 7200 s.
_REMEMBER_S = 7200
_READABLE = "X-Request-Id, Retry-After"
_METHODS = "GET, POST, DELETE, OPTIONS"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Cors:
    """Answers preflights and marks responses for the known origins. Without origins it is not installed at all."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def install(self, app: web.Application) -> None:
        """Add it to ``app``. To be called before other middlewares are added: preflights carry no key."""
        app.middlewares.append(self._answer_preflights)
        app.on_response_prepare.append(self._mark)

    @web.middleware
    async def _answer_preflights(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return await handler(request)
        response = web.Response(status=204)
        if self._knows(request.headers.get("Origin", "")):
            response.headers["Access-Control-Allow-Methods"] = _METHODS
            response.headers["Access-Control-Allow-Headers"] = request.headers.get(
                "Access-Control-Request-Headers", "*"
            )
            response.headers["Access-Control-Max-Age"] = str(_REMEMBER_S)
        return response

    async def _mark(self, request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin", "")
        if not self._any:
            response.headers["Vary"] = "Origin"
        if self._knows(origin):
            response.headers["Access-Control-Allow-Origin"] = "*" if self._any else origin
            response.headers["Access-Control-Expose-Headers"] = _READABLE

    def _knows(self, origin: str) -> bool:
        return bool(origin) and (self._any or origin in self._origins)
