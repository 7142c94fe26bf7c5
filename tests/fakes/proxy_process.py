"""The proxy as its users run it: a process of its own, started by its command line."""

import asyncio
import os
import signal
import socket
import ssl
import sys
import tempfile

import aiohttp


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class ProxyProcess:
    """``async with ProxyProcess("--prefill-decode", url) as proxy``; ``environ`` adds variables.

    ``tls`` is what its client speaks to it.
    """

    def __init__(
        self, *arguments: str, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None, **environ: str
    ) -> None:
        self.port = free_port(host)
        self.host = host
        self.url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._tls = tls
        self._arguments = arguments
        self._environ = environ

    async def __aenter__(self) -> "ProxyProcess":
        # A file and no pipe: nobody reads while the proxy runs, and a full pipe stops whoever writes a line of log.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __aexit__
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "epd_proxy", "--host", self.host, "--port", str(self.port), *self._arguments,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **self._environ},
            stderr=self._log,
        )  # fmt: skip
        self.client = aiohttp.ClientSession(
            self.url, timeout=aiohttp.ClientTimeout(total=20), connector=aiohttp.TCPConnector(ssl=self._tls or True)
        )
        try:
            await self._started()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _started(self) -> None:
        for _ in range(600):
            if self.process.returncode is not None:
                break
            try:
                async with self.client.get("/health") as response:
                    assert response.status == 200
                    return
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)
        if self.process.returncode is None:
            self.process.kill()
        code, err = await self.end()
        raise AssertionError(f"the proxy did not start within 30 s (exit code {code}):\n{err}")

    async def __aexit__(self, *_exc: object) -> None:
        await self.client.close()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        self._log.close()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def end(self) -> tuple[int, str]:
        """Wait for the process; return its exit code and what it logged."""
        code = await asyncio.wait_for(self.process.wait(), 30)
        self._log.seek(0)
        return code, self._log.read().decode()


async def until_counted(client: aiohttp.ClientSession, line: str) -> None:
    """Wait for a line of the proxy's metrics."""
    text = ""
    for _ in range(400):
        async with client.get("/metrics") as response:
            text = await response.text()
        if line in text:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"no {line} in {text}")
