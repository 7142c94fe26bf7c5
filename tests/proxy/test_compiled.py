"""What keeps modules from being compiled: see proxy/setup.py."""

import ast
from pathlib import Path

PROXY = Path(__file__).resolve().parents[2] / "proxy"


def find_compiled() -> list[Path]:
    """The modules that setup.py names; it cannot be imported where setuptools is not."""
    (patterns,) = [
        ast.literal_eval(line.value)
        for line in ast.parse((PROXY / "setup.py").read_text()).body
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "COMPILED"
    ]
    return [path for pattern in patterns for path in (PROXY / "src/epd_proxy").glob(pattern)]


def test_no_compiled_coroutine_waits_in_except_or_finally() -> None:
    compiled = find_compiled()
    waits = (ast.Await, ast.AsyncFor, ast.AsyncWith)
    found = [
        f"{path.name}:{node.lineno}"
        for path in compiled
        for attempt in ast.walk(ast.parse(path.read_text()))
        if isinstance(attempt, ast.Try | ast.TryStar)
        for part in (*attempt.handlers, *attempt.finalbody)
        for node in ast.walk(part)
        if isinstance(node, waits)
    ]
    assert len(compiled) > 20
    assert found == []
