"""Counters by vLLM's own way: what a step adds, over processes, to a registry such as its API server's."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from epd_connector.connector import ECMooncakeStoreConnector
from epd_connector.metrics import Metrics
from epd_connector.native import SumsOfStep, SumsTaker


def test_each_sum_is_handed_out_once() -> None:
    metrics = Metrics()
    taker = SumsTaker(metrics.snapshot)
    assert taker.take() is None
    metrics.count("epd_ec_hits")
    metrics.count("epd_ec_misses", label="absent")
    metrics.observe("epd_ec_get_seconds", 0.25)
    with metrics.time_hook():
        pass
    first = taker.take()
    assert first is not None
    assert first.data == {
        "epd_ec_hits|": 1,
        "epd_ec_misses|absent": 1,
        "epd_ec_get_seconds|sum": 0.25,
        "epd_ec_get_seconds|count": 1,
    }
    assert taker.take() is None
    metrics.count("epd_ec_hits", 2)
    second = taker.take()
    assert second is not None
    assert second.data == {"epd_ec_hits|": 2}


def test_steps_and_ranks_add_up_and_the_log_line_is_short() -> None:
    one, other = (
        SumsOfStep(data=data) for data in ({"epd_ec_hits|": 1}, {"epd_ec_hits|": 2, "epd_ec_misses|absent": 1})
    )
    both = one.aggregate(other)
    assert both.reduce() == {"hits": 3, "misses_absent": 1}  # type: ignore[attr-defined]
    assert (one.data, other.data["epd_ec_hits|"]) == ({"epd_ec_hits|": 1}, 2)
    one.reset()
    assert one.is_empty()
    assert not other.is_empty()


def test_api_server_shows_them_per_engine() -> None:
    registry = CollectorRegistry()

    def here(**words: Any) -> Counter:
        return Counter(**words, registry=registry)

    labels: dict[int, list[object]] = {0: ["m", "0"], 1: ["m", "1"]}
    config = type("Config", (), {"ec_transfer_config": None})()
    types: Any = {Counter: here, Gauge: Gauge, Histogram: Histogram}
    shown: Any = ECMooncakeStoreConnector.build_prom_metrics(config, types, ["model_name", "engine"], labels)
    sums = {
        "epd_ec_hits|": 2,
        "epd_ec_misses|corrupt": 1,
        "epd_ec_put_seconds|sum": 0.5,
        "epd_ec_put_seconds|count": 3,
        "epd_ec_of_a_later_version|": 1,
    }
    built: Any = ECMooncakeStoreConnector.build_ec_connector_stats(sums)
    shown.observe(built.data, 1)
    shown.observe(built.data, 1)

    def read(name: str, **more: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", "engine": "1", **more})

    assert read("epd_ec_hits_total") == 4
    assert read("epd_ec_misses_total", reason="corrupt") == 2
    assert read("epd_ec_put_seconds_total") == 1.0
    assert read("epd_ec_put_operations_total") == 6
    assert registry.get_sample_value("epd_ec_hits_total", {"model_name": "m", "engine": "0"}) is None
