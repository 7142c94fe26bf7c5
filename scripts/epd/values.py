"""What a value may look like: each function returns it checked, or refuses it and says how to write it. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence

from epd.errors import StepError

_SIZE = re.compile(r"^(\d+(?:\.\d+)?) ?([kmgtp]?)(?:i?b)?$", re.IGNORECASE)
_REGISTRY = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.-]*)?(:\d+)?/([a-z0-9._-]+/)*$")
_UNITS = ("", "k", "m", "g", "t", "p")
_MIB = 1 << 20
LEAST_MEMORY_BYTES = 64 * _MIB
"""Less than this is a forgotten unit: no service of ours starts in it (Docker itself refuses less than 6 MiB)."""
STORE_PROCESS_MIB = 128
"""What the store's process needs beside its pool; 39 MiB were measured with an empty pool."""
_MEMORY = ("EPD_MEMORY_LIMIT", "EPD_STORE_MEMORY_LIMIT", "EPD_PROXY_MEMORY_LIMIT", "EPD_SHM_SIZE")
_COUNTS = {
    "EPD_MAX_MODEL_LEN": 1,
    "EPD_MAX_NUM_SEQS": 1,
    "EPD_STORE_SIZE_MB": 16,
    "EPD_PROXY_WORKERS": 1,
    "EPD_CPU_THREADS": 1,
    "EPD_CPU_KV_CACHE_GIB": 1,
}
"""Whole numbers and the least each may be."""
_FLAGS = ("EPD_EXPERT_PARALLEL", "EPD_SKIP_MEMORY_CHECK")


def check_all(values: Mapping[str, str]) -> None:
    """Check the variables of the stack that have a form; empty ones stand for their defaults.

    Raises:
        StepError: one is not usable.
    """
    given = {name: value for name, value in values.items() if value}
    for name in _MEMORY:
        if name in given:
            _memory(name, given[name])
    for name, least in _COUNTS.items():
        if name in given:
            _count(name, given[name], least)
    for name in _FLAGS:
        if name in given:
            flag(name, given[name])
    if "EPD_PROXY_BIND" in given:
        address(given["EPD_PROXY_BIND"])


def check_store(size_mb: int, limit: str) -> None:
    """Check that the pool of embeddings, `size_mb` MiB, fits into the container that owns it; a limit of 0 is none.

    Raises:
        StepError: it does not.
    """
    need_mib = size_mb + STORE_PROCESS_MIB
    have_mib = size_bytes("EPD_STORE_MEMORY_LIMIT", limit) // _MIB
    if have_mib and need_mib > have_mib:
        raise StepError(
            "the embeddings' pool does not fit into its container",
            expected=f"EPD_STORE_SIZE_MB + {STORE_PROCESS_MIB} MiB for its process, within EPD_STORE_MEMORY_LIMIT",
            found=f"{size_mb} + {STORE_PROCESS_MIB} = {need_mib} MiB; EPD_STORE_MEMORY_LIMIT={limit} is {have_mib} MiB",
            fix=f"raise the limit, EPD_STORE_MEMORY_LIMIT={need_mib}m, or choose a smaller EPD_STORE_SIZE_MB",
        )


def flag(name: str, value: str) -> bool:
    """Return a yes or no; empty is no.

    Raises:
        StepError: it is neither.
    """
    if value.lower() in ("", "0", "no", "false"):
        return False
    if value.lower() in ("1", "yes", "true"):
        return True
    raise StepError(f"{name} is not usable", expected="1 or 0", found=f"{name}={value}", fix=f"{name}=1 make up")


def choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return one of the choices, or empty.

    Raises:
        StepError: it is neither.
    """
    if value and value not in choices:
        raise StepError(
            f"{name} is not usable",
            expected=f"one of: {', '.join(choices)}",
            found=f"{name}={value}",
            fix=f"correct it, e.g. {name}={choices[0]}, or leave it out",
        )
    return value


def number(name: str, value: str, low: float, high: float) -> float:
    """Return a number from `low` to `high`.

    Raises:
        StepError: it is none.
    """
    try:
        found = float(value)
    except ValueError:
        found = float("nan")
    if not low <= found <= high:
        raise StepError(
            f"{name} is not usable",
            expected=f"a number from {low:.0f} to {high:.0f}",
            found=f"{name}={value}",
            fix=f"correct it in the environment or in .env, e.g. {name}={low:.0f}",
        )
    return found


def matching(name: str, value: str, pattern: re.Pattern[str]) -> str:
    """Return a name that has the form of `pattern`: small letters, digits, - and _.

    Raises:
        StepError: it has not.
    """
    if not pattern.match(value):
        raise StepError(
            f"{name} is not usable",
            expected=f"a name of the form {pattern.pattern}",
            found=f"{name}={value}",
            fix="use small letters, digits, - and _",
        )
    return value


def registry(value: str) -> str:
    """Return the prefix of the images' names with its slash; empty stays empty.

    Raises:
        StepError: it is no such prefix, as an address with https:// is none.
    """
    prefix = f"{value.rstrip('/')}/" if value else ""
    if prefix and not _REGISTRY.match(prefix):
        raise StepError(
            "REGISTRY is not usable",
            expected="a host with or without port, and a path of small letters: registry.example:5000/team/",
            found=f"REGISTRY={value}",
            fix="leave out https:// and the image's name",
        )
    return prefix


def size_bytes(name: str, value: str) -> int:
    """Return a size as Docker reads it (`6g`, `512m`, `1.5GiB`; every unit is a power of 1024), in bytes.

    Raises:
        StepError: it is none.
    """
    match = _SIZE.match(value)
    if match is None:
        raise StepError(
            f"{name} is not usable",
            expected="a size with its unit, as Docker reads it: 512m, 6g",
            found=f"{name}={value}",
            fix=f"correct it in the environment or in .env, e.g. {name}=6g",
        )
    return int(float(match[1]) * 1024 ** _UNITS.index(match[2].lower()))


def address(value: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address in EPD_PROXY_BIND; one of IPv6 is in brackets, without which Compose cannot tell the port.

    Raises:
        StepError: it is none.
    """
    bracketed = value.startswith("[") and value.endswith("]")
    try:
        found = ipaddress.ip_address(value[1:-1] if bracketed else value)
    except ValueError:
        found = None
    if found is None or bracketed != (found.version == 6):
        right = f"'[{value}]'" if found is not None and not bracketed else "127.0.0.1, or 0.0.0.0 for all networks"
        raise StepError(
            "EPD_PROXY_BIND is not usable",
            expected="an IP address of this machine, one of IPv6 in brackets",
            found=f"EPD_PROXY_BIND={value}",
            fix=f"EPD_PROXY_BIND={right}",
        )
    return found


def _memory(name: str, value: str) -> None:
    found = size_bytes(name, value)
    if 0 < found < LEAST_MEMORY_BYTES:
        raise StepError(
            f"{name} is not usable",
            expected=f"at least {LEAST_MEMORY_BYTES // _MIB} MiB, or 0 for no limit",
            found=f"{name}={value} is {found} bytes",
            fix=f"write the unit: {name}=6g",
        )


def _count(name: str, value: str, least: int) -> None:
    if not (value.isascii() and value.isdecimal() and int(value) >= least):
        raise StepError(
            f"{name} is not usable",
            expected=f"a whole number, {least} or more",
            found=f"{name}={value}",
            fix=f"correct it in the environment or in .env; `make up {name}=` goes back to the default",
        )
