"""BuildKit's plain progress, line by line, to the few rows a person wants to see. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from epd.display import Row

_LINE = re.compile(r"^#(\d+) (.*)$")
_STAGE = re.compile(r"^\[(.+?)\] (.+)$")
_TIMED = re.compile(r"^\d+\.\d+ ?(.*)$")
_DONE = re.compile(r"^DONE (\d+\.\d+)s$")
_STEP_WORDS = 90


@dataclass
class _Step:
    title: str
    phase: str = "building"
    last_line: str = ""


class BuildLog:
    """Takes lines of `docker buildx bake --progress=plain`; knows the steps that run at the moment."""

    def __init__(self) -> None:
        self._steps: dict[str, _Step] = {}

    def feed(self, line: str) -> str | None:
        """Take one line; return a sentence when a real step ended, else None."""
        match = _LINE.match(line.rstrip())
        if match is None:
            return None
        number, text = match[1], match[2]
        stage = _STAGE.match(text)
        if stage and number not in self._steps:
            self._steps[number] = _Step(f"[{stage[1]}] {stage[2]}"[:_STEP_WORDS])
            return None
        step = self._steps.get(number)
        if step is None:
            return None
        return self._advance(step, text)

    def _advance(self, step: _Step, text: str) -> str | None:
        done = _DONE.match(text)
        if done:
            step.phase = "done"
            return f"  done   {float(done[1]):>7.1f} s  {step.title}" if not self._internal(step) else None
        if text == "CACHED":
            step.phase = "cached"
            return f"  cached            {step.title}" if not self._internal(step) else None
        if text.startswith("ERROR"):
            step.phase = "error"
            return f"  FAILED            {step.title}"
        timed = _TIMED.match(text)
        if timed and timed[1].strip():
            step.last_line = timed[1].strip()
        return None

    def rows(self) -> list[Row]:
        """Return the steps that run at the moment."""
        running = [(number, step) for number, step in self._steps.items() if step.phase == "building"]
        return [
            Row(f"#{number}", step.phase, f"{step.title[:60]} | {step.last_line}", finished=False)
            for number, step in running
            if not self._internal(step)
        ]

    @staticmethod
    def _internal(step: _Step) -> bool:
        """Whether a step is BuildKit's own housekeeping, such as reading the Dockerfile."""
        return "[internal]" in step.title or " internal]" in step.title
