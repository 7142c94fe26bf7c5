"""Keys that clients or operators show: read from a file, compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

# As short as a person may choose and still too long to be tried out over a network.
_LENGTH_MIN = 16


@dataclass(frozen=True, slots=True)
class Key:
    """One key: the name that logs give it, and its SHA-256, since nothing else of it is needed."""

    name: str
    digest: bytes


class Keyring:
    """The keys in use; they may be exchanged at any time."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(key.name for key in self._keys)}>"

    def exchange(self, keys: Iterable[Key]) -> None:
        """Accept ``keys`` and no others from here on."""
        self._keys = tuple(keys)

    def find(self, shown: str) -> str | None:
        """Return the name of the key that ``shown`` is, None when it is none.

        Takes as long whichever key it is, if any: all are compared, and only digests, which are of one length.
        """
        digest = hashlib.sha256(shown.encode("utf-8", "surrogatepass")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.name
        return found


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys of a file: a line each, ``KEY`` or ``NAME KEY``; a line that starts with # says nothing.

    Raises :class:`ConfigError` for a file that cannot be read or has no key, since that would open the door, and for
    keys that are short or given twice. The message never has a key in it.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from error
    keys: list[Key] = []
    faults = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            faults.append(f"{path}, line {number}: expected KEY or NAME KEY, found {len(words)} words")
            continue
        digest = hashlib.sha256(words[-1].encode()).digest()
        if len(words[-1]) < _LENGTH_MIN:
            faults.append(f"{path}, line {number}: expected a key of {_LENGTH_MIN} characters or more")
        if any(key.digest == digest for key in keys):
            faults.append(f"{path}, line {number}: this key is given twice")
        keys.append(Key(words[0] if len(words) == 2 else f"line-{number}", digest))
    if not keys and not faults:
        faults.append(f"{path}: expected a key a line, found none")
    if faults:
        raise ConfigError(faults)
    return tuple(keys)


def read_secret(path: Path) -> str:
    """Return the one key of a file. Raises :class:`ConfigError` unless it holds just that."""
    try:
        words = path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from error
    if len(words) != 1 or not words[0].isascii() or not words[0].isprintable():
        raise ConfigError([f"{path}: expected one key, of printable ASCII, found {len(words)} words"])
    return words[0]
