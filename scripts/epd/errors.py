"""The one error of the host scripts.

StepError
└── CommandError   a program we called failed; carries its exit code and its last lines
"""

from __future__ import annotations


class StepError(Exception):
    """A step cannot go on; says what was expected, what was found, and how a person fixes it."""

    def __init__(self, what: str, *, expected: str, found: str, fix: str) -> None:
        super().__init__(f"FAIL: {what}\n  expected: {expected}\n  found:    {found}\n  fix:      {fix}")
        self.what = what
        self.expected = expected
        self.found = found
        self.fix = fix


class CommandError(StepError):
    """A program ended with an exit code other than zero, or did not end in time."""

    def __init__(self, argv: tuple[str, ...], *, code: int | None, output: str, fix: str) -> None:
        ended = "no end within its time limit" if code is None else f"exit code {code}"
        tail = "\n            ".join(output.strip().splitlines()[-15:]) or "(it printed nothing)"
        super().__init__(
            f"`{' '.join(argv)}` failed",
            expected="exit code 0",
            found=f"{ended}; it ended with\n            {tail}",
            fix=fix,
        )
        self.code = code
        self.output = output
