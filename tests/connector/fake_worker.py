"""A worker faked at the wire, a clock that stands still, and what a scheduler is asked and told in its tests."""

import socket
from pathlib import Path

import msgspec

from epd_connector.compat import Feature
from epd_connector.config import ConnectorConfig
from epd_connector.link import SOCKET_NAME, Ready, Reply, Request
from epd_connector.metadata import Location

CONFIG = ConnectorConfig("127.0.0.1:1", fetch_timeout_ms=500, publish_timeout_ms=1000, ready_ttl_s=60)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class FakeWorker:
    def __init__(self, directory: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / SOCKET_NAME))
        self._listener.listen(1)
        self._connection: socket.socket | None = None

    def receive(self) -> list[Request]:
        if self._connection is None:
            self._listener.settimeout(1)
            self._connection, _ = self._listener.accept()
            self._connection.setblocking(False)
        requests = []
        try:
            while data := self._connection.recv(1 << 16):
                requests.append(msgspec.msgpack.decode(data, type=Request))
        except BlockingIOError:
            pass
        return requests

    def send(self, *replies: Reply) -> None:
        assert self._connection is not None
        for reply in replies:
            self._connection.send(msgspec.msgpack.encode(reply))

    def close(self) -> None:
        self._listener.close()
        if self._connection is not None:
            self._connection.close()


def feature(item_id: str, rows: int = 4) -> Feature:
    return Feature(item_id, rows, end=rows)


def ready(item_id: str, offset: int = 256) -> Ready:
    return Ready(item_id, Location(offset, 64, "float32", (4, 4)))
