"""Lines of the log: many at a time, none lost, in order."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from epd_proxy import logs
from epd_proxy.access import AccessRecord
from epd_proxy.logs import LineHandler, access_log, log_access


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = LineHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    other = logging.getLogger("epd_proxy.other")
    before = access_log.handlers, other.handlers
    access_log.handlers, other.handlers = [handler], [handler]
    access_log.setLevel("INFO")
    yield stream
    access_log.handlers, other.handlers = before
    access_log.setLevel(logging.NOTSET)


def lines(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def finished(number: int, **more: object) -> AccessRecord:
    record = AccessRecord("GET", f"/{number}", f"r-{number}")
    for name, value in {"status": 200, **more}.items():
        setattr(record, name, value)
    return record


def test_a_line_says_all_that_a_record_has() -> None:
    record = AccessRecord("POST", "/v1", "r-1")
    some: dict[type, object] = {str: "x", int: 1, float: 1.0, bool: True, tuple: ("x",)}
    names = {name for name in dir(record) if not name.startswith("_") and not callable(getattr(record, name))}
    for name in names:
        setattr(record, name, some[type(getattr(record, name))])
    assert set(record.fields()) == names - {"started"} | {"total_s"}
    assert set(AccessRecord("POST", "/v1", "r-2").fields()) == {"request_id", "method", "path", "status", "total_s"}


def test_a_time_that_is_nought_when_rounded_is_not_said() -> None:
    assert "queue_s" not in finished(1, queue_s=0.00004).fields()
    assert finished(1, queue_s=0.00006).fields()["queue_s"] == 0.0001


async def test_access_lines_are_written_together_and_soon(out: io.StringIO) -> None:
    for number in range(1000):
        log_access(finished(number))
    assert 0 < len(lines(out)) < 1000
    for _ in range(1000):
        if len(lines(out)) == 1000:
            break
        await asyncio.sleep(0.01)
    assert [line["path"] for line in lines(out)] == [f"/{number}" for number in range(1000)]


async def test_what_is_logged_in_between_keeps_its_place(out: io.StringIO) -> None:
    log_access(finished(1))
    logging.getLogger("epd_proxy.other").error("in between")
    log_access(finished(2, status=503, error="why", first_byte_s=0.123456))
    logs.flush()
    first, between, second = lines(out)
    assert (first["request_id"], between["message"], second["request_id"]) == ("r-1", "in between", "r-2")
    assert (first["level"], second["level"], second["error"], second["first_byte_s"]) == (
        "info",
        "warning",
        "why",
        0.1235,
    )
    assert "error" not in first
    assert "first_byte_s" not in first
    times = [str(line["time"]) for line in (first, between, second)]
    assert {len(time) for time in times} == {len("2026-01-01T00:00:00.000+00:00")}


async def test_a_log_that_cannot_be_written_stops_nothing(out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_text: str) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(out, "write", full)
        for number in range(1000):
            log_access(finished(number))
        logs.flush()
    log_access(finished(1000))
    logs.flush()
    assert [line["path"] for line in lines(out)] == ["/1000"]
