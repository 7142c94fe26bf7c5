"""The way of a service from no container to healthy, and what counts as failed."""

import pytest

from epd import services
from epd.services import Phase, Service


def container(name="encode-0", status="running", health=None, code=0, restarts=0, **more):
    state = {"Status": status, "ExitCode": code, "StartedAt": more.get("started_at", "t1"), "OOMKilled": False}
    if health:
        log = [{"ExitCode": 0, "Output": "fine"}, {"ExitCode": 1, "Output": more.get("output", "")}]
        state["Health"] = {"Status": health, "Log": log}
    labels = {"com.docker.compose.service": name}
    identity = more.get("id", "c1")
    return {"Id": identity, "RestartCount": restarts, "State": state, "Config": {"Labels": labels}}


@pytest.mark.parametrize(
    ("inspected", "phase", "ready", "failed"),
    [
        (container(status="created"), Phase.CREATED, False, False),
        (container(health="starting"), Phase.LOADING, False, False),
        (container(health="healthy"), Phase.HEALTHY, True, False),
        (container(health="unhealthy"), Phase.UNHEALTHY, False, True),
        (container(), Phase.RUNNING, True, False),
        (container(status="restarting", code=1), Phase.RESTARTING, False, False),
        (container(status="restarting", code=1, restarts=2), Phase.RESTARTING, False, True),
        (container(health="starting", restarts=2), Phase.LOADING, False, True),
        (container(health="healthy", restarts=9), Phase.HEALTHY, True, False),
        (container(status="exited", code=0), Phase.EXITED, False, True),
        (container(status="exited", code=3), Phase.EXITED, False, True),
        (container(status="dead"), Phase.EXITED, False, True),
    ],
)
def test_classify(inspected, phase, ready, failed):
    found = services.classify(inspected)
    assert (found.phase, found.ready, found.failed) == (phase, ready, failed)


def test_complete_keeps_the_order_and_shows_what_has_no_container_yet():
    found = services.complete(["master", "encode-0"], [container("encode-0", health="healthy"), container("stray")])
    assert [(s.name, s.phase) for s in found] == [("master", Phase.WAITING), ("encode-0", Phase.HEALTHY)]


def test_what_is_left_of_an_earlier_run_is_no_failure_while_compose_works():
    dead = services.classify(container(status="exited", code=137, restarts=5))
    assert not services.since(dead, dead, compose_ended=False).failed
    assert services.since(dead, dead, compose_ended=True).failed
    died_again = services.classify(container(status="exited", code=1, restarts=5, started_at="t2"))
    assert services.since(died_again, dead, compose_ended=False).failed


def test_only_restarts_since_compose_was_called_count():
    before = services.classify(container(health="healthy", restarts=7))
    loading = services.classify(container(health="starting", restarts=8, started_at="t2"))
    assert services.since(loading, before, compose_ended=False).restarts == 1
    replaced = services.classify(container(health="starting", restarts=0, id="c2"))
    assert services.since(replaced, before, compose_ended=False) == replaced


@pytest.mark.parametrize(
    ("service", "words"),
    [
        (Service("encode-0", Phase.EXITED, exit_code=137), "raise EPD_MEMORY_LIMIT"),
        (Service("proxy", Phase.EXITED, exit_code=137), "raise EPD_PROXY_MEMORY_LIMIT"),
        (Service("mooncake-store", Phase.RESTARTING, restarts=2, out_of_memory=True), "raise EPD_STORE_MEMORY_LIMIT"),
        (Service("a", Phase.UNHEALTHY, health_output="x\nconnection refused"), "says: connection refused"),
        (Service("a", Phase.EXITED, exit_code=3), "exit code 3"),
        (Service("a", Phase.EXITED, exit_code=0), "exit code 0"),
        (Service("a", Phase.LOADING, restarts=2), "does not stay up"),
        (Service("a", Phase.LOADING), "EPD_UP_TIMEOUT_S"),
    ],
)
def test_hint(service, words):
    assert words in services.hint(service)


def test_the_output_of_the_last_failed_check_is_kept():
    found = services.classify(container(health="unhealthy", output="no model yet\n"))
    assert found.health_output == "no model yet"
