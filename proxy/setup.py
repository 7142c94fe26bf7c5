"""Builds the package, of Python alone; with ``EPD_PROXY_COMPILE``, its busiest modules are compiled to C.

``EPD_PROXY_COMPILE`` names the interpreter of an environment that has what the package requires.
mypyc compiles them as they are; a text request takes a third less time. What it makes of a loop does not let go of
the GIL before its end, where the interpreter does every 5 ms. So what goes through bodies of any size, in threads,
stays as it is, which is most of ``protocol``: the event loop must have its turns meanwhile. ``requests`` only calls
these, and loops over what their generators yield. Of the others, each does a little per event. The rest is not busy, or
not what mypyc can compile: classes of errors, settings that are read from their class.

What differs: ``raise … from`` sets no ``__cause__``, so where one is read later it is set by hand (``raise_as`` in
flows/attempts.py); values of another type than is annotated raise TypeError; and while a coroutine is suspended in an
``except`` or ``finally``, whatever else fails has its exception for ``__context__``, which makes a chain without an
end. A module with a coroutine that waits there is not compiled: tests/proxy/test_compiled.py sees to it.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("src/epd_proxy")
COMPILED = (
    "server/*.py",
    "upstream/*.py",
    "flows/attempts.py",
    "flows/colocated.py",
    "flows/fanout.py",
    "flows/flights.py",
    "flows/forwarding.py",
    "protocol/headers.py",
    "protocol/requests.py",
    "access.py",
    "admission.py",
    "aside.py",
    "bodies.py",
    "breaker.py",
    "handlers.py",
    "known.py",
    "loads.py",
    "memory.py",
    "metrics.py",
    "plan.py",
    "policy.py",
    "pool.py",
    "relay.py",
)


def extensions() -> list[Extension]:
    """Return what is to be compiled; needs a C compiler, Python's headers and mypy."""
    python = os.environ.get("EPD_PROXY_COMPILE")
    if not python:
        return []
    from mypyc.build import mypycify  # noqa: PLC0415 - only where it is needed

    found = sorted(str(path) for pattern in COMPILED for path in SOURCE.glob(pattern) if path.name != "__init__.py")
    # Strict and with all packages there: of a base class that mypy does not know, mypyc makes code that crashes.
    options = ("--config-file=", "--strict", f"--python-executable={python}")
    return mypycify([*options, *found], group_name="epd_proxy")


setup(ext_modules=extensions())
