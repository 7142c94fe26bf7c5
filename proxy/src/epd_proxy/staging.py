"""Configuration of how the stages are used."""

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConfigError

# Of letters and digits alone, more than anybody can try.
_SECRET_MIN_BYTES = 24


@dataclass(frozen=True)
class Items:
    """How media items are named, and for how long the store is trusted to hold them.

    ``key`` (32 bytes) goes into every name: proxies that share it share embeddings. ``tenant_headers`` tell whose items
    a request's are. ``store`` has URLs to probe: embeddings are gone when one of them goes down.
    """

    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    tenant_headers: tuple[str, ...] = ("authorization", "x-api-key")
    known_ttl_s: float = 60.0
    store: tuple[str, ...] = ()

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        if self.known_ttl_s >= 0:
            return []
        return [f"--known-items-ttl-s: expected 0 (off) or more seconds, found {self.known_ttl_s:g}"]


def read_key(path: str) -> bytes:
    """Return 32 bytes made of the file's content. Raises :class:`ConfigError`."""
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError([f"--item-key-file: {path} cannot be read: {error.strerror}"]) from error
    if len(secret) < _SECRET_MIN_BYTES:
        raise ConfigError([f"--item-key-file: expected {_SECRET_MIN_BYTES} characters or more in {path}, found "
                           f"{len(secret)}; make them with: openssl rand -hex 32"])  # fmt: skip
    return hashlib.sha256(secret).digest()
