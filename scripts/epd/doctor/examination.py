"""All checks, in the order in which a person would ask."""

from __future__ import annotations

from epd.doctor import containers, driver, engine, inside, npu_network, ports, resources
from epd.doctor.finding import Finding, Status
from epd.doctor.subject import Subject

_PARTS = (engine, driver, npu_network, containers, ports, resources, inside)


def examine(subject: Subject) -> list[Finding]:
    """Return what every check found. A check that breaks is a finding, too."""
    found: list[Finding] = []
    for part in _PARTS:
        try:
            found += part.check(subject)
        except (OSError, ValueError, KeyError) as error:
            name = f"{part.__name__.rsplit('.', 1)[-1]}.check"
            fix = "this is a fault of the check itself: report it with `make doctor ARGS=--json`"
            found.append(Finding(name, Status.WARN, f"{type(error).__name__}: {error}", "a check that ends", fix))
    return found
