"""One file per prefill/decode handshake, behind one interface."""

from collections.abc import Collection

from ..config import ProxyConfig
from ..metaserver import Metaserver
from ..plan import Handshake
from .bootstrap import BootstrapFlow
from .colocated import ColocatedFlow
from .forwarding import Forwarding
from .interface import Flow, Job, Stages
from .layerwise import LayerwiseFlow
from .pull import PullFlow

__all__ = [
    "BootstrapFlow",
    "ColocatedFlow",
    "Flow",
    "Forwarding",
    "Job",
    "LayerwiseFlow",
    "PullFlow",
    "Stages",
    "choose_flow",
    "wants_metaserver",
]


def wants_metaserver(config: ProxyConfig, stages: Collection[str]) -> bool:
    """Whether decode instances call back."""
    return "decode" in stages and config.handshake.name == Handshake.LAYERWISE.value


def choose_flow(stages: Stages, metaserver: Metaserver | None) -> Flow:
    """Return the handshake for the stages there are; where decode instances call back, they call ``metaserver``."""
    if metaserver:
        return LayerwiseFlow(stages, metaserver)
    if "decode" not in stages.pools:
        return ColocatedFlow(stages, stages.pools["prefill_decode"], overlap=stages.config.items.consumers_wait == "on")
    return PullFlow(stages) if stages.config.handshake.name == Handshake.PULL.value else BootstrapFlow(stages)
