"""`make bench-ec`: how an embedding gets from one process to another, by vLLM's example connector and by ours.

Runs handover.py in the image that serves (EPD_IMAGE) and writes its numbers to docs/ec-performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import marked

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "ec-performance.md"
SIZES_MIB = (1, 8, 32)
EXAMPLE, OURS = "ECExampleConnector", ("shared_dir", "mooncake")
TIMEOUT_S = 900
AS_SERVED = 'KMP_BLOCKTIME=1 LD_PRELOAD=$(echo /opt/preload/* | tr " " :) exec "$0" "$@"'
"""With the libraries that the image preloads into vLLM."""
PRIORITY = ("--cgroup-parent=/", "--cpu-shares=262144")
GOAL_SIZE_MIB = 8
"""The size that the goals of a whole hand-over are set for."""


def main() -> int:
    """Measure, print and write the tables. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--priority", action="store_true", help="go before the machine's other work (cgroups, version 1)"
    )
    args = parser.parse_args()
    measured = measure(os.environ["EPD_IMAGE"], args.rounds, PRIORITY if args.priority else ())
    tables = (table(measured), yardsticks(measured), goals(measured))
    text = "\n\n".join([heading(args.rounds, priority=args.priority), *map("\n".join, tables)])
    print(text)
    marked.write(DOCUMENT, "handover", text)
    return 0


def measure(image: str, rounds: int, more: Sequence[str]) -> list[dict[str, Any]]:
    """Return one line of handover.py a size, times in milliseconds."""
    words = ["docker", "run", "--rm", *more, "--shm-size=2g", f"--volume={ROOT}:/src:ro", "--workdir=/src"]
    words += ["--env=OMP_NUM_THREADS=1", "--env=PYTHONPATH=/src/connector/src"]
    words += ["--entrypoint=sh", image, "-c", AS_SERVED]
    words += ["python", "tests/bench/handover.py", str(rounds), *map(str, SIZES_MIB)]
    ended = subprocess.run(words, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"mib"')]
    if ended.returncode or len(lines) != len(SIZES_MIB):
        raise RuntimeError(f"handover.py ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")
    return lines


def heading(rounds: int, *, priority: bool) -> str:
    """Return when and where this was measured."""
    first = ", which had to wait," if priority else ""
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores of x86-64, medians of {rounds} rounds "
        f"in ms, all ways in turn in each round; the load of the machine{first} was {os.getloadavg()[1]:.1f}."
    )


def table(measured: list[dict[str, Any]]) -> list[str]:
    """Return what each way took, a row a way and size."""
    lines = [
        "| item | by | whole hand-over | encoder: `save_caches` | encoder: `get_finished` waits "
        "| consumer: fetched after | consumer: `start_load_caches` | then read once |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in measured:
        for way in (EXAMPLE, *OURS):
            found = line[way]
            cells = [found[name] for name in ("total", "save", "wait", "fetch", "load", "read")]
            lines.append(f"| {line['mib']} MiB | {way} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return lines


def yardsticks(measured: list[dict[str, Any]]) -> list[str]:
    """Return what a copy and Mooncake's own transfer took."""
    lines = ["| item | one memcpy | Mooncake's own put | its own get |", "| --- | --- | --- | --- |"]
    for line in measured:
        own = line["own"]
        lines.append(f"| {line['mib']} MiB | {own['memcpy']:.2f} | {own['put']:.2f} | {own['get']:.2f} |")
    return lines


def goals(measured: list[dict[str, Any]]) -> list[str]:
    """Return each goal with what was reached."""
    lines = ["| goal | reached |", "| --- | --- |"]
    for line in measured:
        for way in OURS:
            for hook, of in (("save_caches", "save"), ("start_load_caches", "load")):
                goal = f"{line['mib']} MiB, {way}: `{hook}` ≤ 1.5 memcpy"
                lines.append(_judge(goal, line[way][of], line["own"]["memcpy"], 1.5))
    (line,) = (line for line in measured if line["mib"] == GOAL_SIZE_MIB)
    own = line["own"]["put"] + line["own"]["get"]
    lines.append(
        _judge("8 MiB, shared_dir ≤ ECExampleConnector", line["shared_dir"]["total"], line[EXAMPLE]["total"], 1)
    )
    lines.append(_judge("8 MiB, mooncake ≤ 1.3 of its own put and get", line["mooncake"]["total"], own, 1.3))
    return lines


def _judge(goal: str, value: float, yardstick: float, limit: float) -> str:
    ratio = value / yardstick
    return f"| {goal} | {ratio:.2f}: {'yes' if ratio <= limit else '**no**'} |"


if __name__ == "__main__":
    sys.exit(main())
