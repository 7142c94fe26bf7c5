"""Several workers on one port: one picture of the loads, one set of counts, and none that is missed when it dies."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from epd_proxy.announcements import announcements_in, write_state
from epd_proxy.app import build_app
from epd_proxy.config import Listen, MetaserverConfig, ProxyConfig, Topology
from epd_proxy.errors import ConfigError
from epd_proxy.loads import LoadRow, LoadTable
from epd_proxy.pool import Pool
from epd_proxy.workers import Shared
from fakes import instances as fake
from fakes.instances import FakeInstance
from fakes.proxy_process import ProxyProcess, free_port
from fakes.proxy_stack import CHAT, chat, read_to_break


def test_all_workers_see_what_each_has() -> None:
    table = LoadTable(3)
    pools = [Pool("decode", ["http://a", "http://b"], LoadRow(table, worker)) for worker in range(3)]
    leases = [pools[worker % 3].lease(10) for worker in range(10)]
    for pool in pools:
        assert [(e.active_leases, e.active_cost) for e in pool.endpoints] == [(5, 50), (5, 50)]
    for lease in leases[:4]:
        lease.release()
    assert sum(e.active_leases for e in pools[0].endpoints) == 6
    table.clear(2)  # worker 2 is gone: of requests 2, 5 and 8 the last two were left
    assert sum(e.active_leases for e in pools[0].endpoints) == 4


def test_an_instance_is_the_same_in_whatever_order_it_was_met() -> None:
    table = LoadTable(2)
    here, there = LoadRow(table, 0), LoadRow(table, 1)
    here.open("encode", "http://x").add(1, 7)
    there.open("decode", "http://x").add(1, 9)
    assert there.open("encode", "http://x").tokens == 7
    assert here.open("decode", "http://x").tokens == 9


def test_more_instances_than_columns_are_counted_alone() -> None:
    row = LoadRow(LoadTable(1), 0)
    loads = [row.open("decode", f"http://{n}") for n in range(1100)]
    for load in loads:
        load.add(1, 1)
    assert [load.requests for load in loads] == [1] * 1100


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"listen": Listen(workers=0)}, "--workers"), ({"listen": Listen(workers=65)}, "--workers"),
     ({"listen": Listen(workers=2), "metaserver": MetaserverConfig(port=65535),
       "topology": Topology(prefill=("http://localhost:1",), decode=("http://localhost:2",))}, "65535 to 65536")],
)  # fmt: skip
def test_what_workers_cannot_share_is_refused(changes: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        ProxyConfig(**{"topology": Topology(prefill_decode=("http://a:1",)), **changes})  # type: ignore[arg-type]


def workers_of(proxy: ProxyProcess) -> list[int]:
    pid = proxy.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come about"
        await asyncio.sleep(0.02)


async def post(proxy: ProxyProcess, **more: object) -> aiohttp.ClientResponse:
    """Send over a connection of its own, so that any worker may get it."""
    client = aiohttp.ClientSession(proxy.url, timeout=aiohttp.ClientTimeout(total=30))
    response = await client.post(CHAT, json=chat(**more), headers={"Connection": "close"})  # type: ignore[arg-type]
    response.session = client  # type: ignore[attr-defined]
    return response


async def end(response: aiohttp.ClientResponse) -> None:
    response.close()
    await response.session.close()  # type: ignore[attr-defined]


async def sample(proxy: ProxyProcess, name: str, **labels: str) -> float:
    async with proxy.client.get("/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    found = [s for family in families for s in family.samples
             if s.name == name and labels.items() <= s.labels.items()]  # fmt: skip
    return sum(s.value for s in found)


async def test_the_load_is_shared_and_the_counts_are_summed() -> None:
    endless = fake.stream(fake.TEXT[:1], end="hang")
    async with FakeInstance(endless) as first, FakeInstance(endless) as second:  # noqa: SIM117
        async with ProxyProcess("--prefill-decode", first.url, second.url, "--workers", "3") as proxy:
            assert len(workers_of(proxy)) == 3
            answers = [await post(proxy, stream=True) for _ in range(12)]
            assert (first.running, second.running) == (6, 6)
            for url in (first.url, second.url):
                assert await sample(proxy, "epd_proxy_leases_in_flight", endpoint=url) == 6
            for answer in answers:
                await end(answer)
            await until(lambda: first.running + second.running == 0)
            for instance in (first, second):
                instance.default = fake.answer
            for _ in range(20):
                answer = await post(proxy)
                assert answer.status == 200
                await end(answer)
            counted = 0.0
            while counted < 20:  # within a second, and no longer than the test may take
                counted = await sample(proxy, "epd_proxy_requests_total", status="200", path=CHAT)
            assert await sample(proxy, "epd_proxy_leases_in_flight") == 0


def file_table_size(pid: int) -> int:
    """Return for how many files the kernel has room without letting the process wait."""
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("FDSize:")]
    return int(line.split()[1])


@pytest.mark.parametrize("workers", [1, 2])
async def test_no_stream_waits_for_the_table_of_files_to_grow(workers: int) -> None:
    async with ProxyProcess("--prefill-decode", "http://127.0.0.1:9", "--workers", str(workers)) as proxy:
        serving = workers_of(proxy) if workers > 1 else [proxy.process.pid]
        _, most = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
        assert len(serving) == workers
        await until(lambda: all(file_table_size(pid) >= min(most, 65_536) for pid in serving))


async def test_a_worker_that_dies_is_replaced_and_leaves_no_load() -> None:
    async with FakeInstance(fake.stream(fake.TEXT[:1], end="hang")) as instance:  # noqa: SIM117
        async with ProxyProcess("--prefill-decode", instance.url, "--workers", "2") as proxy:
            before = workers_of(proxy)
            answers = [await post(proxy, stream=True) for _ in range(8)]
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: len(set(workers_of(proxy)) - set(before)) == 2)
            for answer in answers:
                _, broken = await read_to_break(answer)
                assert broken
                await end(answer)
            instance.default = fake.answer
            await until_answers(proxy)
            assert await sample(proxy, "epd_proxy_leases_in_flight") == 0
            proxy.terminate()
            code, err = await proxy.end()
    assert (code, "Traceback" in err) == (0, False)
    assert err.count("is started again") == 2


async def until_answers(proxy: ProxyProcess) -> None:
    for _ in range(400):
        try:
            answer = await post(proxy)
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.05)
        else:
            status = answer.status
            await end(answer)
            if status == 200:
                return
    pytest.fail("no worker came back")


async def test_sigterm_to_the_whole_group_drains_all() -> None:
    async with FakeInstance(fake.stream(fake.TEXT, 0.2)) as instance:  # noqa: SIM117
        async with ProxyProcess("--prefill-decode", instance.url, "--workers", "2") as proxy:
            answers = [await post(proxy, stream=True) for _ in range(6)]
            workers = workers_of(proxy)
            proxy.terminate()
            for answer in answers:
                body, broken = await read_to_break(answer)
                assert (broken, body.endswith(fake.DONE)) == (False, True)
                await end(answer)
            code, err = await proxy.end()
    assert (code, "Traceback" in err) == (0, False)
    assert not any(is_running(pid) for pid in workers)


async def test_workers_do_not_outlive_their_parent() -> None:
    async with FakeInstance() as instance:  # noqa: SIM117
        async with ProxyProcess("--prefill-decode", instance.url, "--workers", "2") as proxy:
            workers = workers_of(proxy)
            proxy.process.kill()
            await until(lambda: not any(is_running(pid) for pid in workers))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_what_operators_do_holds_for_all_workers_and_their_successors(tmp_path: Path) -> None:
    key = "an-operators-key-of-some-length"
    keys = tmp_path / "keys"
    keys.write_text(key)
    admin = ("--admin-port", str(free_port()), "--admin-keys-file", str(keys))
    async with FakeInstance() as first, FakeInstance() as second:  # noqa: SIM117
        async with ProxyProcess("--prefill-decode", first.url, "--workers", "3", *admin) as proxy:

            async def change(what: str, url: str) -> dict[str, object]:
                target = f"http://127.0.0.1:{admin[1]}/admin/instances/{what}?wait_s=20"
                document = {"stage": "prefill_decode", "url": url}
                headers = {"Authorization": f"Bearer {key}"}
                async with proxy.client.post(target, json=document, headers=headers) as response:
                    assert response.status in (200, 201)
                    return dict(await response.json())

            async def unasked(instance: FakeInstance) -> bool:
                before = len(instance.requests)
                for _ in range(24):
                    answer = await post(proxy)
                    assert answer.status == 200
                    await end(answer)
                return len(instance.requests) == before

            await until(lambda: listens(int(admin[1])))  # the worker that answered may be another one
            await change("add", second.url)
            removed = await change("remove", first.url)
            assert removed["removed"] is True
            for _ in range(40):  # the others look once a second
                if await unasked(first):
                    break
                await asyncio.sleep(0.25)
            assert await unasked(first)
            before = workers_of(proxy)
            os.kill(before[1], signal.SIGKILL)
            await until(lambda: len(workers_of(proxy)) == 3 and set(workers_of(proxy)) != set(before))
            await until(lambda: len(second.requests) > 0)
            for _ in range(40):
                if await unasked(first):
                    break
                await asyncio.sleep(0.25)
            assert await unasked(first)


async def test_a_successor_knows_what_operators_did_before_it_listens(tmp_path: Path) -> None:
    async with FakeInstance() as instance, FakeInstance() as removed:
        write_state(announcements_in(str(tmp_path)), {"prefill_decode": {instance.url: "serving"}})
        config = ProxyConfig(topology=Topology(prefill_decode=(removed.url,)))
        alive, alive_here = os.pipe()
        app = build_app(config, Shared(LoadRow(LoadTable(2), 1), alive, str(tmp_path), 1))
        async with app.running():
            assert [each.url for each in app.stages.pools["prefill_decode"].endpoints] == [instance.url]
        os.close(alive)
        os.close(alive_here)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_file_that_workers_cannot_use_is_told() -> None:
    command = [sys.executable, "-m", "epd_proxy", "--port", "0", "--workers", "2", "--prefill-decode", "http://a:1",
               "--api-keys-file", "/dev/null"]  # fmt: skip
    ended = await asyncio.to_thread(
        subprocess.run, command, check=False, capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert (ended.returncode, "expected a key a line" in ended.stderr, "Traceback" in ended.stderr) == (2, True, False)


async def test_another_proxy_does_not_slip_onto_the_port() -> None:
    async with FakeInstance() as instance:  # noqa: SIM117
        async with ProxyProcess("--prefill-decode", instance.url, "--workers", "2") as proxy:
            command = [sys.executable, "-m", "epd_proxy", "--host", "127.0.0.1", "--port", str(proxy.port),
                       "--prefill-decode", instance.url]  # fmt: skip
            for more in ([], ["--workers", "2"]):
                ended = await asyncio.to_thread(
                    subprocess.run, [*command, *more], check=False, capture_output=True, text=True, timeout=60,
                    env={"PYTHONPATH": ":".join(sys.path)},
                )  # fmt: skip
                assert (ended.returncode, str(proxy.port) in ended.stderr) == (1, True), ended.stderr


async def test_the_port_of_a_process_that_has_just_ended_can_be_used() -> None:
    """Its last connections hold the port for a minute, those that it closed itself."""
    async with FakeInstance() as instance:
        proxy = ProxyProcess("--prefill-decode", instance.url, "--workers", "2")
        with socket.create_server(("127.0.0.1", proxy.port)) as before:  # without SO_REUSEPORT, as one process alone
            client = socket.create_connection(before.getsockname())
            before.accept()[0].close()
            assert client.recv(1) == b""
            client.close()
        async with proxy, proxy.client.get("/health") as response:
            assert response.status == 200


async def test_a_worker_that_cannot_start_ends_all() -> None:
    async with FakeInstance() as instance, FakeInstance() as taken:
        command = [sys.executable, "-m", "epd_proxy", "--host", "127.0.0.1", "--port", "0", "--workers", "2",
                   "--prefill", instance.url, "--decode", instance.url,
                   "--metaserver-port", str(taken.port - 1)]  # fmt: skip
        ended = await asyncio.to_thread(
            subprocess.run, command, check=False, capture_output=True, text=True, timeout=60,
            env={"PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
    # The port before it may be taken too, by a test at the side.
    told = any(str(port) in ended.stderr for port in (taken.port - 1, taken.port))
    assert (ended.returncode, told, "Traceback" in ended.stderr) == (1, True, False)
