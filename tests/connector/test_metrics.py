import time

from prometheus_client import CollectorRegistry

from epd_connector.metrics import Collector, Metrics

GAUGES = {"epd_ec_breaker_open": lambda: 0.0, "epd_ec_slab_used_bytes": lambda: 0.0}
HOOK = "epd_ec_scheduler_hook_seconds"
CPU = "epd_ec_scheduler_hook_cpu_seconds"


def read(*sources: Metrics) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Collector([source.snapshot for source in sources], GAUGES))
    return registry


def test_buckets_add_up_over_both_processes() -> None:
    one, other = Metrics(), Metrics()
    for seconds in (0.0005, 0.001, 0.004):
        one.distribute(HOOK, seconds)
    other.distribute(HOOK, 7.0)
    registry = read(one, other)
    found = [
        registry.get_sample_value(f"{HOOK}_bucket", {"le": le}) for le in ("0.001", "0.005", "0.02", "0.1", "+Inf")
    ]
    assert found == [2, 3, 3, 3, 4]
    assert registry.get_sample_value(f"{HOOK}_count") == 4
    assert registry.get_sample_value(f"{HOOK}_sum") == 7.0055


def test_a_hook_that_waits_takes_wall_clock_time_and_no_cpu_time() -> None:
    metrics = Metrics()
    with metrics.time_hook():
        time.sleep(0.15)
    registry = read(metrics)
    assert registry.get_sample_value(f"{HOOK}_bucket", {"le": "0.1"}) == 0
    assert registry.get_sample_value(f"{CPU}_bucket", {"le": "0.1"}) == 1
