"""The running stack: start it and wait, stop it, look at it. Talks to Compose and the engine."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd import command, services, values
from epd.display import Display, Row
from epd.errors import CommandError, StepError
from epd.services import Service

_POLL_S = 1.0
_DUMP_LINES = 40
_DOWN_TIMEOUT_S = 300.0
_HTTP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Stack:
    """One Compose project of this folder; commands run with the project's folder as the current one."""

    root: Path
    environment: Mapping[str, str]
    """The variables of `.env`; given to Compose outright, so that a stray COMPOSE_FILE of the shell cannot win."""

    @property
    def project(self) -> str:
        """Compose project name."""
        return self.environment["COMPOSE_PROJECT_NAME"]

    @property
    def address(self) -> str:
        """URL that the proxy answers at, as seen from this machine."""
        bound = self.bound_to
        if bound.is_unspecified:  # every address, so loopback too
            bound = ipaddress.ip_address("127.0.0.1" if bound.version == 4 else "::1")
        host = f"[{bound}]" if bound.version == 6 else str(bound)
        scheme = "https" if self.environment.get("EPD_PROXY_TLS_CERT") else "http"
        return f"{scheme}://{host}:{self.environment['EPD_PROXY_PORT']}"

    @property
    def bound_to(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """Address of this machine that the proxy is published on; compose/services.yaml has the default too."""
        return values.address(self.environment.get("EPD_PROXY_BIND") or "127.0.0.1")

    def compose(self, *words: str) -> list[str]:
        """Return the command line of a Compose command, the very one a person types in the project's folder."""
        return ["docker", "compose", *words]


def expected_services(stack: Stack) -> list[str]:
    """Return the names of the services, dependencies before what depends on them.

    Raises:
        CommandError: the compose files are faulty.
    """
    argv = stack.compose("config", "--services")
    return command.read(*argv, env=stack.environment, fix="correct the file that it names, or .env").split()


def check_port(stack: Stack, inspected: Sequence[Mapping[str, Any]]) -> None:
    """Check that the proxy's port is free, or taken by our own proxy, one of the containers `inspected`.

    Raises:
        StepError: something else listens there.
    """
    port = int(stack.environment["EPD_PROXY_PORT"])
    if port in services.proxy_ports(inspected):
        return
    family = socket.AF_INET6 if stack.bound_to.version == 6 else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((str(stack.bound_to), port))
    except OSError as error:
        raise _not_bound(stack, port, error) from error


def _not_bound(stack: Stack, port: int, error: OSError) -> StepError:
    found = error.strerror or str(error)
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return StepError(
            "EPD_PROXY_BIND is not an address of this machine",
            expected="an address that `ip addr` lists here; 0.0.0.0 for all, 127.0.0.1 for this machine alone",
            found=f"{stack.bound_to}: {found}",
            fix="correct it: `make up EPD_PROXY_BIND=<address>` (it is remembered in .env)",
        )
    return StepError(
        f"port {port} of this machine cannot be used for the proxy",
        expected=f"a TCP port of {stack.bound_to} that is free",
        found=found,
        fix="choose another: `make up EPD_PROXY_PORT=<port>` (it is remembered in .env)",
    )


def inspect(stack: Stack) -> list[dict[str, Any]]:
    """Return what the engine knows of the project's containers, running or not."""
    ids = command.probe("docker", "ps", "-aq", "--filter", _filter(stack)).stdout.split()
    if not ids:
        return []
    result = command.probe("docker", "inspect", *ids)
    # A container that went away meanwhile is an error on stderr; stdout has the others.
    found: list[dict[str, Any]] = json.loads(result.stdout or "[]")
    return found


def up(stack: Stack, *, timeout_s: float) -> None:
    """Start what does not run yet and wait until every service is ready.

    Raises:
        StepError: a service failed, or not all are ready in time. Its last log lines are on the terminal.
    """
    expected = expected_services(stack)
    inspected = inspect(stack)
    if services.PROXY in expected:
        check_port(stack, inspected)
    before = {service.name: service for service in services.complete(expected, inspected)}
    log = stack.root / "build" / "compose-up.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        argv = stack.compose("--progress", "plain", "up", "-d", "--no-build", "--remove-orphans")
        env = command.environment(stack.environment)
        process = subprocess.Popen(argv, cwd=stack.root, stdout=output, stderr=output, env=env)
    try:
        _wait(stack, process, expected, before, timeout_s=timeout_s, log=log)
    finally:
        if process.poll() is None:
            process.terminate()


def _wait(
    stack: Stack,
    process: subprocess.Popen[bytes],
    expected: list[str],
    before: Mapping[str, Service],
    *,
    timeout_s: float,
    log: Path,
) -> None:
    """Show the services until all are ready; `before` is how they were when Compose was called."""
    display, deadline = Display(), time.monotonic() + timeout_s
    while True:
        code = process.poll()
        found = services.complete(expected, inspect(stack))
        states = [services.since(s, before.get(s.name), compose_ended=code is not None) for s in found]
        display.show([_row(service) for service in states])
        if code == 0 and all(service.ready for service in states):
            return
        failed = [service for service in states if service.failed]
        if failed:
            raise _failure(failed, "a service failed", "every service healthy")
        if code not in (None, 0):
            fix = "see what it says; `make down` and `make up` start from scratch"
            raise CommandError(("docker", "compose", "up"), code=code, output=log.read_text(errors="replace"), fix=fix)
        if time.monotonic() > deadline:
            late = [service for service in states if not service.ready]
            raise _failure(late, "not every service is ready", f"all ready within {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def _row(service: Service) -> Row:
    detail = "" if service.ready or not service.container else last_line(service.container)
    if service.phase is services.Phase.CREATED:
        detail = "waits for its turn"
    return Row(service.name, service.phase, detail, finished=service.ready)


def last_line(container: str) -> str:
    """Return the last line a container logged, without control characters."""
    result = command.probe("docker", "logs", "--tail", "3", container, timeout_s=10)
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable()) if lines else ""


def _failure(failed: list[Service], what: str, expected: str) -> StepError:
    """Print the last log lines of the services concerned, and return the error to raise.

    A service that merely waits for another one has nothing to say.
    """
    for service in failed:
        if service.container and service.phase is not services.Phase.CREATED:
            result = command.probe("docker", "logs", "--tail", str(_DUMP_LINES), service.container, timeout_s=20)
            print(f"\n--- {service.name}: the last {_DUMP_LINES} lines of its log ---")
            print((result.stdout + result.stderr).rstrip() or "(nothing)")
    print(flush=True)
    found = "; ".join(f"{s.name} is {s.phase}: {services.hint(s)}" for s in failed if s.container) or "no container"
    return StepError(what, expected=expected, found=found, fix=_fix(failed))


def _fix(failed: list[Service]) -> str:
    names = " ".join(service.name for service in failed if service.container)
    return f"read the log above (`docker compose logs {names}`), mend it, then `make up` again; `make down` stops it"


def down(stack: Stack, *, volumes: bool) -> None:
    """Stop and remove the containers and the network, and the volumes too if asked.

    Raises:
        CommandError: Compose failed.
    """
    words = ["down", "--remove-orphans", "--timeout", "30", *(["--volumes"] if volumes else [])]
    command.show(
        *stack.compose(*words),
        env=stack.environment,
        timeout_s=_DOWN_TIMEOUT_S,
        fix="`docker ps -a` shows what is left",
    )


def fetch(url: str) -> tuple[int, str]:
    """Return status and body of a GET; status 0 and the reason when nobody answers."""
    context = ssl.create_default_context()
    context.check_hostname = False  # a certificate names what clients call the proxy, not this machine's own address
    context.verify_mode = ssl.CERT_NONE
    # Never through an HTTP proxy: it is local.
    handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(url, timeout=_HTTP_TIMEOUT_S) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


def _filter(stack: Stack) -> str:
    return f"label=com.docker.compose.project={stack.project}"
