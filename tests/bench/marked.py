"""Tables that a command writes into a document, between two marks."""

from __future__ import annotations

from pathlib import Path


def write(document: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks called ``name``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{document} has no {begin} … {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")
