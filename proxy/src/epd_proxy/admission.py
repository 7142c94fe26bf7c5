"""How many requests run at once, how many wait for their turn, and for how long."""

import asyncio
from collections import deque
from collections.abc import Callable

from .errors import BusyError, UnavailableError
from .staging import AdmissionConfig


class Admission:
    """A place for each request that runs, and a queue in which those wait that came first are first.

    Who waits has sent no body yet, so a full proxy holds its clients back and not their bodies. ``refused`` is called
    with the reason of each refusal: ``queue_full`` or ``queue_timeout``.
    """

    def __init__(self, config: AdmissionConfig, refused: Callable[[str], None]) -> None:
        self.running = 0
        self._config = config
        self._refused = refused
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        return f"<Admission running={self.running} queued={self.queued}>"

    @property
    def queued(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    def try_enter(self) -> bool:
        """Take a place if there is one, and return whether there was; whoever has it gives it back with :meth:`leave`.

        Without a queue's wait nothing is awaited, which most requests are spared by this.
        """
        if self.running >= self._config.running_max:
            return False
        self.running += 1
        return True

    async def enter(self) -> None:
        """Take a place, which others may have to leave first.

        Raises :class:`BusyError` when the queue is full, and :class:`UnavailableError` when no place came in time.
        """
        if self.try_enter():
            return
        if len(self._waiting) >= self._config.queued_max:
            self._refused("queue_full")
            raise BusyError("the proxy serves as many requests as it may, and as many wait; try again later")
        await self._wait()

    def leave(self) -> None:
        """Give the place to who waits longest, or back."""
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():
                first.set_result(None)
                return
        self.running -= 1

    async def _wait(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._config.queue_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.leave()  # the place came just as it was given up
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if not isinstance(error, TimeoutError):
                raise
            self._refused("queue_timeout")
            raise UnavailableError("the proxy was busy with other requests for too long; try again later") from error
