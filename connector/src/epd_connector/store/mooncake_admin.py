"""What a Mooncake master tells about its pool over HTTP, on its metrics port.

Paths and formats were read from a running master of Mooncake 0.3.13.post1; see ``mooncake_master --metrics_port``.
"""

import urllib.request
from collections import Counter
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from ..keys import KEY_PREFIX
from .base import StoreError, StoreUnavailableError

TIMEOUT_S = 10.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the pool is never behind an HTTP proxy


@dataclass(frozen=True)
class PoolReport:
    """State of a pool. Sizes are of everything in it, also of what others than the connector keep there."""

    used_bytes: int
    capacity_bytes: int
    evicted_objects: int
    objects_by_model: dict[str, int]
    """Embeddings by the model digest of their keys; see :class:`epd_connector.keys.ModelIdentity`."""


def read_pool(url: str) -> PoolReport:
    """Ask the master at ``url``, e.g. ``http://10.0.0.1:9003``. Raises StoreError when it gives no sense."""
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(get_text(f"{url}/metrics")):
        sums.update({sample.name: int(sample.value) for sample in family.samples if not sample.labels})
    # Mooncake names its counters without _total; the parser adds it.
    needed = ("master_allocated_bytes", "master_total_capacity_bytes", "master_evicted_key_count_total")
    if absent := [name for name in needed if name not in sums]:
        raise StoreError(f"{url}/metrics has no {', '.join(absent)}: expected the metrics port of a Mooncake master")
    models = [parts[2] for key in get_text(f"{url}/get_all_keys").split() if len(parts := _split(key)) == 4]
    return PoolReport(
        used_bytes=sums[needed[0]],
        capacity_bytes=sums[needed[1]],
        evicted_objects=sums[needed[2]],
        objects_by_model=dict(Counter(models)),
    )


def _split(key: str) -> list[str]:
    return key.split("/") if key.startswith(f"{KEY_PREFIX}/") else []


def get_text(url: str) -> str:
    """Return the body of a GET. Raises StoreUnavailableError when there is none."""
    try:
        with _OPENER.open(url, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError) as error:  # URLError, time-outs, resets; a URL or bytes that are none
        raise StoreUnavailableError(f"GET {url}: {error}") from error
