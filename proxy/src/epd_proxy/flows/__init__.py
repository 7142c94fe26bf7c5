"""One file per prefill/decode handshake, behind one interface."""

from ..metaserver import Metaserver
from .colocated import ColocatedFlow
from .forwarding import Forwarding
from .interface import Flow, Job, Stages
from .layerwise import LayerwiseFlow

__all__ = ["ColocatedFlow", "Flow", "Forwarding", "Job", "LayerwiseFlow", "Stages", "choose_flow"]


def choose_flow(stages: Stages, metaserver: Metaserver | None) -> Flow:
    """Return the handshake for the stages there are; decode instances have ``metaserver`` to call back."""
    if metaserver:
        return LayerwiseFlow(stages, metaserver)
    return ColocatedFlow(stages, stages.pools["prefill_decode"])
