"""What one request's line of the access log says, and the line."""

import time
from datetime import UTC, datetime
from typing import Any

import orjson

LOGGER = "epd_proxy.access"
MESSAGE = "request"


class AccessRecord:
    """What one request's log line says; the stages fill it in as the request travels. Times are monotonic seconds.

    What says nothing, by being empty or nought, is on no line.
    """

    def __init__(self, method: str, path: str, request_id: str) -> None:
        self.request_id = request_id
        self.method = method
        self.path = path
        self.started = time.monotonic()
        self.client = ""
        self.key = ""
        self.trace_id = ""
        self.model = ""
        self.stream = False
        self.items = 0
        self.encoded = 0
        self.encode_s = 0.0
        self.encode_endpoints: tuple[str, ...] = ()
        self.queue_s = 0.0
        self.handshake = ""
        self.callback_s = 0.0
        self.prefill_s = 0.0
        self.prefill_endpoints: tuple[str, ...] = ()
        self.endpoint = ""
        self.attempts = 0
        self.first_byte_s = 0.0
        self.bytes_in = 0
        self.bytes_out = 0
        self.status = 0
        self.error = ""

    def elapsed_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.started

    def fields(self) -> dict[str, Any]:
        """Return what the line says, in its order; times are rounded to 0.1 ms."""
        said = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "client": self.client,
            "key": self.key,
            "trace_id": self.trace_id,
            "model": self.model,
            "stream": self.stream,
            "items": self.items,
            "encoded": self.encoded,
            "encode_s": _rounded(self.encode_s),
            "encode_endpoints": self.encode_endpoints,
            "queue_s": _rounded(self.queue_s),
            "handshake": self.handshake,
            "callback_s": _rounded(self.callback_s),
            "prefill_s": _rounded(self.prefill_s),
            "prefill_endpoints": self.prefill_endpoints,
            "endpoint": self.endpoint,
            "attempts": self.attempts,
            "first_byte_s": _rounded(self.first_byte_s),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "error": self.error,
        }
        fields = {name: value for name, value in said.items() if value}
        fields["status"] = self.status
        fields["total_s"] = _rounded(self.elapsed_s())
        return fields


class AccessLines:
    """Writes records as lines of JSON, their time in UTC."""

    def __init__(self) -> None:
        self._second = 0
        self._time = ""

    def line(self, level: str, record: AccessRecord) -> bytes:
        """Return the line of ``record`` at this moment, with its newline."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second, self._time = second, datetime.fromtimestamp(second, UTC).isoformat()[:19]
        line = {
            "time": f"{self._time}.{int(now % 1 * 1000):03d}+00:00",
            "level": level,
            "logger": LOGGER,
            "message": MESSAGE,
            **record.fields(),
        }
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _rounded(time_s: float) -> float:
    return round(time_s, 4) if time_s else 0.0
