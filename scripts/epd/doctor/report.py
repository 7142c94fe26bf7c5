"""Findings as a person reads them, and as a program does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from epd.doctor.finding import Finding, Status


def text(findings: Sequence[Finding]) -> str:
    """Return the findings and their totals."""
    return f"{details(findings)}\n{summary(findings)}"


def details(findings: Sequence[Finding]) -> str:
    """Return one line for what is well, and what was expected, found and helps for the rest."""
    lines = []
    for finding in findings:
        if finding.status is Status.PASS:
            lines.append(f"PASS {finding.name:<22} {finding.found}")
            continue
        lines.append(f"{finding.status} {finding.name}")
        lines += [f"       expected: {finding.expected}", f"       found:    {finding.found}"]
        lines.append(f"       fix:      {finding.fix}")
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    """Return the totals in a line."""
    count = Counter(finding.status for finding in findings)
    return ", ".join(f"{count[status]} {status}" for status in Status)


def as_json(findings: Sequence[Finding]) -> str:
    """Return all findings as JSON: a list under `findings`, totals under `totals`."""
    count = Counter(finding.status for finding in findings)
    document = {
        "totals": {status.value: count[status] for status in Status},
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 when something keeps the stack from starting, else 0."""
    return int(any(finding.status is Status.FAIL for finding in findings))
