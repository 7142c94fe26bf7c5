"""The health check of the role that a container runs, and what it has to know of it."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from epd_serve.settings import Settings

STATE_DIR = Path(os.environ.get("TMPDIR", "/tmp"), "epd-serve")  # noqa: S108 - a tmpfs of the container's only user
"""Where a role leaves what its health check has to know."""


def url(role: str, settings: Settings) -> str:
    """Return the URL that answers 200 when the role works."""
    ports = {"mooncake-master": settings.mooncake_ports.metrics, "mooncake-store": settings.mooncake_ports.store_http}
    wildcard = role in ports or settings.bind_host in ("0.0.0.0", "::")
    host = "127.0.0.1" if wildcard else settings.bind_host
    scheme = "https" if role == "proxy" and settings.proxy_tls else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{ports.get(role, settings.port)}/health"


def remember(role: str, url: str, state_dir: Path) -> None:
    """Leave what `epd-serve health` needs; a restart of the container starts afresh."""
    state_dir.mkdir(parents=True, exist_ok=True)
    (state_dir / "ready").unlink(missing_ok=True)
    (state_dir / "role.json").write_text(json.dumps({"role": role, "url": url, "started_at_s": time.time()}))


def check(state_dir: Path, timeout_s: float = 15.0) -> tuple[bool, str]:
    """Return whether the role answers, and a sentence that tells loading from dead.

    Both fail the check. Docker does not count failures of the start period, so loading is "starting" and only what
    answered once, or loads longer than that period, becomes "unhealthy".
    """
    try:
        state = json.loads((state_dir / "role.json").read_text())
    except FileNotFoundError:
        return False, "no role was started in this container: run `epd-serve ROLE`"
    ready = state_dir / "ready"
    reason = _ask(state["url"], timeout_s)
    if not reason:
        ready.touch()
        return True, f"{state['role']}: ready"
    if ready.exists():
        return False, f"{state['role']}: dead: it was ready, now {state['url']} gives {reason}"
    return False, f"{state['role']}: loading for {time.time() - state['started_at_s']:.0f} s ({reason})"


def _ask(url: str, timeout_s: float) -> str:
    """Return why a GET of the URL did not give 200, or nothing.

    By hand, as this runs in every container every few seconds and urllib alone costs more than all the rest; and never
    through an HTTP proxy that the environment may name.
    """
    scheme, _, rest = url.partition("://")
    authority, path = rest.split("/", 1)
    host, port = authority.rsplit(":", 1)
    try:
        with _connect(scheme, host.strip("[]"), int(port), timeout_s) as connection:
            connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n".encode())
            with connection.makefile("rb") as answer:
                status_line = answer.readline().decode("latin-1").strip()
    except OSError as error:
        return str(error)
    return "" if status_line.split(" ")[1:2] == ["200"] else status_line or "no answer"


def _connect(scheme: str, host: str, port: int, timeout_s: float) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=timeout_s)
    if scheme == "http":
        return connection
    import ssl  # noqa: PLC0415 - it takes longer than all the rest, and few need it

    # The certificate names what clients call the proxy, not this container's own address.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)
