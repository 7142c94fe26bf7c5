"""All errors of the proxy; each class knows the HTTP status the client gets.

::

    ProxyError
    ├── ConfigError (ValueError)                      refused at start, never on the wire
    ├── InvalidRequestError (ValueError)       400    the client's input is at fault
    │   ├── UnauthorizedError                  401
    │   ├── BodyTooLargeError                  413
    │   ├── BodyTooSlowError (TimeoutError)    408
    │   ├── MediaFetchError                    400    an instance could not fetch the client's media URL
    │   ├── NotFoundError (LookupError)        404
    │   ├── MethodNotAllowedError              405
    │   ├── NotOfferedError                    501    instances may offer it, but not through a proxy
    │   └── ConflictError                      409    an operator's change that would leave a stage without instances
    ├── BusyError                          429    too many requests at once
    ├── UnavailableError                       503    no usable endpoint, or draining
    │   └── PrefillFailedError                 503    a prefill that may have begun did not end well
    ├── RefusedByBackendError                  as the backend said (4xx, and 5xx after the last attempt)
    └── BackendError                           502    the backend is at fault
        ├── BackendConnectError (ConnectionError)     502    no connection could be made
        │   └── BackendConnectTimeoutError     502    not in time: it, or this machine, may just be busy
        ├── BackendDisconnectError (ConnectionError)  502    the connection broke
        ├── BackendProtocolError               502    what it sent is not a usable answer
        └── BackendTimeoutError (TimeoutError) 504    it took too long
"""

from collections.abc import Iterable, Sequence

import orjson


class ProxyError(Exception):
    """Base of all; ``status``, ``kind`` and ``str(error)`` make the OpenAI-style JSON body.

    ``retry_after`` is what the header of this name says, where the status has one.
    """

    status = 500
    kind = "InternalServerError"
    retry_after = "1"

    def __init__(self, message: str) -> None:
        # It may quote a header, and these hold any bytes; JSON, and so answers and log lines, do not.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())

    def body(self) -> bytes:
        """Return the JSON body in the form OpenAI and vLLM use."""
        return error_body(str(self), self.kind, self.status)

    @property
    def detail(self) -> str:
        """What the log says; clients get ``str(error)``."""
        return str(self)

    @property
    def content_type(self) -> str:
        """Media type of :meth:`body`."""
        return "application/json"


class ConfigError(ProxyError, ValueError):
    """The configuration cannot work; carries every fault that was found."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


class InvalidRequestError(ProxyError, ValueError):
    """The client's input is at fault; the message says what was expected."""

    status = 400
    kind = "BadRequestError"


class UnauthorizedError(InvalidRequestError):
    """The client did not show a key that is known."""

    status = 401
    kind = "Unauthorized"


class BodyTooLargeError(InvalidRequestError):
    """The request body is over the limit."""

    status = 413
    kind = "RequestEntityTooLarge"


class BodyTooSlowError(InvalidRequestError, TimeoutError):
    """The request body did not come in time."""

    status = 408
    kind = "RequestTimeout"


class MediaFetchError(InvalidRequestError):
    """An instance could not fetch a media URL of the request. Only the log is told why."""

    def __init__(self, reason: str) -> None:
        super().__init__("a media URL of the request could not be fetched by the model server")
        self._reason = reason

    @property
    def detail(self) -> str:
        """What the log says."""
        return f"{self}: {self._reason}"


class NotFoundError(InvalidRequestError, LookupError):
    """There is nothing at this path."""

    status = 404
    kind = "NotFoundError"


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, the method does not; ``allowed`` is what the ``Allow`` header says."""

    status = 405
    kind = "MethodNotAllowed"

    def __init__(self, method: str, path: str, allowed: Iterable[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"{path} takes {self.allowed}, not {method}")


class NotOfferedError(InvalidRequestError, NotImplementedError):
    """Instances may offer this, but through a proxy it would not be what the client means."""

    status = 501
    kind = "NotImplementedError"


class ConflictError(InvalidRequestError):
    """An operator's change contradicts what there is."""

    status = 409
    kind = "Conflict"


class BusyError(ProxyError):
    """There are too many requests at once; trying again later will work."""

    status = 429
    kind = "TooManyRequests"


class UnavailableError(ProxyError):
    """No endpoint can take the request now; trying again later may work."""

    status = 503
    kind = "ServiceUnavailable"


class PrefillFailedError(UnavailableError):
    """A prefill that may have sent KV did not end well: its decode request can neither go on nor be prefilled again."""


class RefusedByBackendError(ProxyError):
    """A backend answered with an error status; passed on with its status and body, and with its ``retry_after``."""

    kind = "BackendRefused"

    def __init__(self, stage: str, status: int, body: bytes, content_type: str, retry_after: str = "") -> None:
        super().__init__(f"the {stage} instance answered {status}")
        self.status = status
        self.retry_after = retry_after or self.retry_after
        self._body = body
        self._content_type = content_type

    def body(self) -> bytes:
        """Return the backend's own body, or one of ours where it sent none."""
        return self._body or super().body()

    @property
    def content_type(self) -> str:
        """Media type of the backend's body."""
        return self._content_type if self._body else super().content_type


class BackendError(ProxyError):
    """A backend is at fault; ``backend`` is its base URL."""

    status = 502
    kind = "BadGateway"

    def __init__(self, backend: str, message: str) -> None:
        super().__init__(message)
        self.backend = backend


class BackendConnectError(BackendError, ConnectionError):
    """No connection to the backend could be made."""


class BackendConnectTimeoutError(BackendConnectError):
    """No connection came about in time: the backend, or this machine, may just be busy."""


class BackendDisconnectError(BackendError, ConnectionError):
    """The backend's connection broke before its answer was complete."""


class BackendProtocolError(BackendError):
    """What the backend sent is not a usable answer."""


class BackendTimeoutError(BackendError, TimeoutError):
    """The backend took longer than the stage allows."""

    status = 504
    kind = "GatewayTimeout"


def error_body(message: str, kind: str, status: int, param: str | None = None) -> bytes:
    """Return ``{"error": {message, type, param, code}}``, the form vLLM 0.23 answers with."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})
