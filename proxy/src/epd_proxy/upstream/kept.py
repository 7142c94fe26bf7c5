"""The idle connections, by backend. Synchronous: it says what to use and closes what is too old."""

from .connection import Connection

# uvicorn, and so vLLM, closes idle connections after 5 s. Stop using ours before that, or a request meets a closing
# one.
KEEP_ALIVE_S = 3.0


class KeptConnections:
    """Gives back the connection that was used last, so that those a burst has left grow old and go."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Connection]] = {}

    def __repr__(self) -> str:
        return f"<KeptConnections { ({backend: len(idle) for backend, idle in self._idle.items()}) }>"

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def take(self, backend: str, now: float) -> Connection | None:
        """Return a connection to ``backend`` that can be used at ``now``, None when there is none."""
        idle = self._idle.get(backend)
        while idle:
            connection = idle.pop()
            if connection.keepable and now - connection.kept_since < KEEP_ALIVE_S:
                return connection
            connection.abort()
        return None

    def put(self, connection: Connection, now: float) -> None:
        """Keep ``connection``, which has to be keepable."""
        connection.kept_since = now
        self._idle.setdefault(connection.backend, []).append(connection)

    def drop_old(self, now: float) -> None:
        """Close what nobody has used for :data:`KEEP_ALIVE_S`, and forget what is closed."""
        for backend, idle in list(self._idle.items()):
            fresh = [each for each in idle if each.keepable and now - each.kept_since < KEEP_ALIVE_S]
            for each in set(idle).difference(fresh):
                each.abort()
            if fresh:
                self._idle[backend] = fresh
            else:
                del self._idle[backend]
