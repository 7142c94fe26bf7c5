"""What is asked for: how many instances of each role, and how many cards each of them spans."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from epd.errors import StepError

_NAME = re.compile(r"^([1-9]\d?)e([1-9]\d?)p(?:([1-9]\d?)?)d$")
ROLES = ("encode", "prefill", "decode", "prefill-decode")


@dataclass(frozen=True)
class Parallel:
    """How many cards one instance spans: `tensor` cards share each layer, `data` copies of the model run abreast."""

    tensor: int = 1
    data: int = 1

    @property
    def cards(self) -> int:
        """Cards of one instance."""
        return self.tensor * self.data


@dataclass(frozen=True)
class Topology:
    """Roles, how many instances of each, and what they span."""

    name: str
    counts: Mapping[str, int]
    parallel: Mapping[str, Parallel] = field(default_factory=dict)
    expert_parallel: bool = False
    """Whether the experts of a mixture-of-experts model are spread over the cards of prefill and decode."""

    def of(self, role: str) -> Parallel:
        """Return what one instance of a role spans."""
        return self.parallel.get(role, Parallel())

    @property
    def cards(self) -> int:
        """Cards of all instances."""
        return sum(count * self.of(role).cards for role, count in self.counts.items())

    def arithmetic(self) -> str:
        """Say how many cards this needs, as a sum a person can follow."""
        terms = []
        for role, count in self.counts.items():
            span = self.of(role)
            terms.append(f"{count} {role} x {span.cards} (TP {span.tensor} x DP {span.data})")
        return f"{' + '.join(terms)} = {self.cards}"


def is_name(name: str) -> bool:
    """Whether this is the name of a topology."""
    return _NAME.match(name) is not None


def parse(name: str, parallel: Mapping[str, Parallel] | None = None, *, expert_parallel: bool = False) -> Topology:
    """Read a topology's name: `1e1pd`, `1e1p1d`, `2e4p4d`, …

    Raises:
        StepError: it is no such name.
    """
    match = _NAME.match(name)
    if match is None:
        raise StepError(
            "no such topology",
            expected="<n>e<n>pd (prefill and decode together) or <n>e<n>p<n>d, each number from 1 to 99",
            found=f"TOPOLOGY={name}",
            fix="make deploy-1e1pd, make deploy-1e1p1d, or TOPOLOGY=2e4p4d make deploy",
        )
    encode, middle, decode = match.groups()
    if decode:
        counts = {"encode": int(encode), "prefill": int(middle), "decode": int(decode)}
    else:
        counts = {"encode": int(encode), "prefill-decode": int(middle)}
    return Topology(name, counts, dict(parallel or {}), expert_parallel)


def variable(role: str, size: str) -> str:
    """Return the name of the variable for a role's TP or DP: `EPD_PREFILL_DECODE_TP`."""
    return f"EPD_{role.upper().replace('-', '_')}_{size}"


def read_parallel(values: Mapping[str, str]) -> dict[str, Parallel]:
    """Read EPD_<ROLE>_TP and EPD_<ROLE>_DP for every role.

    Raises:
        StepError: a value is not a whole number from 1 to 64.
    """
    found = {}
    for role in ROLES:
        found[role] = Parallel(_size(variable(role, "TP"), values), _size(variable(role, "DP"), values))
    return found


def _size(name: str, values: Mapping[str, str]) -> int:
    text = values.get(name, "").strip() or "1"
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise StepError(
            f"{name} is not usable",
            expected="a whole number of cards from 1 to 64",
            found=f"{name}={text}",
            fix=f"correct it, e.g. {name}=2",
        )
    return int(text)
