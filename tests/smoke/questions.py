"""What every topology is asked: eight pictures in three formats, one and several per request."""

from __future__ import annotations

from typing import Any

from smoke.client import chat_body
from smoke.pictures import picture

PICTURES = 8


def picture_questions(seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return requests by name that hold PICTURES pictures in all; seeds ten apart share none."""
    return {
        "one png": chat_body("What is it?", [picture(seed + 1, "png")]),
        "one jpeg": chat_body("Describe it.", [picture(seed + 2, "jpeg")]),
        "one webp": chat_body("Name the colours.", [picture(seed + 3, "webp")]),
        "two pictures": chat_body("Compare them.", [picture(seed + 4, "png"), picture(seed + 5, "jpeg")]),
        "three pictures": chat_body(
            "Which one?", [picture(seed + 6, "webp"), picture(seed + 7, "png"), picture(seed + 8, "jpeg")]
        ),
    }
