"""How many requests run at once, and what becomes of those beyond."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from epd_proxy.admission import Admission
from epd_proxy.errors import BusyError, UnavailableError
from epd_proxy.staging import AdmissionConfig
from fakes import instances as fake
from fakes.proxy_stack import CHAT, ProxyStack, chat


def admission(running: int = 1, queued: int = 9, queue_s: float = 60.0) -> tuple[Admission, list[str]]:
    reasons: list[str] = []
    return Admission(AdmissionConfig(running, queued, queue_s), reasons.append), reasons


async def test_first_come_first_served() -> None:
    tested, reasons = admission()
    await tested.enter()
    served: list[int] = []

    async def wait(number: int) -> None:
        await tested.enter()
        served.append(number)
        tested.leave()

    waiting = [asyncio.create_task(wait(number)) for number in range(5)]
    await asyncio.sleep(0)
    assert (tested.running, tested.queued, served) == (1, 5, [])
    tested.leave()
    await asyncio.gather(*waiting)
    assert (tested.running, tested.queued, served, reasons) == (0, 0, [0, 1, 2, 3, 4], [])


async def test_a_full_queue_refuses_at_once_and_a_long_wait_ends() -> None:
    tested, reasons = admission(queued=1, queue_s=0.05)
    await tested.enter()
    waiting = asyncio.create_task(tested.enter())
    await asyncio.sleep(0)
    with pytest.raises(BusyError):
        await tested.enter()
    with pytest.raises(UnavailableError):
        await waiting
    assert (tested.running, tested.queued, reasons) == (1, 0, ["queue_full", "queue_timeout"])


async def test_who_leaves_the_queue_takes_nothing() -> None:
    tested, _ = admission()
    await tested.enter()
    waiting = [asyncio.create_task(tested.enter()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert tested.queued == 2
    tested.leave()
    waiting[1].cancel()  # just as its turn has come
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert (tested.running, tested.queued) == (1, 0)
    tested.leave()
    assert tested.running == 0


async def test_the_time_in_the_queue_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="epd_proxy.access")
    async with ProxyStack(encoders=0, admission=AdmissionConfig(running_max=1)) as stack:
        go_on = asyncio.Event()

        async def hold(*request: Any) -> Any:
            await go_on.wait()
            return await fake.answer(*request)

        stack.instances[0].script.append(hold)
        both = [asyncio.create_task(stack.post(chat())) for _ in range(2)]
        await stack.until(lambda: stack.handlers.admission.queued == 1)
        await asyncio.sleep(0.2)
        go_on.set()
        assert [reply.status for reply in await asyncio.gather(*both)] == [200, 200]
        await stack.until_idle()
        first, second = [record.fields for record in caplog.records if record.name == "epd_proxy.access"]  # type: ignore[attr-defined]
    assert "queue_s" not in first
    assert 0.2 <= second["queue_s"] <= second["first_byte_s"]


async def test_at_the_wire() -> None:
    limits = AdmissionConfig(running_max=2, queued_max=2, queue_s=0.6)
    async with ProxyStack(encoders=0, admission=limits) as stack:
        stack.instances[0].default = fake.hang
        running = [asyncio.create_task(stack.post(chat())) for _ in range(2)]
        await stack.until(lambda: stack.instances[0].running == 2)
        queued = [asyncio.create_task(stack.post(chat())) for _ in range(2)]
        await stack.until(lambda: "running=4" in repr(stack.handlers))
        metrics = (await stack.get("/metrics")).body.decode()
        assert "epd_proxy_requests_running 2.0" in metrics
        assert "epd_proxy_requests_queued 2.0" in metrics
        refused = await stack.post(chat())
        assert (refused.status, refused.error["type"], refused.headers["Retry-After"]) == (429, "TooManyRequests", "1")
        late = await asyncio.gather(*queued)
        assert [(reply.status, reply.headers["Retry-After"]) for reply in late] == [(503, "1")] * 2
        assert len(stack.instances[0].requests) == 2
        # Neither do operators nor probes wait in line.
        assert (await stack.get("/ready")).status == (await stack.get("/v1/models")).status == 200
        for task in running:
            task.cancel()
        stack.instances[0].default = fake.answer
        await stack.until(lambda: "running=0" in repr(stack.handlers))
        assert [(await stack.post(chat())).status for _ in range(3)] == [200] * 3
        metrics = (await stack.get("/metrics")).body.decode()
        assert 'epd_proxy_admission_refusals_total{reason="queue_full"} 1.0' in metrics
        assert 'epd_proxy_admission_refusals_total{reason="queue_timeout"} 2.0' in metrics
        assert "epd_proxy_requests_running 0.0" in metrics


async def test_a_queue_moves_on_when_streams_end_or_break_or_clients_leave() -> None:
    async with ProxyStack(encoders=0, admission=AdmissionConfig(running_max=1, queued_max=50)) as stack:
        [instance] = stack.instances
        instance.script.extend([fake.stream(fake.TEXT, 0.01), fake.stream(fake.TEXT[:1], end="cut"), fake.refuse(400)])
        body = json.dumps(chat(stream=True)).encode()

        async def send(leave_s: float) -> int:
            try:
                async with asyncio.timeout(leave_s), stack.client.post(CHAT, data=body) as response:
                    await response.content.read()
                    return response.status
            except (TimeoutError, aiohttp.ClientError):  # who left, and the broken one
                return 0

        statuses = await asyncio.gather(*(send(0.001 if number % 5 == 4 else 30) for number in range(20)))
        assert statuses.count(200) >= 13
        assert instance.running_max == 1


async def test_the_queue_is_served_while_the_proxy_drains() -> None:
    async with ProxyStack(encoders=0, admission=AdmissionConfig(running_max=1)) as stack:
        stack.instances[0].default = fake.after(0.2)
        sending = [asyncio.create_task(stack.post(chat())) for _ in range(3)]
        await stack.until(lambda: "running=3" in repr(stack.handlers))
        await stack.handlers.drain(20)
        assert [(await each).status for each in sending] == [200] * 3
        assert (await stack.post(chat())).status == 503
