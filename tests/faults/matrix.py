"""What a fault did to the stack: counters of the consumer before and after, as one row of docs/ec-faults.md."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from smoke.stack import EC_METRICS_PORT, ROOT, Stack

CONSUMER = "prefill-decode-0"
ENGINES = ("encode-0", "encode-1", CONSUMER)
MASTER_METRICS_PORT = 9003
HOOK = "epd_ec_scheduler_hook"
ROWS = ROOT / "build" / "ec-faults.json"
DOCUMENT = ROOT / "docs" / "ec-faults.md"


@dataclass
class Row:
    """One case. ``*_over_*``: calls of scheduler hooks over that many ms, by the wall clock or by CPU time."""

    case: str
    requests: int = 0
    hits: int = 0
    local_encodes: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    evicted: int = 0
    """Objects that the pool gave up for want of room."""
    hook_calls: int = 0
    wall_over_5ms: int = 0
    wall_over_100ms: int = 0
    cpu_over_5ms: int = 0


def read_counters(stack: Stack) -> dict[str, float]:
    """Return the consumer's samples by name and labels."""
    with urllib.request.urlopen(f"{stack.service_url(CONSUMER, EC_METRICS_PORT)}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {"|".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def count_evictions(stack: Stack) -> int:
    """Return how many objects the pool has given up since its master started; 0 when that does not answer."""
    with suppress(OSError):
        return int(stack.total("mooncake-master", "master_evicted_key_count_total", MASTER_METRICS_PORT))
    return 0


def find_starts(stack: Stack) -> dict[str, str]:
    """Return when each engine's container was started last."""
    ids = [stack.container(name) for name in ENGINES]
    words = ["docker", "inspect", "--format", "{{.State.StartedAt}}", *ids]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(zip(ENGINES, done.stdout.split(), strict=True))


@contextmanager
def observed(stack: Stack, case: str, restarted: str = "") -> Iterator[Row]:
    """Fill a row by what happens in the block. Fails when an engine other than ``restarted`` started anew."""
    row = Row(case)
    before, evicted, starts = read_counters(stack), count_evictions(stack), find_starts(stack)
    yield row
    after, ends = read_counters(stack), find_starts(stack)
    row.evicted = max(0, count_evictions(stack) - evicted)  # a master that started anew counts from 0
    assert {name for name in ENGINES if starts[name] != ends[name]} <= {restarted}, "an engine died"
    # A consumer that started anew counts from 0.
    found = {key: int(value - (before.get(key, 0) if restarted != CONSUMER else 0)) for key, value in after.items()}
    row.hits, row.local_encodes = found["epd_ec_hits_total"], found["epd_ec_local_encodes_total"]
    reasons = {key.split("|")[1]: value for key, value in found.items() if key.startswith("epd_ec_misses_total|")}
    row.misses = {reason: count for reason, count in reasons.items() if count}
    row.hook_calls = found[f"{HOOK}_seconds_count"]
    row.wall_over_5ms = row.hook_calls - found[f"{HOOK}_seconds_bucket|0.005"]
    row.wall_over_100ms = row.hook_calls - found[f"{HOOK}_seconds_bucket|0.1"]
    row.cpu_over_5ms = row.hook_calls - found[f"{HOOK}_cpu_seconds_bucket|0.005"]
    record(row)
    assert found["epd_ec_hook_errors_total"] == 0
    assert row.hook_calls > 0
    assert row.cpu_over_5ms == 0
    # A call that the store holds up lasts as long as an RPC may, 500 ms; one that waits for a core does not.
    assert row.wall_over_100ms <= row.requests // 10


def record(row: Row) -> None:
    """Keep the row, and write the document anew from all that are kept."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    rows[row.case] = asdict(row)
    ROWS.parent.mkdir(exist_ok=True)
    ROWS.write_text(json.dumps(rows, indent=1))
    template = (Path(__file__).parent / "ec-faults.md").read_text()
    DOCUMENT.write_text(template.replace("TABLE\n", "".join(_render(Row(**kept)) for kept in rows.values())))


def _render(row: Row) -> str:
    misses = ", ".join(f"{reason} {count}" for reason, count in sorted(row.misses.items())) or "none"
    cells = (row.case, row.requests, row.hits, row.local_encodes, misses, row.evicted, row.hook_calls)
    stalls = (row.wall_over_5ms, row.wall_over_100ms, row.cpu_over_5ms)
    return "| " + " | ".join(map(str, (*cells, *stalls))) + " |\n"
