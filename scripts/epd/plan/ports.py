"""Which TCP ports the services of one host listen on.

Ranges that are not ours: the NPU transport takes random ports from 20000 + physical id x 1000 (up to 35999 with sixteen
cards), Mooncake's clients 15000 to 17000, HCCL 16666 and 60000 upwards. upstream's guide has KV ports within the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from epd.errors import StepError

PROXY, METASERVER = 8000, 8001
HTTP: Mapping[str, int] = {"encode": 8100, "prefill": 8200, "decode": 8300, "prefill-decode": 8400}
"""First HTTP port of each role; instance after instance takes the next."""
KV: Mapping[str, int] = {"prefill": 36000, "decode": 36100}
"""First port of the KV connector's side channel; an instance takes one for each of its cards."""
EC_METRICS: Mapping[str, int] = {"encode": 9400, "prefill": 9500, "prefill-decode": 9600}
"""First port of the EC connector's metrics in each role that has one; by role, so that one more moves no other."""
POOL: Mapping[str, int] = {
    "EPD_MOONCAKE_RPC_PORT": 8501,
    "EPD_MOONCAKE_METADATA_PORT": 8502,
    "EPD_MOONCAKE_METRICS_PORT": 8503,
    "EPD_STORE_PORT": 8511,
    "EPD_STORE_HTTP_PORT": 8512,
}
_RANGE = 100
FOREIGN = {
    "the NPU transport": range(20000, 36000),
    "Mooncake's clients": range(15000, 17001),
    "HCCL": range(60000, 65536),
}


@dataclass(frozen=True)
class InstancePorts:
    """The ports of one vLLM instance."""

    http: int
    metrics: int
    """Of the EC connector; 0 for decode, which has none."""
    kv: int
    """First of as many as the instance has cards; 0 where there is no KV transfer."""


class PortBook:
    """Hands out the ports of one host, none of them twice."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def take(self, role: str, cards: int) -> InstancePorts:
        """Return the ports of the next instance of a role.

        Raises:
            StepError: the role's range is used up.
        """
        http = self._next(role, HTTP[role], 1)
        metrics = self._next(f"metrics {role}", EC_METRICS[role], 1) if role in EC_METRICS else 0
        return InstancePorts(http, metrics, self._next(f"kv {role}", KV[role], cards) if role in KV else 0)

    def _next(self, what: str, first: int, count: int) -> int:
        used = self._used.get(what, 0)
        if used + count > _RANGE:
            raise StepError(
                "too many instances on one host",
                expected=f"at most {_RANGE} ports for {what} (from {first})",
                found=f"{used} taken and {count} more wanted",
                fix="spread the topology over more hosts",
            )
        self._used[what] = used + count
        return first + used
