"""The command line and the environment to a configuration; nothing else reads either.

A flag beats its environment variable, which beats the default.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from . import __doc__ as epd_proxy_doc
from . import __version__
from .config import (
    MIB,
    Health,
    Limits,
    Listen,
    Logging,
    MetaserverConfig,
    ProxyConfig,
    Retry,
    Timeouts,
    Topology,
)
from .edge import AccessConfig, AdminConfig, TlsConfig
from .errors import ConfigError
from .inventory import read_instances
from .staging import AdmissionConfig, Balance, HandshakeConfig, Items, read_key


@dataclass(frozen=True)
class _Setting:
    flag: str
    env: str
    default: Any
    help: str
    several: bool = False
    kind: type = str
    metavar: str = "URL"

    @property
    def name(self) -> str:
        return self.flag[2:].replace("-", "_")


_SETTINGS = (
    _Setting("--host", "HOST", Listen.host, "address to bind"),
    _Setting("--port", "PORT", Listen.port, "port to bind", kind=int),
    _Setting("--workers", "WORKERS", Listen.workers,
             "processes that serve the port together; each takes a metaserver port of its own, one after the other",
             kind=int),
    _Setting("--encode", "ENCODE_URLS", (), "encode instances", several=True),
    _Setting("--prefill-decode", "PREFILL_DECODE_URLS", (), "instances that prefill and decode", several=True),
    _Setting("--prefill", "PREFILL_URLS", (), "prefill instances", several=True),
    _Setting("--decode", "DECODE_URLS", (), "decode instances", several=True),
    _Setting("--instances-file", "INSTANCES_FILE", "",
             "file (TOML, or JSON where its name ends so) with the instances of each stage, in place of the flags "
             "above; a change of it takes effect while the proxy runs"),
    _Setting("--metaserver-host", "METASERVER_HOST", MetaserverConfig.host,
             "address to bind for decode instances' calls (only with --decode)"),
    _Setting("--metaserver-port", "METASERVER_PORT", MetaserverConfig.port, "port to bind for them", kind=int),
    _Setting("--metaserver-advertise-url", "METASERVER_ADVERTISE_URL", "",
             "http://host:port under which decode instances reach it; not needed when all of them are on this host"),
    _Setting("--handshake", "HANDSHAKE", HandshakeConfig.name,
             "how --prefill and --decode share a request: layerwise (MooncakeLayerwiseConnector), pull "
             "(MooncakeConnectorV1, MooncakeHybridConnector, NixlConnector) or bootstrap (MooncakeConnector of vLLM)"),
    _Setting("--bootstrap-port", "BOOTSTRAP_PORT", HandshakeConfig.bootstrap_port,
             "of the prefill instances' bootstrap servers (only with --handshake bootstrap)", kind=int),
    _Setting("--encode-fallback", "ENCODE_FALLBACK", "local",
             "when no encode instance answers: local (the next stage encodes) or off (503)"),
    _Setting("--max-requests", "MAX_REQUESTS", AdmissionConfig.running_max, "requests served at once", kind=int),
    _Setting("--max-queued", "MAX_QUEUED", AdmissionConfig.queued_max,
             "requests that wait for their turn beyond that, their bodies unread; the next one gets 429", kind=int),
    _Setting("--queue-timeout-s", "QUEUE_TIMEOUT_S", AdmissionConfig.queue_s,
             "for such a request to wait; then it gets 503", kind=float),
    _Setting("--policy", "POLICY", Balance.policy,
             "which instance gets a request: least_loaded; power_of_two (the less loaded of two drawn by lot, for many "
             "proxies); prefix or session (those that begin the same, or of one session, meet at one instance)"),
    _Setting("--session-header", "SESSION_HEADER", Balance.session_header, "header that names the session"),
    _Setting("--breaker-failures", "BREAKER_FAILURES", Balance.breaker_failures,
             "failures in a row after which an instance is spared; 0 is never", kind=int),
    _Setting("--breaker-open-s", "BREAKER_OPEN_S", Balance.breaker_open_s,
             "for which it is, before one request at a time may try it", kind=float),
    _Setting("--known-items-ttl-s", "KNOWN_ITEMS_TTL_S", Items.known_ttl_s,
             "for which an encoded item is taken to be in the store, and not encoded again; 0 is never", kind=float),
    _Setting("--consumers-wait", "CONSUMERS_WAIT", Items.consumers_wait,
             "on: --prefill-decode instances get a request while its items are being encoded, and wait for them; they "
             "need vLLM 0.23 or later and this project's EC connector"),
    _Setting("--store", "STORE_URLS", (), "what holds the embeddings (GET /health): when one goes down, all are gone",
             several=True),
    _Setting("--item-key-file", "ITEM_KEY_FILE", "", "file with the secret in the names of items, for proxies that "
             "are to share embeddings; without it each start makes a new one"),
    _Setting("--tenant-headers", "TENANT_HEADERS", Items.tenant_headers,
             "headers that tell whose items a request's are; none: all clients share them", several=True,
             metavar="HEADER"),
    _Setting("--max-retries", "MAX_RETRIES", Retry.max_attempts,
             "tries per stage in all, each on another instance", kind=int),
    _Setting("--retry-delay", "RETRY_DELAY_S", Retry.delay_s, "seconds before the second try, doubled each time",
             kind=float),
    _Setting("--connect-timeout-s", "CONNECT_TIMEOUT_S", Timeouts.connect_s, "to connect to an instance", kind=float),
    _Setting("--encode-timeout-s", "ENCODE_TIMEOUT_S", Timeouts.encode_s, "for one item to be encoded", kind=float),
    _Setting("--callback-timeout-s", "CALLBACK_TIMEOUT_S", Timeouts.callback_s,
             "for a decode instance to admit a request and call back; has to allow for its queue", kind=float),
    _Setting("--prefill-timeout-s", "PREFILL_TIMEOUT_S", Timeouts.prefill_s,
             "for a prefill whose KV goes to decode", kind=float),
    _Setting("--handover-timeout-s", "HANDOVER_TIMEOUT_S", Timeouts.handover_s,
             "from prefill's end to a stream's first byte", kind=float),
    _Setting("--release-timeout-s", "RELEASE_TIMEOUT_S", Timeouts.release_s,
             "to go on trying to free an abandoned request's KV blocks on decode", kind=float),
    _Setting("--first-byte-timeout-s", "FIRST_BYTE_TIMEOUT_S", Timeouts.first_byte_s,
             "for an answer's first byte (all of it when not streamed)", kind=float),
    _Setting("--idle-timeout-s", "IDLE_TIMEOUT_S", Timeouts.idle_s, "between two chunks of a stream", kind=float),
    _Setting("--body-idle-timeout-s", "BODY_IDLE_TIMEOUT_S", Timeouts.body_idle_s,
             "for the next bytes of a client's body; then 408", kind=float),
    _Setting("--write-idle-timeout-s", "WRITE_IDLE_TIMEOUT_S", Timeouts.write_idle_s,
             "for a client to take the next bytes of its answer; then it is cut off", kind=float),
    _Setting("--drain-timeout-s", "DRAIN_TIMEOUT_S", Timeouts.drain_s,
             "for running requests to end after SIGTERM", kind=float),
    _Setting("--health-interval-s", "HEALTH_INTERVAL_S", Health.interval_s, "between two probes", kind=float),
    _Setting("--health-timeout-s", "HEALTH_TIMEOUT_S", Health.timeout_s, "for a probe to be answered", kind=float),
    _Setting("--max-body-mib", "MAX_BODY_MIB", Limits.body_bytes // MIB, "largest request body", kind=int),
    _Setting("--max-bodies-mib", "MAX_BODIES_MIB", Limits.bodies_bytes // MIB,
             "all request bodies in memory at once, each from its arrival to its answer's first byte; beyond it 503. "
             "The proxy needs 6 times as much memory", kind=int),
    _Setting("--max-media-items", "MAX_MEDIA_ITEMS", Limits.media_items, "most media items in a request", kind=int),
    _Setting("--tls-cert", "TLS_CERT", "", "PEM file with the certificate chain that clients are shown"),
    _Setting("--tls-key", "TLS_KEY", "", "PEM file with its key; read again, with the certificate, when it changes"),
    _Setting("--tls-client-ca", "TLS_CLIENT_CA", "", "PEM file with the CAs of the certificates that clients need"),
    _Setting("--backend-tls-ca", "BACKEND_TLS_CA", "", "PEM file with further CAs of https instances"),
    _Setting("--backend-tls-cert", "BACKEND_TLS_CERT", "", "PEM file with the certificate that instances are shown"),
    _Setting("--backend-tls-key", "BACKEND_TLS_KEY", "", "PEM file with its key"),
    _Setting("--backend-tls-verify", "BACKEND_TLS_VERIFY", TlsConfig.backend_verify,
             "check the certificates of https instances: on or off"),
    _Setting("--api-keys-file", "API_KEYS_FILE", "",
             "file with the keys of clients: KEY or NAME KEY a line; read again when it changes"),
    _Setting("--backend-key-file", "BACKEND_KEY_FILE", "",
             "file with the key that instances are shown in place of the client's; read again when it changes"),
    _Setting("--cors-origins", "CORS_ORIGINS", (), "origins of pages whose scripts may call, or *", several=True,
             metavar="ORIGIN"),
    _Setting("--admin-host", "ADMIN_HOST", AdminConfig.host, "address to bind for operators"),
    _Setting("--admin-port", "ADMIN_PORT", AdminConfig.port, "port to bind for /admin/*, 0 for none", kind=int),
    _Setting("--admin-keys-file", "ADMIN_KEYS_FILE", "", "file with the keys of operators: KEY or NAME KEY a line"),
    _Setting("--otlp-endpoint", "OTLP_ENDPOINT", "",
             "http://host:port of an OpenTelemetry collector (OTLP over HTTP), which gets a span for each request and "
             "for each instance it is sent to; needs epd-proxy[otel]"),
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
        config = _build(values, _topology(values), _build_items(values, faults))
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    return config


def _topology(values: Mapping[str, Any]) -> Topology:
    if values["instances_file"]:
        return read_instances(Path(values["instances_file"]))
    stages = ("encode", "prefill_decode", "prefill", "decode")
    return Topology(*(tuple(url.rstrip("/") for url in values[stage]) for stage in stages))


def _build(values: Mapping[str, Any], topology: Topology, items: Items) -> ProxyConfig:
    return ProxyConfig(
        listen=Listen(values["host"], values["port"], values["workers"]),
        topology=topology,
        metaserver=MetaserverConfig(
            values["metaserver_host"], values["metaserver_port"], values["metaserver_advertise_url"].rstrip("/")
        ),
        timeouts=Timeouts(**{each.name: values[each.name.replace("_s", "_timeout_s")] for each in fields(Timeouts)}),
        retry=Retry(values["max_retries"], values["retry_delay"]),
        limits=Limits(values["max_body_mib"] * MIB, values["max_media_items"], values["max_bodies_mib"] * MIB),
        health=Health(values["health_interval_s"], values["health_timeout_s"]),
        items=items,
        balance=Balance(
            values["policy"], values["session_header"], values["breaker_failures"], values["breaker_open_s"]
        ),
        handshake=HandshakeConfig(values["handshake"], values["bootstrap_port"]),
        admission=AdmissionConfig(values["max_requests"], values["max_queued"], values["queue_timeout_s"]),
        logging=Logging(values["log_level"], values["log_format"]),
        encode_fallback=values["encode_fallback"],
        admin=AdminConfig(values["admin_host"], values["admin_port"], values["admin_keys_file"]),
        instances_file=values["instances_file"],
        otlp_endpoint=values["otlp_endpoint"].rstrip("/"),
        access=AccessConfig(values["api_keys_file"], values["backend_key_file"], values["cors_origins"]),
        tls=TlsConfig(
            values["tls_cert"],
            values["tls_key"],
            values["tls_client_ca"],
            values["backend_tls_ca"],
            values["backend_tls_cert"],
            values["backend_tls_key"],
            values["backend_tls_verify"],
        ),
    )


def _build_items(values: Mapping[str, Any], faults: list[str]) -> Items:
    items = Items(
        tenant_headers=tuple(name for name in values["tenant_headers"] if name != "none"),
        known_ttl_s=values["known_items_ttl_s"],
        consumers_wait=values["consumers_wait"],
        store=tuple(url.rstrip("/") for url in values["store"]),
    )
    try:
        return replace(items, key=read_key(values["item_key_file"])) if values["item_key_file"] else items
    except ConfigError as error:
        faults += error.faults
        return items


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: `--encode` must not also mean `--encode-timeout-s` in an older version.
    parser = argparse.ArgumentParser("epd-proxy", description=epd_proxy_doc, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    for setting in _SETTINGS:
        default = " ".join(setting.default) if setting.several else setting.default
        text = f"{setting.help} [EPD_PROXY_{setting.env}; default: {default or 'none'}]"
        if setting.several:
            parser.add_argument(setting.flag, nargs="+", action="extend", metavar=setting.metavar, help=text)
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
        return tuple(word for text in texts for word in text.replace(",", " ").split())
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
