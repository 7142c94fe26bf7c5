"""Configuration of how the stages are used."""

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConfigError

# Of letters and digits alone, more than anybody can try.
_SECRET_MIN_BYTES = 24
_POLICIES = ("least_loaded", "power_of_two", "prefix", "session")


@dataclass(frozen=True)
class Items:
    """How media items are named, where they are stored, and how long they are trusted to be there.

    ``key`` (32 bytes) goes into every name: proxies that share it share embeddings. ``tenant_headers`` tell whose items
    a request's are. ``store`` has URLs to probe: embeddings are gone when one of them goes down. ``consumers_wait``:
    prefill/decode instances wait for items that are being encoded.
    """

    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    tenant_headers: tuple[str, ...] = ("authorization", "x-api-key")
    known_ttl_s: float = 60.0
    consumers_wait: str = "off"
    store: tuple[str, ...] = ()

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = []
        if not self.known_ttl_s >= 0:
            found.append(f"--known-items-ttl-s: expected 0 (off) or more seconds, found {self.known_ttl_s:g}")
        if self.consumers_wait not in ("on", "off"):
            found.append(f"--consumers-wait: expected on or off, found {self.consumers_wait}")
        return found


@dataclass(frozen=True)
class HandshakeConfig:
    """How prefill and decode share a request, which has to be what their KV connector speaks.

    ``bootstrap_port`` is where a prefill instance's bootstrap server listens (``VLLM_MOONCAKE_BOOTSTRAP_PORT``).
    """

    name: str = "layerwise"
    bootstrap_port: int = 8998

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = []
        if self.name not in ("layerwise", "pull", "bootstrap"):
            found.append(f"--handshake: expected layerwise, pull or bootstrap, found {self.name}")
        if not 1 <= self.bootstrap_port <= 65535:
            found.append(f"--bootstrap-port: expected 1 to 65535, found {self.bootstrap_port}")
        return found


@dataclass(frozen=True)
class AdmissionConfig:
    """How many requests run at once, how many more wait, and how long."""

    running_max: int = 16_384
    queued_max: int = 1_024
    queue_s: float = 30.0

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [] if self.running_max >= 1 else [f"--max-requests: expected 1 or more, found {self.running_max}"]
        if self.queued_max < 0:
            found.append(f"--max-queued: expected 0 or more, found {self.queued_max}")
        if not self.queue_s > 0:
            found.append(f"--queue-timeout-s: expected more than 0 seconds, found {self.queue_s:g}")
        return found


@dataclass(frozen=True)
class Balance:
    """How an instance is chosen, and when one that fails is left alone."""

    policy: str = "least_loaded"
    session_header: str = "x-session-id"
    breaker_failures: int = 5
    breaker_open_s: float = 5.0

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = []
        if self.policy not in _POLICIES:
            found.append(f"--policy: expected {', '.join(_POLICIES[:-1])} or {_POLICIES[-1]}, found {self.policy}")
        if self.breaker_failures < 0:
            found.append(f"--breaker-failures: expected 0 (off) or more, found {self.breaker_failures}")
        if not self.breaker_open_s > 0:
            found.append(f"--breaker-open-s: expected more than 0 seconds, found {self.breaker_open_s:g}")
        return found


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
