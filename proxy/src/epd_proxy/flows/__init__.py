"""One file per prefill/decode handshake, behind one interface."""

from ..errors import ConfigError
from .colocated import ColocatedFlow
from .interface import Flow, Job, Stages

__all__ = ["ColocatedFlow", "Flow", "Job", "Stages", "choose_flow"]


def choose_flow(stages: Stages) -> Flow:
    """Return the handshake for the stages there are.

    Raises :class:`epd_proxy.errors.ConfigError` for a topology that no handshake serves.
    """
    if "prefill_decode" not in stages.pools:
        raise ConfigError(
            ["--prefill and --decode: separate prefill and decode instances are not served by this version; "
             "give --prefill-decode URL"]
        )  # fmt: skip
    return ColocatedFlow(stages)
