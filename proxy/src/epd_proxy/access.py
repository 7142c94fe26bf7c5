"""What one request's line of the access log says, and the line."""

import time
from datetime import UTC, datetime
from typing import Any

import orjson

LOGGER = "epd_proxy.access"
MESSAGE = "request"
# The end of a time in UTC: to format a number takes longer than to look it up.
_MILLISECONDS = tuple(f".{number:03d}+00:00" for number in range(1000))


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
        return self.add_to({})

    def add_to(self, line: dict[str, Any]) -> dict[str, Any]:  # noqa: PLR0912 - to gather all and leave some out takes longer
        """Add what :meth:`fields` returns to ``line``, and return it."""
        line["request_id"] = self.request_id
        line["method"] = self.method
        line["path"] = self.path
        if self.client:
            line["client"] = self.client
        if self.key:
            line["key"] = self.key
        if self.trace_id:
            line["trace_id"] = self.trace_id
        if self.model:
            line["model"] = self.model
        if self.stream:
            line["stream"] = self.stream
        if self.items:
            line["items"] = self.items
        if self.encoded:
            line["encoded"] = self.encoded
        if encode_s := _rounded(self.encode_s):
            line["encode_s"] = encode_s
        if self.encode_endpoints:
            line["encode_endpoints"] = self.encode_endpoints
        if queue_s := _rounded(self.queue_s):
            line["queue_s"] = queue_s
        if self.handshake:
            line["handshake"] = self.handshake
        if callback_s := _rounded(self.callback_s):
            line["callback_s"] = callback_s
        if prefill_s := _rounded(self.prefill_s):
            line["prefill_s"] = prefill_s
        if self.prefill_endpoints:
            line["prefill_endpoints"] = self.prefill_endpoints
        if self.endpoint:
            line["endpoint"] = self.endpoint
        if self.attempts:
            line["attempts"] = self.attempts
        if first_byte_s := _rounded(self.first_byte_s):
            line["first_byte_s"] = first_byte_s
        if self.bytes_in:
            line["bytes_in"] = self.bytes_in
        if self.bytes_out:
            line["bytes_out"] = self.bytes_out
        if self.error:
            line["error"] = self.error
        line["status"] = self.status
        line["total_s"] = _rounded(self.elapsed_s())
        return line


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
        line: dict[str, Any] = {
            "time": self._time + _MILLISECONDS[int((now - second) * 1000)],
            "level": level,
            "logger": LOGGER,
            "message": MESSAGE,
        }
        return orjson.dumps(record.add_to(line), option=orjson.OPT_APPEND_NEWLINE)


def _rounded(time_s: float) -> float:
    return int(time_s * 10_000 + 0.5) / 10_000  # round() writes it as text and reads that
