"""A live stack: real containers of one topology beside one ordinary vLLM, in a compose project of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 600
PROJECT = "ascend-epd-test"
EC_METRICS_PORT = 9400


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Stack:
    """Handles on a running stack."""

    topology: str
    proxy_port: int
    overlays: tuple[str, ...] = ("tests/smoke/monolith.yaml",)
    """Compose files over the topology's."""
    settings: tuple[tuple[str, str], ...] = ()
    """EPD_ variables and their values."""

    @property
    def url(self) -> str:
        """Base URL of the proxy."""
        return f"http://127.0.0.1:{self.proxy_port}"

    def compose(self, *words: str, timeout_s: float = 120, check: bool = True) -> str:
        """Run `docker compose WORDS` on the stack; return what it printed."""
        files = [word for path in (f"compose/{self.topology}.yaml", *self.overlays) for word in ("-f", path)]
        # Nothing of the caller's own stack leaks in: neither its .env nor its shell variables.
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "COMPOSE_"))}
        # `make smoke` names the images it built.
        environ |= {name: os.environ[name] for name in ("EPD_IMAGE", "EPD_PROXY_IMAGE") if name in os.environ}
        environ |= {"EPD_PROXY_PORT": str(self.proxy_port), **dict(self.settings)}
        done = subprocess.run(
            ["docker", "compose", "--env-file", "/dev/null", "-p", PROJECT, *files, *words],
            cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"docker compose {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def container(self, service: str) -> str:
        """Return the id of a service's container."""
        return self.compose("ps", "--all", "--quiet", service).strip()

    def service_url(self, service: str, port: int = 8000) -> str:
        """Return the base URL of a service on the stack's bridge network, which the host reaches directly."""
        if service == "proxy":
            return self.url
        container = self.container(service)
        inspected = subprocess.run(["docker", "inspect", container], capture_output=True, text=True, check=True)
        networks = json.loads(inspected.stdout)[0]["NetworkSettings"]["Networks"]
        return f"http://{next(iter(networks.values()))['IPAddress']}:{port}"

    def total(self, service: str, name: str, port: int = 8000, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels; a metric that is absent is an error."""
        with urllib.request.urlopen(f"{self.service_url(service, port)}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        assert samples, f"{service} has no metric {name}"
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def ec_counters(self, service: str) -> dict[str, float]:
        """Return how many items an instance took from the store, and how many it encoded itself."""
        return {
            "hits": self.total(service, "epd_ec_hits_total", EC_METRICS_PORT),
            "local encodes": self.total(service, "epd_ec_local_encodes_total", EC_METRICS_PORT),
        }

    def wait_until(
        self, condition: Callable[[], bool], timeout_s: float, what: str, *, of: str = "proxy", every_s: float = 0.2
    ) -> None:
        """Wait until a condition holds. Raises TimeoutError with ``what`` failed to come and the log of ``of``."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"not within {timeout_s:.0f} s: {what}\n{self.logs(of)}")
            time.sleep(every_s)

    def wait_healthy(self, service: str, timeout_s: float = 400) -> None:
        """Wait until a service's health check passes."""

        def is_healthy() -> bool:
            lines = self.compose("ps", "--all", "--format", "json", service).splitlines()
            return bool(lines) and json.loads(lines[0])["Health"] == "healthy"

        self.wait_until(is_healthy, timeout_s, f"{service} is healthy", of=service, every_s=1)

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Wait until the proxy has an instance for every stage."""

        def is_ready() -> bool:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/ready", timeout=5):
                return True
            return False

        self.wait_until(is_ready, timeout_s, "the proxy is ready")

    def wait_up(self, service: str, timeout_s: float = 60) -> None:
        """Wait until the proxy takes an instance for up, which it learns from its next probe."""
        endpoint = f"http://{service}:8000"
        self.wait_until(
            lambda: self.total("proxy", "epd_proxy_endpoint_up", endpoint=endpoint) >= 1, timeout_s, f"{service} is up"
        )

    def logs(self, *services: str, lines: int = 60) -> str:
        """Return the last lines that services logged."""
        return self.compose("logs", "--no-color", "--tail", str(lines), *services, check=False)


@contextmanager
def running_stack(topology: str, *overlays: str, **settings: str) -> Iterator[Stack]:
    """Start a topology and its yardstick from nothing; write its logs to build/ and remove it afterwards."""
    stack = Stack(topology, free_port(), ("tests/smoke/monolith.yaml", *overlays), tuple(settings.items()))
    stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
    try:
        stack.compose("up", "--detach", "--wait", "--pull", "never", timeout_s=START_TIMEOUT_S)
        yield stack
    except (RuntimeError, subprocess.TimeoutExpired):
        print(stack.logs())
        raise
    finally:
        log = ROOT / "build" / f"smoke-{topology}{'-'.join(('', *(Path(path).stem for path in overlays)))}.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(stack.logs(lines=5000))
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)
