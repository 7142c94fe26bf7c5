"""How much text a prompt has, for APIs that nest it."""

_FIELDS = ("text", "content", "output", "thinking", "arguments")
_DEPTH_MAX = 6


def count_chars(value: object, depth: int = _DEPTH_MAX) -> int:
    """Return the length of all texts in ``value``: a string, or lists and objects that hold some."""
    if isinstance(value, str):
        return len(value)
    if depth and isinstance(value, list):
        return sum(count_chars(each, depth - 1) for each in value)
    if depth and isinstance(value, dict):
        return sum(count_chars(value[name], depth - 1) for name in _FIELDS if name in value)
    return 0
