"""Logging: JSON lines for machines, plain lines on a terminal; one canonical line per request."""

import asyncio
import contextlib
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

import orjson

from .access import LOGGER, MESSAGE, AccessLines, AccessRecord

access_log = logging.getLogger(LOGGER)
_FLUSH_S = 0.1
_LINES_MAX = 256


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


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes access lines as :class:`JsonFormatter` would, without making log records first, many at a time.

    A record and a system call for each line would take longer than all else that is done for it. A line waits for
    :data:`_FLUSH_S` at most; what is logged in the usual way is written after the access lines before it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[bytes] = []
        self._access = AccessLines()

    def write(self, level: int, record: AccessRecord) -> None:
        """Write the line of ``record``, soon. Needs a running loop."""
        line = self._access.line("warning" if level == logging.WARNING else "info", record)
        with self.lock or contextlib.nullcontext():  # other threads log too
            self._lines.append(line)
            waiting = len(self._lines)
        if waiting == 1:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        elif waiting >= _LINES_MAX:
            self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Write what waits, then the record."""
        self.flush()
        super().emit(record)

    def flush(self) -> None:
        """Write what waits. Where that fails (the disk is full, the reader is gone) lines are lost, and no request."""
        with self.lock or contextlib.nullcontext(), contextlib.suppress(OSError, ValueError):
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write(b"".join(lines).decode())
            super().flush()


def set_up(level: str, style: str, stream: TextIO | None = None) -> None:
    """Log to ``stream`` (standard error by default); ``style`` is json, text, or auto: text on a terminal only."""
    out = stream or sys.stderr
    text = style == "text" or (style == "auto" and out.isatty())
    handler = logging.StreamHandler(out) if text else LineHandler(out)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if not text:
        access_log.handlers = [handler]
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
    if isinstance(handler, LineHandler):
        handler.write(level, record)
    else:
        access_log.log(level, MESSAGE, extra={"fields": record.fields()})


def flush() -> None:
    """Write the access lines that wait; to be called before a process ends that runs no exit handlers."""
    for handler in access_log.handlers:
        handler.flush()
