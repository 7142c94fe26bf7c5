"""A real Mooncake master and pool owner on loopback, for tests to start, kill and start again."""

import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path


def find_port() -> int:
    """Below the ephemeral range, so that no outgoing connection takes it before the server does."""
    for _ in range(100):
        port = random.randint(18_000, 29_999)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port found")


class MooncakePool:
    def __init__(self, directory: Path, size_mb: int = 64, *, by_handshake: bool = False) -> None:
        self._directory = directory
        self._size_mb = size_mb
        self._by_handshake = by_handshake
        self.rpc_port, self.metadata_port, self.owner_port = find_port(), find_port(), find_port()
        self.metrics_port = find_port()
        self._master: subprocess.Popen[bytes] | None = None
        self._owner: subprocess.Popen[bytes] | None = None

    @property
    def master_address(self) -> str:
        return f"127.0.0.1:{self.rpc_port}"

    @property
    def metadata_server(self) -> str:
        return "P2PHANDSHAKE" if self._by_handshake else f"http://127.0.0.1:{self.metadata_port}/metadata"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}"

    @property
    def extra_config(self) -> dict[str, object]:
        return {
            "master_server_address": self.master_address,
            "metadata_server": self.metadata_server,
            "local_hostname": "127.0.0.1",
        }

    def start(self) -> None:
        self.start_master()
        self.start_owner()

    def start_master(self) -> None:
        self._master = self._run(
            "mooncake_master",
            f"--rpc_port={self.rpc_port}",
            "--enable_http_metadata_server=true",
            f"--http_metadata_server_port={self.metadata_port}",
            f"--metrics_port={self.metrics_port}",
        )
        _wait_for_port(self.rpc_port, self._master)
        _wait_for_port(self.metadata_port, self._master)

    def start_owner(self) -> None:
        self._owner = self._run(
            "mooncake_client",
            "--host=127.0.0.1",
            f"--port={self.owner_port}",
            f"--master_server_address={self.master_address}",
            f"--metadata_server={self.metadata_server}",
            f"--global_segment_size={self._size_mb}MB",
            "--protocol=tcp",
        )
        _wait_for_port(self.owner_port, self._owner)

    def kill_master(self) -> None:
        _end(self._master)

    def pause_master(self) -> None:
        """Hang: the port accepts connections, nobody answers."""
        assert self._master is not None
        self._master.send_signal(signal.SIGSTOP)

    def resume_master(self) -> None:
        assert self._master is not None
        self._master.send_signal(signal.SIGCONT)

    def kill_owner(self) -> None:
        _end(self._owner)

    def stop(self) -> None:
        _end(self._owner)
        _end(self._master)

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = shutil.which(program)
        assert path, f"{program} is not on PATH: install the Mooncake wheel"
        with (self._directory / f"{program}.log").open("ab") as log:
            return subprocess.Popen([path, *arguments], stdout=log, stderr=subprocess.STDOUT)


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait()


def _wait_for_port(port: int, process: subprocess.Popen[bytes], timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"{process.args} does not listen on {port} after {timeout_s} s")
