"""Coroutine tests run on uvloop, as the proxy does, each with a loop of its own and 60 s to end."""

import asyncio
import inspect
import sys
from typing import Any

import pytest
import uvloop

from epd_proxy.flows import layerwise, releases

TEST_TIMEOUT_S = 60


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine function; leave others to pytest."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}

    async def run() -> None:
        async with asyncio.timeout(TEST_TIMEOUT_S):
            await pyfuncitem.obj(**arguments)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    assert sys.exc_info()[1] is None, "a compiled coroutine left its exception behind (test_compiled.py)"
    return True


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the proxy gives prefill and decode to settle and to be tried again is short enough to wait for."""
    monkeypatch.setattr(releases, "_AFTER_CLOSING_S", 0.1)
    monkeypatch.setattr(releases, "_BETWEEN_TRIES_S", 0.1)
    monkeypatch.setattr(releases, "_LATE_CALL_S", 0.5)
    monkeypatch.setattr(layerwise, "_SETTLE_S", 0.5)
