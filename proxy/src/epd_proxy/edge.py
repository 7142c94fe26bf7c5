"""Configuration of how the proxy meets the outside: its operators, and who may do what."""

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class AdminConfig:
    """Where operators reach the proxy; port 0 is nowhere. ``keys_file`` lists the keys that they show."""

    host: str = "127.0.0.1"
    port: int = 0
    keys_file: str = ""

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [] if 0 <= self.port <= 65535 else [f"--admin-port: expected 0 to 65535, found {self.port}"]
        if self.port and not self.keys_file:
            found.append("--admin-port: expected --admin-keys-file FILE with it, a key a line")
        return found


@dataclass(frozen=True)
class TlsConfig:
    """PEM files. Without ``cert_file`` clients are served plain HTTP; with ``client_ca_file`` they need a certificate.

    Instances speak TLS where their URL says https; ``backend_ca_file`` adds to the system's CAs.
    """

    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""
    backend_ca_file: str = ""
    backend_cert_file: str = ""
    backend_key_file: str = ""
    backend_verify: str = "on"

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = []
        if bool(self.cert_file) != bool(self.key_file):
            found.append("--tls-cert and --tls-key belong together: give both")
        if self.client_ca_file and not self.cert_file:
            found.append("--tls-client-ca: expected --tls-cert and --tls-key with it")
        if bool(self.backend_cert_file) != bool(self.backend_key_file):
            found.append("--backend-tls-cert and --backend-tls-key belong together: give both")
        if self.backend_verify not in ("on", "off"):
            found.append(f"--backend-tls-verify: expected on or off, found {self.backend_verify}")
        return found


@dataclass(frozen=True)
class AccessConfig:
    """Who may send requests. Without ``keys_file`` nobody is asked for a key; without ``origins`` no CORS is spoken.

    ``backend_key_file`` holds the key that instances are shown in place of the client's.
    """

    keys_file: str = ""
    backend_key_file: str = ""
    origins: tuple[str, ...] = ()

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        expected = "--cors-origins: expected * or scheme://host[:port] without a path"
        return [f"{expected}, found {origin!r}" for origin in self.origins if not _is_origin(origin)]


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return text == "*" or (bool(parts.scheme and parts.netloc) and text == f"{parts.scheme}://{parts.netloc}")
