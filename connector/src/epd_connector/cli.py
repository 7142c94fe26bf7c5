"""``epd-ec``: look at, check and empty the store of embeddings.

In a container of the stack it needs no arguments: the variables that `epd-serve` reads are its defaults.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .admin import count_hits, measure_speed, measure_usage, purge
from .config import STORES, ConfigError, ConnectorConfig, read_config
from .store.base import StoreError

_MAX_OBJECT_MB = 1024


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run one command; return 0, or 1 when the store or its configuration is at fault."""
    # Mooncake logs each connection it makes; what goes wrong comes back as a code. Read when it is loaded.
    os.environ.setdefault("GLOG_minloglevel", "2")
    options = _make_parser(environ).parse_args(arguments)
    try:
        report = _COMMANDS[options.command](options, _read_store(options))
    except (ConfigError, StoreError) as error:
        print(f"epd-ec: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report) if options.json else "\n".join(_show(name, report[name]) for name in report))
    return 0


def _show(name: str, value: Any) -> str:
    """Return a line for a person: sizes in MiB and times in ms. The names in the report tell its units."""
    if value is None:
        text = "unknown"
    elif name.endswith("_bytes"):
        text = f"{value / (1 << 20):.1f} MiB"
    elif name.endswith("_bytes_per_s"):
        text = f"{value / (1 << 20):.0f} MiB/s"
    elif name.endswith("_s"):
        text = f"{value * 1000:.2f} ms"
    elif name == "hit_rate":
        text = f"{value:.1%}"
    elif isinstance(value, dict):
        text = ", ".join(f"{key[:12]}…: {number}" for key, number in value.items()) or "none"
    else:
        text = str(value)
    label = name.removesuffix("_per_s").removesuffix("_bytes").removesuffix("_s").replace("_", " ")
    return f"{label:<18}{text}"


def _make_parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    def default(name: str, otherwise: str) -> str:
        return environ.get(name, "").strip() or otherwise

    master = default("EPD_MOONCAKE_HOST", "mooncake-master")
    http = f"http://{master}"
    own_metrics = f"http://127.0.0.1:{default('EPD_EC_METRICS_PORT', '9400')}/metrics"
    parser = argparse.ArgumentParser(prog="epd-ec", description=__doc__)
    add = parser.add_argument
    add("command", choices=list(_COMMANDS), help="stat: what is in it; check: put and get, timed; purge: empty it")
    add("--store", choices=STORES, default=default("EPD_EC_STORE", "mooncake"), help="EPD_EC_STORE (%(default)s)")
    add(
        "--master",
        default=f"{master}:{default('EPD_MOONCAKE_RPC_PORT', '50051')}",
        help="host:port of the Mooncake master (%(default)s)",
    )
    add(
        "--metadata-server",
        default=f"{http}:{default('EPD_MOONCAKE_METADATA_PORT', '8080')}/metadata",
        help="that of the pool's clients (%(default)s)",
    )
    add(
        "--master-metrics",
        default=f"{http}:{default('EPD_MOONCAKE_METRICS_PORT', '9003')}",
        help="the master's HTTP port, asked by stat (%(default)s)",
    )
    add("--shared-dir", default=default("EPD_EC_SHARED_DIR", "/ec"), help="EPD_EC_SHARED_DIR (%(default)s)")
    add(
        "--shared-dir-size-mb",
        type=int,
        default=default("EPD_STORE_SIZE_MB", "512"),
        help="size of all its objects, in MiB, EPD_STORE_SIZE_MB (%(default)s)",
    )
    add(
        "--instance-metrics",
        action="append",
        metavar="URL",
        help=f"metrics of a consumer, for stat's hit rate; once for each ({own_metrics}, if there is any)",
    )
    add("--object-mb", type=_read_object_mb, default=8, help="object size of check, in MiB (%(default)s)")
    add("--json", action="store_true", help="print one JSON object: sizes in bytes, times in seconds")
    parser.set_defaults(own_metrics=own_metrics)
    return parser


def _read_object_mb(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_OBJECT_MB:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {_MAX_OBJECT_MB}, found {text!r}")
    return int(text)


def _read_store(options: argparse.Namespace) -> ConnectorConfig:
    if options.store == "shared_dir":
        of_store = {"shared_dir_path": options.shared_dir, "shared_dir_size_mb": options.shared_dir_size_mb}
    else:
        of_store = {"master_server_address": options.master, "metadata_server": options.metadata_server}
    return read_config({"store": options.store, **of_store})


def _stat(options: argparse.Namespace, config: ConnectorConfig) -> dict[str, Any]:
    usage = measure_usage(config, options.master_metrics.rstrip("/"))
    return {"store": config.store, **asdict(usage), **_describe_hits(options)}


def _describe_hits(options: argparse.Namespace) -> dict[str, Any]:
    urls = options.instance_metrics or [options.own_metrics]
    try:
        hits, encodes = count_hits(urls)
    except StoreError:
        if options.instance_metrics:
            raise
        return {"hit_rate": None}  # not in the container of a consumer, and nobody said where one is
    total = hits + encodes
    return {"hits": hits, "local_encodes": encodes, "hit_rate": hits / total if total else None}


def _check(options: argparse.Namespace, config: ConnectorConfig) -> dict[str, Any]:
    speed = measure_speed(config, options.object_mb << 20, rounds=5)
    rates = {"put_bytes_per_s": speed.size_bytes / speed.put_s, "get_bytes_per_s": speed.size_bytes / speed.get_s}
    return {"store": config.store, **asdict(speed), **rates}


def _purge(options: argparse.Namespace, config: ConnectorConfig) -> dict[str, Any]:  # noqa: ARG001
    return {"store": config.store, "removed_objects": purge(config)}


_COMMANDS = {"stat": _stat, "check": _check, "purge": _purge}
