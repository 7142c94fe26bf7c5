"""Cross-origin requests: which pages' scripts may call the proxy from a browser."""

from collections.abc import Awaitable

from .server import Handler, Headers, Request, Response

# For how long a browser may remember a preflight's answer; Chromium caps it at 7200 s.
_REMEMBER_S = 7200
_READABLE = "X-Request-Id, Retry-After"
_METHODS = "GET, POST, DELETE, OPTIONS"


class Cors:
    """Answers preflights, which carry no key, and marks responses for the known origins."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def answer_preflights(self, others: Handler) -> Handler:
        """Return a handler of preflights that leaves all else to ``others``."""

        def handle(request: Request) -> Awaitable[Response | None]:
            if request.method != "OPTIONS" or "access-control-request-method" not in request.headers:
                return others(request)
            return self._answer(request)

        return handle

    def mark(self, request: Request) -> Headers:
        """Return the headers that any response to ``request`` gets."""
        origin = request.headers.get("origin", "")
        headers = [] if self._any else [("Vary", "Origin")]
        if self._knows(origin):
            headers.append(("Access-Control-Allow-Origin", "*" if self._any else origin))
            headers.append(("Access-Control-Expose-Headers", _READABLE))
        return headers

    async def _answer(self, request: Request) -> Response:
        if not self._knows(request.headers.get("origin", "")):
            return Response(204)
        asked = request.headers.get("access-control-request-headers", "*")
        return Response(204, headers=[
            ("Access-Control-Allow-Methods", _METHODS), ("Access-Control-Allow-Headers", asked),
            ("Access-Control-Max-Age", str(_REMEMBER_S)),
        ])  # fmt: skip

    def _knows(self, origin: str) -> bool:
        return bool(origin) and (self._any or origin in self._origins)
