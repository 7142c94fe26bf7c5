"""Logging: JSON lines for machines, plain lines on a terminal; one canonical line per request."""

import logging
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TextIO

import orjson

access_log = logging.getLogger("epd_proxy.access")
_ACCESS_MESSAGE = "request"


@dataclass(slots=True)
class AccessRecord:
    """What one request's log line says; the stages fill it in as the request travels. Times are monotonic seconds."""

    method: str
    path: str
    request_id: str
    started: float = field(default_factory=time.monotonic)
    client: str = ""
    key: str = ""
    trace_id: str = ""
    model: str = ""
    stream: bool = False
    items: int = 0
    encoded: int = 0
    encode_s: float = 0.0
    encode_endpoints: list[str] = field(default_factory=list)
    handshake: str = ""
    callback_s: float = 0.0
    prefill_s: float = 0.0
    prefill_endpoints: list[str] = field(default_factory=list)
    endpoint: str = ""
    attempts: int = 0
    first_byte_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    status: int = 0
    error: str = ""

    def elapsed_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.started

    def fields(self) -> dict[str, object]:
        """Return what is worth a place on the line; empty values are left out, times are rounded to 0.1 ms."""
        values: dict[str, object] = {
            "request_id": self.request_id, "method": self.method, "path": self.path, "status": self.status,
            "total_s": self.elapsed_s(), "first_byte_s": self.first_byte_s,
            "encode_s": self.encode_s, "model": self.model, "stream": self.stream, "items": self.items,
            "encoded": self.encoded, "encode_endpoints": self.encode_endpoints, "handshake": self.handshake,
            "callback_s": self.callback_s, "prefill_s": self.prefill_s,
            "prefill_endpoints": self.prefill_endpoints, "endpoint": self.endpoint, "attempts": self.attempts,
            "bytes_in": self.bytes_in, "bytes_out": self.bytes_out, "client": self.client, "key": self.key,
            "trace_id": self.trace_id, "error": self.error,
        }  # fmt: skip
        return {
            name: round(value, 4) if type(value) is float else value
            for name, value in values.items()
            if value or name == "status"
        }


class JsonFormatter(logging.Formatter):
    """One JSON object per line; the values of an access line become fields of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class TextFormatter(logging.Formatter):
    """A line that a person reads on a terminal."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, an access line's values appended as name=value."""
        line = super().format(record)
        fields: dict[str, object] = getattr(record, "fields", {})
        return line + "".join(f" {name}={value}" for name, value in fields.items())


class AccessHandler(logging.StreamHandler[TextIO]):
    """Writes an access line as the formatter would, without making a log record first: that takes twice as long."""

    def write(self, level: int, record: AccessRecord) -> None:
        """Write the line of ``record``."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": logging.getLevelName(level).lower(),
            "logger": access_log.name,
            "message": _ACCESS_MESSAGE,
            **record.fields(),
        }
        self.stream.write(orjson.dumps(line).decode() + self.terminator)
        self.flush()


def set_up(level: str, style: str, stream: TextIO | None = None) -> None:
    """Log to ``stream`` (standard error by default); ``style`` is json, text, or auto: text on a terminal only."""
    out = stream or sys.stderr
    handler = logging.StreamHandler(out)
    text = style == "text" or (style == "auto" and out.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if not text:
        access_log.handlers = [AccessHandler(out)]
        access_log.propagate = False
    # What no line of ours shows need not be found out for each ("Optimization" in logging's documentation).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


def log_access(record: AccessRecord) -> None:
    """Write the one canonical line of a finished request."""
    level = logging.WARNING if record.status >= 500 else logging.INFO
    if not access_log.isEnabledFor(level):
        return
    handler = access_log.handlers[0] if access_log.handlers else None
    if isinstance(handler, AccessHandler):
        handler.write(level, record)
    else:
        access_log.log(level, _ACCESS_MESSAGE, extra={"fields": record.fields()})
