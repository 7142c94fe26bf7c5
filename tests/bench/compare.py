"""`make bench-proxy`: our proxy beside others with the common yardstick, as the table of docs/performance.md.

What is measured are the packages of the proxy's image (EPD_PROXY_IMAGE), compiled as they are there.
The yardstick (`BENCH`, by default ../shared/bench/proxy_bench.py beside this repository) pins each proxy to one core,
the fake backends and the load to another, and prints one JSON line for a proxy and a scenario: medians of its rounds.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import marked

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "performance.md"
# All that is on by default: metrics, access log, health probes, names of items, the table of known items.
OURS = "-m epd_proxy --host 127.0.0.1 --port {port} --encode {encode} --prefill-decode {pd}"
# What the machine allows: one process in C that reads nothing of what it passes on.
BARE = Path(__file__).with_name("bare_nginx.sh")
# Each request goes to the encoder, as with pictures that were never seen.
UNKNOWN = f"{OURS} --known-items-ttl-s 0"
# The interpreter of the image, where this machine has it, is Debian's; how one was built makes a fifth of the speed.
PYTHON = Path("/usr/bin/python3")
PACKAGES = Path("/opt/venv/lib/python3.11/site-packages")
VERSION = (3, 11)
# Measured too where they are on PATH: pip install sglang-router==0.3.2 smg==1.13.0
MORE_PEERS = {
    name: f"{name} launch --host 127.0.0.1 --port {{port}} --worker-urls {{encode}} {{pd}} --policy round_robin "
    f"--prometheus-port {port} --log-level error"
    for name, port in (("sglang-router", 29998), ("smg", 29999))
}
NEEDED = {
    "nginx": "the fake backends, and a bare proxy: apt-get install nginx-light",
    "wrk": "the load: apt-get install wrk",
    "taskset": "one core each: apt-get install util-linux",
    "vllm-router": "the peer: pip install vllm-router==0.1.17 in a virtual environment whose bin/ is on PATH",
}


def main() -> int:
    """Measure, print and write the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=ROOT.parent / "shared" / "bench" / "proxy_bench.py")
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", type=Path, default=PYTHON if version_of(PYTHON)[:2] == VERSION else
                        Path(sys.executable), help="the proxy's interpreter, of the image's version")  # fmt: skip
    args = parser.parse_args()
    missing = [f"{name} ({why})" for name, why in NEEDED.items() if shutil.which(name) is None]
    if not args.bench.is_file():
        missing.append(f"the yardstick (BENCH=path/to/proxy_bench.py, found nothing at {args.bench})")
    if version_of(args.python)[:2] != VERSION:
        missing.append(f"Python {'.'.join(map(str, VERSION))}, which the proxy is compiled for (ARGS=--python=...)")
    if "EPD_PROXY_IMAGE" not in os.environ:
        missing.append("EPD_PROXY_IMAGE, the proxy's image (make bench-proxy builds it)")
    if missing:
        print("FAIL: needed and not found:", *missing, sep="\n  - ", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        packages = copy_packages(os.environ["EPD_PROXY_IMAGE"], Path(folder))
        proxies = {
            "ascend-epd": f"env PYTHONPATH={packages} {args.python} {OURS}",
            "ascend-epd, known items off": f"env PYTHONPATH={packages} {args.python} {UNKNOWN}",
            "nginx, bare": f"{BARE} {folder}/nginx {{port}} {{pd}}",
            **{name: started for name, started in MORE_PEERS.items() if shutil.which(name)},
            "vllm-router": "vllm-router",
        }
        before = cpu_times()
        measured = measure(args.bench, proxies, args.seconds, args.rounds)
        lost = stolen(before, cpu_times())
    text = table(measured, args.python, args.seconds, args.rounds)
    text += f"\n\nOther machines of the host took {lost:.1%} of the cores' time meanwhile."
    print(text)
    marked.write(DOCUMENT, "measured", text)
    return 0


def cpu_times() -> list[int]:
    """Return how long the cores did what, since the machine started (proc(5), stat), in ticks."""
    with open("/proc/stat", encoding="ascii") as stat:
        return [int(ticks) for ticks in stat.readline().split()[1:9]]


def stolen(before: list[int], after: list[int]) -> float:
    """Return the part of the time between that a virtual machine's cores were not there when they were wanted."""
    spent = [end - start for start, end in zip(before, after, strict=True)]
    return spent[-1] / sum(spent)


def version_of(python: Path) -> tuple[int, ...]:
    """Return an interpreter's version; nothing where there is none."""
    if not python.is_file():
        return ()
    shown = subprocess.run([python, "-c", "import platform; print(platform.python_version())"], check=True,
                           stdout=subprocess.PIPE, text=True).stdout  # fmt: skip
    return tuple(int(number) for number in shown.split("."))


def copy_packages(image: str, folder: Path) -> Path:
    """Copy the packages of an image into ``folder``; return where they are."""
    made = subprocess.run(["docker", "create", image], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        subprocess.run(["docker", "cp", f"{made}:{PACKAGES}", folder], check=True, stdout=subprocess.DEVNULL)
    finally:
        subprocess.run(["docker", "rm", made], check=True, stdout=subprocess.DEVNULL)
    return folder / PACKAGES.name


def measure(bench: Path, proxies: dict[str, str], seconds: int, rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Run the yardstick on proxies, commands by name; return its numbers by proxy and scenario."""
    command = [sys.executable, str(bench), "--seconds", str(seconds), "--rounds", str(rounds),
               *(f"{name}={started}" for name, started in proxies.items())]  # fmt: skip
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in map(json.loads, ended.stdout.splitlines()):
        if "scenario" in line:
            found.setdefault(line["proxy"], {})[line["scenario"]] = line
    return found


def table(measured: dict[str, dict[str, dict[str, Any]]], python: Path, seconds: int, rounds: int) -> str:
    """Return the numbers as Markdown, the ratios to the last proxy with them."""
    peer = measured[list(measured)[-1]]
    lines = [
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, Python {'.'.join(map(str, version_of(python)))}"
        f"{' of Debian' if python == PYTHON else ''}, {os.cpu_count()} cores, "
        f"medians of {rounds} rounds of {seconds} s; in brackets the ratio to vllm-router.",
        "",
        "| | text req/s | mm req/s (170 kB image) | CPU per streamed chunk | added delay p50 / p99 | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in measured.items():
        text, mm, stream = found["text"], found["mm"], found["stream"]
        cells = [
            f"{row['requests_per_s']:,.0f} ({row['requests_per_s'] / peer[row['scenario']]['requests_per_s']:.2f})"
            for row in (text, mm)
        ]
        chunk = stream["cpu_us_per_chunk"]
        cells.append(f"{chunk:.0f} µs ({chunk / peer['stream']['cpu_us_per_chunk']:.2f})")
        cells.append(f"{stream['delay_p50_ms']:.1f} / {stream['delay_p99_ms']:.1f} ms")
        cells.append(f"{text['bad'] + mm['bad']:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
