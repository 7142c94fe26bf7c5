"""Writing YAML that a person can read. Only what our files need: mappings, lists, scalars, and Compose's `!reset`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN = re.compile(r"^[A-Za-z/_][A-Za-z0-9/_.-]*$")
_KEYWORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}


class Reset:
    """A value that takes away what a lower file said (Compose 2.24 and newer)."""


def dump(value: Mapping[str, Any]) -> str:
    """Return a mapping as YAML text."""
    return "\n".join(_mapping(value, 0)) + "\n"


def _mapping(value: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    for key, item in value.items():
        lines += _entry(f"{'  ' * depth}{_scalar(str(key))}:", item, depth)
    return lines


def _entry(head: str, item: Any, depth: int) -> list[str]:
    if isinstance(item, Mapping) and item:
        return [head, *_mapping(item, depth + 1)]
    if _is_list(item) and item:
        return [head, *_list(item, depth + 1)]
    return [f"{head} {_scalar(item)}"]


def _list(items: Sequence[Any], depth: int) -> list[str]:
    lines = []
    for item in items:
        if isinstance(item, Mapping) and item:
            first, *rest = _mapping(item, depth + 1)
            lines += [f"{'  ' * depth}- {first.strip()}", *rest]
        else:
            lines.append(f"{'  ' * depth}- {_scalar(item)}")
    return lines


def _is_list(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str)


def _scalar(item: Any) -> str:
    """Return a scalar; a string that YAML could take for something else is quoted the way JSON does it."""
    if isinstance(item, Reset):
        return "!reset []"
    if isinstance(item, str) and _PLAIN.match(item) and item.lower() not in _KEYWORDS:
        return item
    return json.dumps(item, ensure_ascii=False)
