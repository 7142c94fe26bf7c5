"""Configuration: frozen, checked when it is made, every fault reported at once."""

import ipaddress
from dataclasses import dataclass, field, fields, replace
from urllib.parse import urlsplit

from .edge import AccessConfig, AdminConfig, TlsConfig
from .errors import ConfigError
from .staging import AdmissionConfig, Balance, HandshakeConfig, Items

MIB = 1024 * 1024
_WORKERS_MAX = 64


@dataclass(frozen=True)
class Listen:
    """Where the proxy accepts clients, and how many processes do."""

    host: str = "0.0.0.0"
    port: int = 8000
    workers: int = 1

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [] if 0 <= self.port <= 65535 else [f"--port: expected 0 to 65535, found {self.port}"]
        if not 1 <= self.workers <= _WORKERS_MAX:
            found.append(f"--workers: expected 1 to {_WORKERS_MAX}, found {self.workers}")
        return found


@dataclass(frozen=True)
class Topology:
    """The base URLs (``http://host:port``) of every stage's instances."""

    encode: tuple[str, ...] = ()
    prefill_decode: tuple[str, ...] = ()
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()

    def stages(self) -> dict[str, tuple[str, ...]]:
        """Return the stages that have instances, by name."""
        names = ("encode", "prefill_decode", "prefill", "decode")
        return {name: urls for name in names if (urls := getattr(self, name))}

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found: list[str] = []
        for stage, urls in self.stages().items():
            flag = "--" + stage.replace("_", "-")
            found += [f"{flag}: {fault}" for url in urls for fault in url_faults(url)]
            found += [f"{flag}: {url} is given twice" for url in sorted({u for u in urls if urls.count(u) > 1})]
        if self.prefill_decode and (self.prefill or self.decode):
            found.append("give either --prefill-decode, or --prefill and --decode, not both")
        elif bool(self.prefill) != bool(self.decode):
            found.append("--prefill and --decode belong together: give at least one URL for each")
        elif not self.prefill_decode and not self.prefill:
            found.append("no instance answers requests: give --prefill-decode URL (or --prefill URL and --decode URL)")
        return found


@dataclass(frozen=True)
class MetaserverConfig:
    """Where decode instances call back: the address to bind, and the URL they are told."""

    host: str = "0.0.0.0"
    port: int = 8001
    advertise_url: str = ""

    def faults(self, decode: tuple[str, ...]) -> list[str]:
        """Return what is wrong for these decode instances, one sentence each."""
        found = [] if 1 <= self.port <= 65535 else [f"--metaserver-port: expected 1 to 65535, found {self.port}"]
        flag = "--metaserver-advertise-url"
        remote = next((url for url in decode if not _is_loopback(url)), None)
        if not self.advertise_url:
            expected = f"{flag}: expected http://host:{self.port}, with this host's name or address as"
            return [*found, f"{expected} {remote} sees it"] if remote else found
        faults = url_faults(self.advertise_url)
        if not faults and remote and _is_loopback(self.advertise_url):
            faults = [
                f"{self.advertise_url} leads {remote} to itself; expected this host's name or address as it sees it"
            ]
        return [*found, *(f"{flag}: {fault}" for fault in faults)]

    def resolved(self) -> "MetaserverConfig":
        """Return it with the URL that decode instances on this host use where none was given."""
        return self if self.advertise_url else replace(self, advertise_url=f"http://127.0.0.1:{self.port}")


@dataclass(frozen=True)
class Timeouts:
    """How long each part of a request may take, in seconds."""

    connect_s: float = 5.0
    # vLLM 0.23 tries a media URL that does not answer for up to 110 s (3 tries, 5 s, 20 s and 80 s) before it says so.
    encode_s: float = 120.0
    callback_s: float = 120.0
    prefill_s: float = 600.0
    # A request whose KV has come may still wait for its turn on decode.
    handover_s: float = 300.0
    # A prefill instance that died needs minutes to be back, and only then can the blocks be freed.
    release_s: float = 600.0
    # An answer that is not streamed has its first byte when it is complete.
    first_byte_s: float = 1800.0
    idle_s: float = 300.0
    body_idle_s: float = 30.0
    write_idle_s: float = 60.0
    drain_s: float = 30.0

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return [
            f"--{name.removesuffix('_s').replace('_', '-')}-timeout-s: expected more than 0 seconds, found {value:g}"
            for name, value in values.items()
            if not value > 0
        ]


@dataclass(frozen=True)
class Retry:
    """How often a stage is tried in all, each time on another instance, and the pause before the second try."""

    max_attempts: int = 3
    delay_s: float = 0.001

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [] if self.max_attempts >= 1 else [f"--max-retries: expected 1 or more, found {self.max_attempts}"]
        return found if self.delay_s >= 0 else [*found, f"--retry-delay: expected 0 or more, found {self.delay_s:g}"]


@dataclass(frozen=True)
class Limits:
    """What one request may weigh, and what all bodies in memory may.

    A body takes up to 6 times its size: itself, its document, a picture's bytes and the encoder's request, each
    copied once. So the bodies' default keeps the proxy within 1.6 GiB, in a container of 2 GiB.
    """

    body_bytes: int = 128 * MIB
    media_items: int = 256
    bodies_bytes: int = 256 * MIB

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [] if self.body_bytes >= 1 else ["--max-body-mib: expected 1 or more"]
        if self.media_items < 1:
            found.append("--max-media-items: expected 1 or more")
        if self.bodies_bytes < self.body_bytes:
            found.append(f"--max-bodies-mib: expected --max-body-mib ({self.body_bytes // MIB}) or more, "
                         f"found {self.bodies_bytes // MIB}")  # fmt: skip
        return found


@dataclass(frozen=True)
class Health:
    """How the instances are probed (``GET /health``)."""

    interval_s: float = 2.0
    timeout_s: float = 5.0

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [] if self.interval_s > 0 else ["--health-interval-s: expected more than 0"]
        return found if self.timeout_s > 0 else [*found, "--health-timeout-s: expected more than 0"]


@dataclass(frozen=True)
class Logging:
    """How much is logged, and in which form."""

    level: str = "info"
    style: str = "auto"

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = []
        if self.level not in ("debug", "info", "warning", "error"):
            found.append(f"--log-level: expected debug, info, warning or error, found {self.level}")
        if self.style not in ("auto", "json", "text"):
            found.append(f"--log-format: expected auto, json or text, found {self.style}")
        return found


@dataclass(frozen=True)
class ProxyConfig:
    """Everything the proxy is told. Raises :class:`ConfigError` with all faults."""

    listen: Listen = field(default_factory=Listen)
    topology: Topology = field(default_factory=Topology)
    metaserver: MetaserverConfig = field(default_factory=MetaserverConfig)
    timeouts: Timeouts = field(default_factory=Timeouts)
    retry: Retry = field(default_factory=Retry)
    limits: Limits = field(default_factory=Limits)
    health: Health = field(default_factory=Health)
    items: Items = field(default_factory=Items)
    balance: Balance = field(default_factory=Balance)
    handshake: HandshakeConfig = field(default_factory=HandshakeConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    logging: Logging = field(default_factory=Logging)
    encode_fallback: str = "local"
    admin: AdminConfig = field(default_factory=AdminConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    instances_file: str = ""
    otlp_endpoint: str = ""

    def __post_init__(self) -> None:
        parts = (self.listen, self.topology, self.timeouts, self.retry, self.limits, self.health, self.logging,
                 self.admin, self.tls, self.access, self.items, self.balance,
                 self.admission, self.handshake)  # fmt: skip
        found = [fault for part in parts for fault in part.faults()]
        if self.otlp_endpoint:
            found += [f"--otlp-endpoint: {fault}" for fault in url_faults(self.otlp_endpoint)]
        found += [f"--store: {fault}" for url in self.items.store for fault in url_faults(url)]
        if self.topology.decode and self.handshake.name == "layerwise":
            found += self.metaserver.faults(self.topology.decode)
        found += self._worker_faults()
        if self.encode_fallback not in ("local", "off"):
            found.append(f"--encode-fallback: expected local or off, found {self.encode_fallback}")
        if found:
            raise ConfigError(found)

    def _worker_faults(self) -> list[str]:
        workers, first = self.listen.workers, self.metaserver.port
        found = []
        ports = range(first, first + workers)
        if workers > 1 and self.topology.decode and (self.listen.port in ports or ports[-1] > 65535):
            found.append(f"--metaserver-port: each worker needs one, so {first} to {ports[-1]} have to be free")
        return found


def url_faults(url: str) -> list[str]:
    """Return what is wrong with an instance's base URL, one sentence each."""
    expected = f"expected http://host:port, found {url!r}"
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        return [f"{expected} ({error})"]
    if parts.scheme not in ("http", "https") or not host or port == 0:
        return [expected]
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        return [f"{expected}: leave out path, query and user"]
    try:
        wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        wildcard = False
    return [f"{expected}: {host} is an address to bind, not one to connect to; name the instance"] if wildcard else []


def _is_loopback(url: str) -> bool:
    """Whether ``url`` means the host that uses it. A name that cannot be told from here counts as another host."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
