"""One thing that was checked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(str, Enum):
    """How a check ended. Only FAIL keeps a stack from starting."""

    PASS = "PASS"  # noqa: S105 - a verdict, not a password
    WARN = "WARN"
    FAIL = "FAIL"

    __str__ = str.__str__


@dataclass(frozen=True)
class Finding:
    """What was checked, what was found, and what to do about it."""

    name: str
    """Stable name, for programs: `driver.version`."""
    status: Status
    found: str
    expected: str = ""
    fix: str = ""


def passed(name: str, found: str) -> Finding:
    """Return a finding of something that is as it should be."""
    return Finding(name, Status.PASS, found)


def failed(name: str, *, expected: str, found: str, fix: str) -> Finding:
    """Return a finding that keeps the stack from starting."""
    return Finding(name, Status.FAIL, found, expected, fix)


def warned(name: str, *, expected: str, found: str, fix: str) -> Finding:
    """Return a finding that a person should know of."""
    return Finding(name, Status.WARN, found, expected, fix)
