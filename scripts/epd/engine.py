"""The Docker engine: is it running, and if not, start it, with systemd or by hand."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from epd import command
from epd.errors import StepError

START_TIMEOUT_S = 60.0
_POLL_S = 0.5
_LOG_TAIL_LINES = 20


@dataclass(frozen=True)
class Daemon:
    """Where a `dockerd` that we start by hand keeps its files; the defaults are dockerd's own."""

    pid_files: Mapping[Path, str] = field(
        default_factory=lambda: {
            Path("/var/run/docker.pid"): "dockerd",
            Path("/var/run/docker/containerd/containerd.pid"): "containerd",
        }
    )
    """Each pid file, and the name of the program whose pid it holds."""
    log: Path = Path("/var/log/ascend-epd-dockerd.log")
    arguments: tuple[str, ...] = ()
    """Further arguments of dockerd."""
    host: str = ""
    """Address that clients use (DOCKER_HOST); empty for the default socket."""


def answers(daemon: Daemon) -> bool:
    """Whether an engine answers the docker client."""
    return command.probe("docker", "info", "--format", "{{.ID}}", timeout_s=10, env=_client(daemon)).ok


def ensure_running(environ: Mapping[str, str], *, root: bool, systemd: bool, daemon: Daemon | None = None) -> None:
    """Start the engine unless one answers, and wait until it does, START_TIMEOUT_S at most.

    Raises:
        StepError: it does not answer and is not ours to start, or it was started and does not answer in time.
    """
    daemon = daemon or Daemon()
    if answers(daemon):
        return
    _refuse_what_is_not_ours(environ, root=root)
    print("The Docker engine does not answer: starting it …", flush=True)
    process = None
    if systemd:
        command.probe("systemctl", "enable", "--now", "docker.service", timeout_s=START_TIMEOUT_S)
    elif not _alive(daemon):
        process = _start_by_hand(daemon)
    _wait(daemon, process, systemd=systemd)


def _refuse_what_is_not_ours(environ: Mapping[str, str], *, root: bool) -> None:
    address = environ.get("DOCKER_HOST", "")
    if address:
        raise StepError(
            "the Docker engine does not answer",
            expected="an engine at DOCKER_HOST",
            found=f"none at {address}",
            fix="start that engine, or `unset DOCKER_HOST` to use the one of this machine",
        )
    if not root:
        why = command.probe("docker", "info", timeout_s=10).stderr.strip().splitlines()
        denied = any("permission denied" in line for line in why)
        raise StepError(
            "the Docker engine does not answer",
            expected="an engine this user may use",
            found=why[-1] if why else "no answer",
            fix="`sudo usermod -aG docker $USER` and log in again" if denied else "run `make up` as root to start it",
        )


def _start_by_hand(daemon: Daemon) -> subprocess.Popen[bytes]:
    """Start dockerd in a session of its own, so that it outlives `make` and the terminal."""
    for path, program in daemon.pid_files.items():
        remove_stale_pid_file(path, program)
    daemon.log.parent.mkdir(parents=True, exist_ok=True)
    if daemon.log.is_file():  # one log per start, and the one before it: no log grows for ever
        daemon.log.replace(daemon.log.with_name(f"{daemon.log.name}.1"))
    print(f"  no systemd here: starting dockerd by hand, its log is {daemon.log}", flush=True)
    with daemon.log.open("ab") as log:
        return subprocess.Popen(
            ["dockerd", *daemon.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env=command.environment(),
        )


def remove_stale_pid_file(path: Path, program: str) -> bool:
    """Remove a pid file whose process is gone or is another program by now; return whether it was removed.

    dockerd only looks whether the pid exists, and refuses to start if it does, whoever has that pid now.
    """
    try:
        pid = int(path.read_text().strip())
    except FileNotFoundError:
        return False
    except ValueError:
        pid = 0
    if _program_of(pid) == program:
        return False
    path.unlink(missing_ok=True)
    return True


def _alive(daemon: Daemon) -> bool:
    """Whether a dockerd runs that merely does not answer yet, as just after its package was installed."""
    for path, program in daemon.pid_files.items():
        if program != "dockerd" or not path.is_file():
            continue
        text = path.read_text().strip()
        if text.isdigit() and _program_of(int(text)) == program:
            return True
    return False


def _program_of(pid: int) -> str:
    """Return the name of the program that has this pid; empty when no process has."""
    if pid <= 0:
        return ""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _wait(daemon: Daemon, process: subprocess.Popen[bytes] | None, *, systemd: bool) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(daemon):
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            code = f"dockerd ended with exit code {process.returncode}" if process and ended else "no answer"
            raise StepError(
                "the Docker engine did not start",
                expected=f"an answer to `docker info` within {START_TIMEOUT_S:.0f} s",
                found=f"{code}; its log ends with\n{_log_tail(daemon, systemd=systemd)}",
                fix="mend what the log names, then run it again; without systemd the control groups must be mounted "
                "(`apt-get install cgroupfs-mount && cgroupfs-mount`)",
            )
        time.sleep(_POLL_S)
    print("  the Docker engine runs", flush=True)


def _log_tail(daemon: Daemon, *, systemd: bool) -> str:
    if systemd:
        argv = ["journalctl", "--no-pager", "-u", "docker.service", "-n", str(_LOG_TAIL_LINES), "-o", "cat"]
        text = command.probe(*argv).stdout
    else:
        text = daemon.log.read_text(errors="replace") if daemon.log.is_file() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-_LOG_TAIL_LINES:]) or "    (nothing)"


def _client(daemon: Daemon) -> dict[str, str]:
    return {"DOCKER_HOST": daemon.host} if daemon.host else {}
