"""Which stages a request passes through. Pure."""

from collections.abc import Collection
from enum import Enum
from typing import NamedTuple

from .protocol import InferenceRequest, MediaItem, why_not_split


class Handshake(Enum):
    """How prefill and decode share a request."""

    COLOCATED = "colocated"
    LAYERWISE = "layerwise"
    PULL = "pull"
    BOOTSTRAP = "bootstrap"


class Plan(NamedTuple):
    """The items to encode first, how the rest is done, and what it weighs, in estimated tokens."""

    encode: tuple[MediaItem, ...]
    handshake: Handshake
    prompt_cost: int
    cost: int


def build(request: InferenceRequest, stages: Collection[str], split_by: Handshake = Handshake.LAYERWISE) -> Plan:
    """Plan the way through the stages there are, given by name: text skips encode, as all does without encoders.

    ``split_by`` is how prefill and decode share what can be split, where they are apart.

    What cannot be split stays on one instance: a prefill instance is a complete engine.
    """
    prompt_cost = max(1, request.text_tokens + sum(item.cost for item in request.items))
    split = "decode" in stages and why_not_split(request) is None
    return Plan(
        encode=request.items if "encode" in stages else (),
        handshake=split_by if split else Handshake.COLOCATED,
        prompt_cost=prompt_cost,
        cost=prompt_cost + request.output_tokens,
    )
