"""The proxy of the soak: its processes, and what they say of themselves."""

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from inspected import resident_bytes

from epd_proxy.config import Timeouts
from epd_proxy.errors import BackendError
from epd_proxy.upstream import Call, Upstream

HERE = Path(__file__).resolve().parent
MIB = 1024 * 1024
LEASES = "epd_proxy_leases_in_flight{"


class Proxy:
    """The proxy's process, and what it says of itself."""

    def __init__(self, port: int, *flags: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._inspector = f"http://127.0.0.1:{port + 1}"
        self._command = [str(HERE / "inspected.py"), str(port + 1), "--host", "127.0.0.1", "--port", str(port), *flags]

    async def __aenter__(self) -> "Proxy":
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        command = (sys.executable, *self._command, "--log-level", "error", "--health-interval-s", "0.2")
        self.process = await asyncio.create_subprocess_exec(*command, stderr=self._log)
        self._upstream = Upstream(Timeouts())
        await self._upstream.start()
        for _ in range(300):
            try:
                await self.state()
            except BackendError:
                await asyncio.sleep(0.1)
            else:
                return self
        raise RuntimeError("the proxy did not start")

    async def __aexit__(self, *exc: object) -> None:
        await self._upstream.close()
        self.process.terminate()
        await self.process.wait()
        if exc[0]:
            print(*self.errors()[:20], sep="\n", file=sys.stderr)

    def errors(self) -> list[str]:
        """Return what the proxy logged as its own failure."""
        self._log.seek(0)
        lines = [json.loads(line) for line in self._log if line.startswith(b"{")]
        return [f"log: {line['message']}" for line in lines if line["logger"] != "epd_proxy.access"]

    async def state(self) -> dict[str, Any]:
        response = await self._upstream.send(self._inspector, Call("/", [], 120, method="GET"))
        try:
            return json.loads(await response.read_all(MIB))  # type: ignore[no-any-return]
        finally:
            response.close()

    async def rest(self) -> dict[str, Any]:
        """Wait until nothing is under way; return what is left then."""
        for _ in range(150):
            state = await self.state()
            if state["leases"] == state["connections_in_use"] == state.get("clients", 0) == 0:
                break
            await asyncio.sleep(0.2)
        return state


class Workers(Proxy):
    """Several processes on one port, and what can be told of them from outside."""

    def __init__(self, port: int, *flags: str) -> None:
        super().__init__(port, *flags)
        self._command = ["-m", "epd_proxy", "--host", "127.0.0.1", "--port", str(port), *flags]

    async def state(self) -> dict[str, Any]:
        response = await self._upstream.send(self.url, Call("/metrics", [("Connection", "close")], 120, method="GET"))
        try:
            shown = (await response.read_all(MIB)).decode()
        finally:
            response.close()
        leases = sum(int(float(line.split()[-1])) for line in shown.splitlines() if line.startswith(LEASES))
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()  # noqa: ASYNC240 - not of a disk
        return {"leases": leases, "connections_in_use": 0, "resident_bytes": sum(map(resident_bytes, (pid, *children)))}
