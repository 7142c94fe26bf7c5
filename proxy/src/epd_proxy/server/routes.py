"""Which handler a request is for."""

from collections.abc import Awaitable, Callable

from ..errors import MethodNotAllowedError, NotFoundError, ProxyError
from .request import Request
from .response import Response

Handler = Callable[[Request], Awaitable[Response | None]]
"""Answers a request; None when it has sent a :class:`Stream`."""

Refuse = Callable[[Request, ProxyError], Response]


class Routes:
    """Paths, each as it is, and one beginning for all others that have it. ``refuse`` answers where there is none."""

    def __init__(self, refuse: Refuse) -> None:
        self._exact: dict[str, dict[str, Handler]] = {}
        self._rest: tuple[str, str, Handler] | None = None
        self._refuse = refuse

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Have ``handler`` serve ``path``; GET includes HEAD."""
        methods = self._exact.setdefault(path, {})
        methods[method] = handler
        if method == "GET":
            methods["HEAD"] = handler

    def add_rest(self, start: str, name: str, handler: Handler) -> None:
        """Have ``handler`` serve what begins with ``start`` and goes on, by any method; logs call it ``name``."""
        self._rest = start, name, handler

    def handle(self, request: Request) -> Awaitable[Response | None]:
        """Have the request answered; its route is noted."""
        methods = self._exact.get(request.path)
        if methods and (handler := methods.get(request.method)):
            request.route = request.path
            return handler(request)
        if self._rest and request.path.startswith(self._rest[0]) and request.path != self._rest[0]:
            _, request.route, handler = self._rest
            return handler(request)
        return self._answer_unknown(request, methods or ())

    async def _answer_unknown(self, request: Request, methods: "dict[str, Handler] | tuple[()]") -> Response:
        if methods:
            request.route = request.path
            return self._refuse(request, MethodNotAllowedError(request.method, request.path, methods))
        return self._refuse(request, NotFoundError(f"there is nothing at {request.path}"))


def error_response(error: ProxyError, body: bytes | None = None) -> Response:
    """Return an error as an answer, with the headers that belong to its status; ``body`` where it has another form."""
    headers = [("Content-Type", kind)] if (kind := error.content_type) else []
    if isinstance(error, MethodNotAllowedError):
        headers.append(("Allow", error.allowed))
    elif error.status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    elif error.status in (429, 503):
        headers.append(("Retry-After", error.retry_after))
    return Response(error.status, error.body() if body is None else body, headers)
