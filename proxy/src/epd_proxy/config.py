"""Configuration: frozen, checked when it is made, every fault reported at once.

The only module that reads the command line and the environment. A flag beats its environment variable, which beats
the default.
"""

import argparse
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from . import __doc__ as epd_proxy_doc
from . import __version__
from .errors import ConfigError

MIB = 1024 * 1024


@dataclass(frozen=True)
class Listen:
    """Where the proxy accepts clients."""

    host: str = "0.0.0.0"
    port: int = 8000

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        return [] if 0 <= self.port <= 65535 else [f"--port: expected 0 to 65535, found {self.port}"]


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
            found += [f"{flag}: {fault}" for url in urls for fault in _url_faults(url)]
            found += [f"{flag}: {url} is given twice" for url in sorted({u for u in urls if urls.count(u) > 1})]
        if self.prefill_decode and (self.prefill or self.decode):
            found.append("give either --prefill-decode, or --prefill and --decode, not both")
        elif bool(self.prefill) != bool(self.decode):
            found.append("--prefill and --decode belong together: give at least one URL for each")
        elif not self.prefill_decode and not self.prefill:
            found.append("no instance answers requests: give --prefill-decode URL (or --prefill URL and --decode URL)")
        return found


@dataclass(frozen=True)
class Timeouts:
    """How long each part of a request may take, in seconds."""

    connect_s: float = 5.0
    # vLLM 0.23 tries a media URL that does not answer for up to 110 s (3 tries, 5 s, 20 s and 80 s) before it says so.
    encode_s: float = 120.0
    # An answer that is not streamed has its first byte when it is complete.
    first_byte_s: float = 1800.0
    idle_s: float = 300.0
    drain_s: float = 30.0

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        names = ("connect_s", "encode_s", "first_byte_s", "idle_s", "drain_s")
        flags = {name: "--" + name.replace("_s", "").replace("_", "-") + "-timeout-s" for name in names}
        return [
            f"{flags[name]}: expected more than 0 seconds, found {getattr(self, name):g}"
            for name in names
            if not getattr(self, name) > 0
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
    """What one request may weigh."""

    body_bytes: int = 256 * MIB
    media_items: int = 256

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [] if self.body_bytes >= 1 else ["--max-body-mib: expected 1 or more"]
        return found if self.media_items >= 1 else [*found, "--max-media-items: expected 1 or more"]


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
    timeouts: Timeouts = field(default_factory=Timeouts)
    retry: Retry = field(default_factory=Retry)
    limits: Limits = field(default_factory=Limits)
    health: Health = field(default_factory=Health)
    logging: Logging = field(default_factory=Logging)
    encode_fallback: str = "local"

    def __post_init__(self) -> None:
        parts = (self.listen, self.topology, self.timeouts, self.retry, self.limits, self.health, self.logging)
        found = [fault for part in parts for fault in part.faults()]
        if self.encode_fallback not in ("local", "off"):
            found.append(f"--encode-fallback: expected local or off, found {self.encode_fallback}")
        if found:
            raise ConfigError(found)


@dataclass(frozen=True)
class _Setting:
    flag: str
    env: str
    default: Any
    help: str
    several: bool = False
    kind: type = str

    @property
    def name(self) -> str:
        return self.flag[2:].replace("-", "_")


_SETTINGS = (
    _Setting("--host", "HOST", Listen.host, "address to bind"),
    _Setting("--port", "PORT", Listen.port, "port to bind", kind=int),
    _Setting("--encode", "ENCODE_URLS", (), "encode instances", several=True),
    _Setting("--prefill-decode", "PREFILL_DECODE_URLS", (), "instances that prefill and decode", several=True),
    _Setting("--prefill", "PREFILL_URLS", (), "prefill instances", several=True),
    _Setting("--decode", "DECODE_URLS", (), "decode instances", several=True),
    _Setting("--encode-fallback", "ENCODE_FALLBACK", "local",
             "when no encode instance answers: local (the next stage encodes) or off (503)"),
    _Setting("--max-retries", "MAX_RETRIES", Retry.max_attempts,
             "tries per stage in all, each on another instance", kind=int),
    _Setting("--retry-delay", "RETRY_DELAY_S", Retry.delay_s, "seconds before the second try, doubled each time",
             kind=float),
    _Setting("--connect-timeout-s", "CONNECT_TIMEOUT_S", Timeouts.connect_s, "to connect to an instance", kind=float),
    _Setting("--encode-timeout-s", "ENCODE_TIMEOUT_S", Timeouts.encode_s, "for one item to be encoded", kind=float),
    _Setting("--first-byte-timeout-s", "FIRST_BYTE_TIMEOUT_S", Timeouts.first_byte_s,
             "for an answer's first byte (all of it when not streamed)", kind=float),
    _Setting("--idle-timeout-s", "IDLE_TIMEOUT_S", Timeouts.idle_s, "between two chunks of a stream", kind=float),
    _Setting("--drain-timeout-s", "DRAIN_TIMEOUT_S", Timeouts.drain_s,
             "for running requests to end after SIGTERM", kind=float),
    _Setting("--health-interval-s", "HEALTH_INTERVAL_S", Health.interval_s, "between two probes", kind=float),
    _Setting("--health-timeout-s", "HEALTH_TIMEOUT_S", Health.timeout_s, "for a probe to be answered", kind=float),
    _Setting("--max-body-mib", "MAX_BODY_MIB", Limits.body_bytes // MIB, "largest request body", kind=int),
    _Setting("--max-media-items", "MAX_MEDIA_ITEMS", Limits.media_items, "most media items in a request", kind=int),
    _Setting("--log-level", "LOG_LEVEL", Logging.level, "debug, info, warning or error"),
    _Setting("--log-format", "LOG_FORMAT", Logging.style, "json, text, or auto: text on a terminal"),
)  # fmt: skip

# vllm-ascend's example proxy names its instances by hosts and ports; its command lines work here unchanged.
_EXAMPLE_NAMES = {"encoder": "encode", "pd": "prefill_decode", "prefiller": "prefill", "decoder": "decode"}


def load_config(argv: Sequence[str], environ: Mapping[str, str]) -> ProxyConfig:
    """Read flags and ``EPD_PROXY_*`` variables. Raises :class:`ConfigError`; exits on ``--help`` or unknown flags."""
    arguments = _parser().parse_args(argv)
    faults: list[str] = []
    values = {setting.name: _value(setting, arguments, environ, faults) for setting in _SETTINGS}
    for example, stage in _EXAMPLE_NAMES.items():
        values[stage] = (*values[stage], *_example_urls(example, arguments, faults))
    try:
        config = _build(values)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    return config


def _build(values: Mapping[str, Any]) -> ProxyConfig:
    def urls(stage: str) -> tuple[str, ...]:
        return tuple(url.rstrip("/") for url in values[stage])

    return ProxyConfig(
        listen=Listen(values["host"], values["port"]),
        topology=Topology(urls("encode"), urls("prefill_decode"), urls("prefill"), urls("decode")),
        timeouts=Timeouts(
            connect_s=values["connect_timeout_s"],
            encode_s=values["encode_timeout_s"],
            first_byte_s=values["first_byte_timeout_s"],
            idle_s=values["idle_timeout_s"],
            drain_s=values["drain_timeout_s"],
        ),
        retry=Retry(values["max_retries"], values["retry_delay"]),
        limits=Limits(values["max_body_mib"] * MIB, values["max_media_items"]),
        health=Health(values["health_interval_s"], values["health_timeout_s"]),
        logging=Logging(values["log_level"], values["log_format"]),
        encode_fallback=values["encode_fallback"],
    )


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: `--encode` must not also mean `--encode-timeout-s` in an older version.
    parser = argparse.ArgumentParser("epd-proxy", description=epd_proxy_doc, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    for setting in _SETTINGS:
        text = f"{setting.help} [EPD_PROXY_{setting.env}; default: {setting.default or 'none'}]"
        if setting.several:
            parser.add_argument(setting.flag, nargs="+", action="extend", metavar="URL", help=text)
        else:
            parser.add_argument(setting.flag, metavar=setting.kind.__name__.upper(), help=text)
    group = parser.add_argument_group("names of vllm-ascend's example proxy")
    for example, stage in _EXAMPLE_NAMES.items():
        other = "--" + stage.replace("_", "-")
        group.add_argument(f"--{example}-hosts", nargs="+", default=[], metavar="HOST", help=f"hosts, see {other}")
        group.add_argument(f"--{example}-ports", nargs="+", default=[], metavar="PORT", help="their ports, in order")
    return parser


def _value(setting: _Setting, arguments: argparse.Namespace, environ: Mapping[str, str], faults: list[str]) -> Any:
    given = getattr(arguments, setting.name)
    source = setting.flag
    if given is None:
        source = f"EPD_PROXY_{setting.env}"
        given = environ.get(source, "").strip() or None
    if given is None:
        return setting.default
    if setting.several:
        texts = [given] if isinstance(given, str) else given
        return tuple(url for text in texts for url in text.replace(",", " ").split())
    try:
        return setting.kind(given)
    except ValueError:
        noun = "a whole number" if setting.kind is int else "a number"
        faults.append(f"{source}: expected {noun}, found {given!r}")
        return setting.default


def _example_urls(example: str, arguments: argparse.Namespace, faults: list[str]) -> list[str]:
    hosts: list[str] = getattr(arguments, f"{example}_hosts")
    ports: list[str] = getattr(arguments, f"{example}_ports")
    if len(hosts) != len(ports):
        faults.append(f"--{example}-hosts and --{example}-ports: expected as many ports as hosts, "
                      f"found {len(hosts)} hosts and {len(ports)} ports")  # fmt: skip
        return []
    return [f"http://{_bracketed(host)}:{port}" for host, port in zip(hosts, ports, strict=True)]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _url_faults(url: str) -> list[str]:
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
