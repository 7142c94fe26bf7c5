"""Which stages a request passes through. Pure."""

from dataclasses import dataclass

from .protocol import InferenceRequest, MediaItem


@dataclass(frozen=True, slots=True)
class Plan:
    """The items to encode first, and what the request weighs afterwards, in estimated tokens."""

    encode: tuple[MediaItem, ...]
    cost: int


def build(request: InferenceRequest, *, has_encoders: bool) -> Plan:
    """Plan the stages: text skips encode, and so does everything when there is no encode stage."""
    cost = request.text_tokens + request.output_tokens + sum(item.cost for item in request.items)
    return Plan(encode=request.items if has_encoders else (), cost=max(1, cost))
