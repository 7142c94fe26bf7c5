"""Typed values from an environment; every fault is noted, so that one message has them all."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence


class Reader:
    """Reads typed values from an environment and collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.faults: list[str] = []

    def text(self, name: str, default: str = "") -> str:
        """Return a value without the blanks around it; an empty one is the default."""
        return self._environ.get(name, "").strip() or default

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        value = self.text(name, str(default))
        if value.isdecimal() and low <= int(value) <= high:
            return int(value)
        self.faults.append(f"{name}={value!r}: expected a whole number from {low} to {high}")
        return default

    def optional_number(self, name: str, high: int) -> int | None:
        """Return a whole number from 1 to `high`; None where it is not set."""
        return self.number(name, 1, 1, high) if self.text(name) else None

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        """Return one of the choices."""
        value = self.text(name, default)
        if value not in choices:
            self.faults.append(f"{name}={value!r}: expected one of {', '.join(choices)}")
            return default
        return value

    def flag(self, name: str) -> bool:
        """Return whether a variable is 1; it may be 0 too."""
        return self.choice(name, "0", ("0", "1")) == "1"

    def words(self, name: str) -> tuple[str, ...]:
        """Return words as a shell reads them."""
        try:
            return tuple(shlex.split(self.text(name)))
        except ValueError as error:
            self.faults.append(f"{name}={self.text(name)!r}: not words as a shell reads them ({error})")
            return ()

    def peer_host(self, name: str, default: str) -> str:
        """Return a name under which *other* containers reach a host."""
        value = self.text(name, default)
        if value in ("0.0.0.0", "::", "localhost", "127.0.0.1", "::1"):
            self.faults.append(f"{name}={value!r}: other hosts cannot reach that; expected a name or address they can")
        return value
