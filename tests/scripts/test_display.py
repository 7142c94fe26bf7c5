"""What a person sees while waiting, on a terminal and in a CI log."""

import io

import pytest

from epd.buildlog import BuildLog
from epd.display import REPEAT_S, Display, Row


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def row(phase="loading", detail="weights", finished=False):
    return Row("encode-0", phase, detail, finished)


def test_off_a_terminal_a_line_appears_on_a_change_and_every_few_seconds(clock):
    out = io.StringIO()
    display = Display(out, clock)
    display.show([row()])
    clock.now += 1
    display.show([row(detail="other line")])
    assert len(out.getvalue().splitlines()) == 1
    clock.now += REPEAT_S
    display.show([row(detail="still")])
    assert "still" in out.getvalue().splitlines()[1]
    display.show([row("healthy", "", finished=True)])
    clock.now += 10 * REPEAT_S
    display.show([row("healthy", "", finished=True)])
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[2].split() == ["encode-0", "healthy", "0:16"]
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_lines_are_redrawn_in_place_and_fit(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    display = Display(out, clock)
    display.show([row(detail="x" * 200), row()])
    display.show([row()])
    assert out.getvalue().count("\x1b[1A") == 2
    assert max(len(line) for line in out.getvalue().split("\n")[:2]) <= 40
    display.note("stays")
    assert out.getvalue().endswith("\x1b[1A\x1b[2Kstays\n")


def test_the_time_stops_when_a_service_is_ready(clock):
    out = Terminal()
    display = Display(out, clock)
    display.show([row()])
    clock.now += 65
    display.show([row("healthy", "", finished=True)])
    clock.now += 500
    display.show([row("healthy", "", finished=True)])
    assert out.getvalue().rstrip().endswith("healthy      1:05")


BUILD = """\
#0 building with "default" instance using docker driver
#1 [cpu internal] load build definition from Dockerfile
#1 transferring dockerfile: 4.1kB done
#1 DONE 0.0s
#5 [cpu base 2/2] RUN apt-get update
#5 CACHED
#7 [cpu wheels 1/2] RUN uv build
#7 0.512 Building wheel...
#7 0.612
#8 [proxy build 1/5] RUN pip install
#8 ERROR: executor failed running
#7 DONE 12.5s
something else
"""


def test_build_log_tells_steps_from_housekeeping():
    log = BuildLog()
    sentences = [s for line in BUILD.splitlines() if (s := log.feed(line))]
    assert sentences == [
        "  cached            [cpu base 2/2] RUN apt-get update",
        "  FAILED            [proxy build 1/5] RUN pip install",
        "  done      12.5 s  [cpu wheels 1/2] RUN uv build",
    ]
    assert log.rows() == []


def test_build_log_shows_the_running_step_and_its_last_line():
    log = BuildLog()
    for line in BUILD.splitlines()[:9]:
        log.feed(line)
    (found,) = log.rows()
    assert found.detail == "[cpu wheels 1/2] RUN uv build | Building wheel..."
