"""Files that are read again when they change, while the proxy runs."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError
from .metrics import Metrics

log = logging.getLogger(__name__)

_BEAT_S = 1.0
_Value = TypeVar("_Value")


@dataclass(slots=True)
class _Watched:
    what: str
    paths: tuple[Path, ...]
    read: Callable[[], Any]
    apply: Callable[[Any], None]
    value: Any
    seen: tuple[object, ...] = ()


class Reloads:
    """Looks at files once a second. What cannot be used is logged and counted, and the last good state stays.

    By their times and sizes, not through inotify, which tells nothing of network file systems and bind mounts.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._watched: list[_Watched] = []

    def watch(
        self,
        what: str,
        paths: tuple[Path, ...],
        read: Callable[[], _Value],
        apply: Callable[[_Value], None],
        value: _Value,
    ) -> None:
        """Have ``apply`` called with what ``read`` returns after a change of ``paths``; ``value`` is in use now.

        ``read`` runs in a thread, ``apply`` on the event loop; both may raise :class:`ConfigError`.
        """
        self._watched.append(_Watched(what, paths, read, apply, value))
        self._metrics.file_in_use.labels(what).set(1)

    async def run(self) -> None:
        """Look until cancelled."""
        while self._watched:
            await asyncio.sleep(_BEAT_S)
            await self.look()

    async def look(self) -> None:
        """Look once."""
        for watched in self._watched:
            await self._look(watched)

    async def _look(self, watched: _Watched) -> None:
        seen = await asyncio.to_thread(_signature, watched.paths)
        if seen == watched.seen:
            return
        watched.seen = seen  # before it is read: what changes meanwhile is seen next time
        try:
            value = await asyncio.to_thread(watched.read)
            if value != watched.value:
                watched.apply(value)
                watched.value = value
                log.info("%s: the changed file is in use", watched.what)
                self._metrics.reloads[watched.what, "applied"].inc()
            self._metrics.file_in_use.labels(watched.what).set(1)
        except ConfigError as error:
            log.error("%s: the changed file is not used, what was before stays: %s", watched.what, error)
            self._metrics.reloads[watched.what, "refused"].inc()
            self._metrics.file_in_use.labels(watched.what).set(0)


def _signature(paths: tuple[Path, ...]) -> tuple[object, ...]:
    found: list[object] = []
    for path in paths:
        try:
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except OSError as error:
            found.append(str(error))
    return tuple(found)
