"""The same work wanted by several requests at once is done once."""

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum, auto


class Outcome(Enum):
    """What became of a flight. ABANDONED: whoever did the work was cancelled."""

    DONE = auto()
    FAILED = auto()
    ABANDONED = auto()


class Flights:
    """Work under way, by name."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[Outcome]] = {}

    def __repr__(self) -> str:
        return f"<Flights {len(self._under_way)}>"

    async def run(self, name: str, work: Callable[[], Awaitable[None]]) -> bool:
        """Do ``work``, or wait until the same is done by another. Returns whether it was done here.

        A failure is that of the one who met it: the others, who may have sent other headers, then do their own work,
        all at once. When the one is cancelled, one of the others takes over.
        """
        while other := self._under_way.get(name):
            await asyncio.wait((other,))
            outcome = other.result()
            if outcome is Outcome.DONE:
                return False
            if outcome is Outcome.FAILED:
                await work()
                return True
        await self._lead(name, work)
        return True

    async def _lead(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        mine = self._under_way[name] = asyncio.get_running_loop().create_future()
        outcome = Outcome.ABANDONED
        try:
            await work()
            outcome = Outcome.DONE
        except Exception:
            outcome = Outcome.FAILED
            raise
        finally:
            del self._under_way[name]
            mine.set_result(outcome)
