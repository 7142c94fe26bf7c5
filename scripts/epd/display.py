"""A few lines that change while a person waits: redrawn in place on a terminal, printed when they change elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

REPEAT_S = 15.0
"""Off a terminal, an unfinished line is printed again this often, so that a CI log shows life."""
_UP_AND_CLEAR = "\x1b[1A\x1b[2K"


@dataclass(frozen=True)
class Row:
    """One line of the display."""

    name: str
    phase: str
    detail: str
    finished: bool

    def text(self, elapsed_s: float, width: int) -> str:
        """Return the line, cut to `width` characters."""
        minutes, seconds = divmod(int(elapsed_s), 60)
        line = f"  {self.name:<18} {self.phase:<11} {minutes:>2}:{seconds:02}  {self.detail}".rstrip()
        return line if len(line) <= width else line[: width - 1] + "…"


class Display:
    """Shows rows. Call `show` as often as you like; it decides what to write."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._live = self._stream.isatty()
        self._began_s: dict[str, float] = {}
        self._ended_s: dict[str, float] = {}
        self._phases: dict[str, str] = {}
        self._printed_s = clock()
        self._drawn = 0

    def show(self, rows: list[Row]) -> None:
        """Show the state of now."""
        now = self._clock()
        for row in rows:
            self._began_s.setdefault(row.name, now)
            if row.finished:
                self._ended_s.setdefault(row.name, now)
            else:
                self._ended_s.pop(row.name, None)
        if self._live:
            self._redraw(rows, now)
        else:
            self._print_changes(rows, now)
        self._stream.flush()

    def note(self, text: str) -> None:
        """Print a line that stays, above the live ones."""
        self._clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def _redraw(self, rows: list[Row], now: float) -> None:
        self._clear()
        width = shutil.get_terminal_size((100, 24)).columns
        for row in rows:
            self._stream.write(row.text(self._elapsed(row, now), width) + "\n")
        self._drawn = len(rows)

    def _print_changes(self, rows: list[Row], now: float) -> None:
        due = now - self._printed_s >= REPEAT_S
        for row in rows:
            if self._phases.get(row.name) != row.phase or (due and not row.finished):
                self._stream.write(row.text(self._elapsed(row, now), 160) + "\n")
                self._phases[row.name] = row.phase
                self._printed_s = now

    def _elapsed(self, row: Row, now: float) -> float:
        return self._ended_s.get(row.name, now) - self._began_s[row.name]

    def _clear(self) -> None:
        self._stream.write(_UP_AND_CLEAR * self._drawn)
        self._drawn = 0
