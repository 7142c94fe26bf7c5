"""Instances come and go while requests run: by the operators' API and by the instances file."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from epd_proxy.config import Topology
from epd_proxy.edge import AdminConfig
from epd_proxy.errors import ConfigError
from epd_proxy.inventory import read_instances
from fakes import instances as fake
from fakes.instances import FakeInstance
from fakes.proxy_process import ProxyProcess, free_port, until_counted
from fakes.proxy_stack import CHAT, ProxyStack, Reply, chat, image_part

KEY = "an-operators-key-of-some-length"


@pytest.fixture
def admin(tmp_path: Path) -> AdminConfig:
    keys = tmp_path / "admin-keys"
    keys.write_text(f"# operators\nalice {KEY}\n")
    return AdminConfig("127.0.0.1", free_port(), str(keys))


async def ask(stack: ProxyStack, path: str, document: Any = None, key: str = KEY) -> Reply:
    """POST to the operators' listener, or GET without a document."""
    assert stack.admin
    url = f"http://127.0.0.1:{stack.admin.port}/admin/{path}"
    method = "GET" if document is None else "POST"
    headers = {"Authorization": f"Bearer {key}"}
    async with stack.client.request(method, url, json=document, headers=headers) as response:
        return Reply(response.status, response.headers, await response.read())


async def test_defect_27_an_instance_leaves_when_its_own_requests_are_done(admin: AdminConfig) -> None:
    """Others are busy all the time, and new requests keep coming."""
    async with ProxyStack(encoders=0, instances=2, admin=admin) as stack:
        leaving, staying = stack.instances
        leaving.default = fake.after(0.3)
        staying.default = fake.hang
        urls = {"stage": "prefill_decode", "url": leaving.url}
        sending = [asyncio.create_task(stack.post(chat())) for _ in range(2)]
        await stack.until(lambda: leaving.running == 1 and staying.running == 1)
        refused = await ask(stack, "instances/remove", urls)
        assert (refused.status, refused.document["removed"], refused.document["requests"]) == (202, False, 1)
        staying.default = fake.answer  # for the new ones
        assert [(await stack.post(chat())).status for _ in range(3)] == [200] * 3
        assert len(leaving.requests) == 1
        gone = await ask(stack, "instances/remove?wait_s=20", urls)
        assert (gone.status, gone.document["removed"]) == (200, True)
        assert staying.running == 1  # still busy: nobody waited for it
        left = (await ask(stack, "instances")).document["stages"]["prefill_decode"]
        assert [each["url"] for each in left] == [staying.url]
        done, _ = await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().status for task in done] == [200]
        for task in sending:
            task.cancel()
        await stack.until(lambda: staying.aborted == 1)
        assert f'endpoint="{leaving.url}"' not in (await stack.get("/metrics")).body.decode()


async def test_an_instance_that_is_added_takes_requests_and_is_probed(admin: AdminConfig) -> None:
    async with ProxyStack(encoders=0, admin=admin) as stack, FakeInstance() as encoder, FakeInstance() as second:
        assert (await stack.post(chat(image_part()))).status == 200
        added = await ask(stack, "instances/add", {"stage": "encode", "url": encoder.url + "/"})
        assert (added.status, added.document["url"]) == (201, encoder.url)
        again = await ask(stack, "instances/add", {"stage": "encode", "url": encoder.url})
        assert again.status == 200
        await ask(stack, "instances/add", {"stage": "prefill-decode", "url": second.url})
        await stack.until(lambda: encoder.probes > 0 and second.probes > 0)
        assert (await stack.post(chat(image_part()))).status == 200
        assert (await stack.post(chat(image_part()))).status == 200
        assert (len(encoder.requests), len(second.requests)) == (2, 1)
        gone = await ask(stack, "instances/remove?wait_s=5", {"stage": "encode", "url": encoder.url})
        assert gone.status == 200
        assert (await stack.post(chat(image_part()))).status == 200
        assert len(encoder.requests) == 2
        assert (await stack.get("/ready")).document["stages"] == {"prefill_decode": "2 of 2 up"}


async def test_a_drained_instance_finishes_and_can_come_back(admin: AdminConfig) -> None:
    async with ProxyStack(encoders=0, instances=2, admin=admin) as stack:
        first = {"stage": "prefill_decode", "url": stack.instances[0].url}
        drained = await ask(stack, "instances/drain", first)
        assert (drained.status, drained.document["draining"]) == (200, True)
        for _ in range(3):
            await stack.post(chat())
        assert [len(i.requests) for i in stack.instances] == [0, 3]
        last = await ask(stack, "instances/drain", {**first, "url": stack.instances[1].url})
        assert (last.status, "last prefill_decode instance" in last.error["message"]) == (409, True)
        await ask(stack, "instances/add", first)
        for _ in range(3):
            await stack.post(chat())
        assert len(stack.instances[0].requests) > 0


async def test_a_drained_decode_instance_still_gets_its_kv(admin: AdminConfig) -> None:
    async with ProxyStack(encoders=0, prefills=1, decodes=2, admin=admin) as stack:
        from fakes.layerwise import pushes_kv, waits_for_kv

        stack.prefills[0].default = pushes_kv(stack.link, 0.3)
        for decode in stack.decodes:
            decode.default = waits_for_kv(stack.link, queue_s=0.2)
        sending = asyncio.create_task(stack.post(chat()))
        await stack.until(lambda: sum(d.running for d in stack.decodes) == 1)
        busy = next(d for d in stack.decodes if d.running)
        removed = await ask(stack, "instances/remove?wait_s=20", {"stage": "decode", "url": busy.url})
        assert removed.status == 200
        assert (await sending).status == 200
        assert len(busy.requests) == 1


@pytest.mark.parametrize(
    ("path", "document", "status", "words"),
    [
        ("instances/add", {"stage": "decode", "url": "http://a:1"}, 404, "expected one of encode, prefill_decode"),
        ("instances/add", {"stage": "encode", "url": "a:1"}, 400, "expected http://host:port"),
        ("instances/add", {"stage": "encode"}, 400, "found"),
        ("instances/add", [], 400, "found"),
        ("instances/remove", {"stage": "encode", "url": "http://a:1"}, 404, "is no encode instance"),
        ("instances/remove?wait_s=soon", {"stage": "encode", "url": "http://a:1"}, 400, "wait_s"),
        ("nothing", {}, 404, "admin/nothing"),
        ("start_profile?stage=x", {}, 404, "expected one of"),
    ],
)
async def test_what_cannot_be_done_is_told(
    admin: AdminConfig, path: str, document: Any, status: int, words: str
) -> None:
    async with ProxyStack(admin=admin) as stack:
        reply = await ask(stack, path, document)
        assert reply.status == status
        assert words in reply.error["message"]


async def test_the_operators_door_needs_a_key_and_is_not_on_the_clients_port(admin: AdminConfig) -> None:
    async with ProxyStack(admin=admin) as stack:
        for key in ("", "wrong", KEY[:-1], KEY + "x"):
            assert (await ask(stack, "instances", key=key)).status == 401
        for path in ("/admin/instances", "/v1/../admin/instances"):
            reply = await stack.get(path)
            assert reply.status == 404
        exchange_key(admin)
        for _ in range(200):
            if (await ask(stack, "instances")).status == 401:
                break
            await asyncio.sleep(0.05)
        assert (await ask(stack, "instances", key="a-new-key-of-some-length-indeed")).status == 200


def exchange_key(admin: AdminConfig) -> None:
    Path(admin.keys_file).write_text("a-new-key-of-some-length-indeed\n")


async def test_profiling_is_asked_of_every_instance(admin: AdminConfig) -> None:
    async with ProxyStack(admin=admin, instances=2) as stack:
        reply = await ask(stack, "start_profile", {})
        # As real instances do that were started without a profiler.
        assert reply.status == 502
        assert {each["status"] for each in reply.document["instances"]} == {404}
        for each in stack.fakes:
            each.profiler = True
        reply = await ask(stack, "start_profile?stage=prefill_decode", {})
        assert (reply.status, len(reply.document["instances"])) == (200, 2)
        reply = await ask(stack, "stop_profile", {})
        assert (reply.status, len(reply.document["instances"])) == (200, 3)
        paths = [[r.path for r in each.requests] for each in stack.fakes]
        assert paths == [["/stop_profile"], *[["/start_profile", "/stop_profile"]] * 2]


def write(path: Path, **stages: list[str]) -> None:
    """Write an instances file."""
    path.write_text(json.dumps(stages) if path.suffix == ".json" else
                    "".join(f"{stage} = {json.dumps(urls)}\n" for stage, urls in stages.items()))  # fmt: skip


@pytest.mark.parametrize("name", ["instances.toml", "instances.json"])
async def test_the_file_says_which_instances_there_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    async with FakeInstance() as first, FakeInstance() as second, FakeInstance() as encoder:
        write(path, prefill_decode=[first.url])
        async with ProxyProcess("--instances-file", str(path)) as proxy:

            async def served_by(instance: FakeInstance) -> None:
                for _ in range(400):
                    before = len(instance.requests)
                    async with proxy.client.post(CHAT, json=chat(image_part())) as response:
                        assert response.status == 200
                    if len(instance.requests) > before:
                        return
                    await asyncio.sleep(0.02)
                raise AssertionError(f"{instance.url} was not asked")

            await served_by(first)
            write(path, prefill_decode=[second.url], encode=[encoder.url])
            await served_by(second)
            await served_by(encoder)
            seen = len(first.requests)
            write(path, prefill_decode=["nonsense"])
            await until_counted(proxy.client, 'epd_proxy_file_in_use{file="instances"} 0.0')
            write(path, prefill=["http://a:1"], decode=["http://127.0.0.1:1"])
            await until_counted(proxy.client, 'epd_proxy_reloads_total{file="instances",outcome="refused"} 2.0')
            path.unlink()
            await until_counted(proxy.client, 'epd_proxy_reloads_total{file="instances",outcome="refused"} 3.0')
            await served_by(second)
            assert len(first.requests) == seen
            write(path, prefill_decode=[first.url])
            await until_counted(proxy.client, 'epd_proxy_file_in_use{file="instances"} 1.0')
            await served_by(first)
            proxy.terminate()
            code, err = await proxy.end()
        assert code == 0
        assert "what was before stays" in err
        assert "cannot become decode and prefill" in err
        assert "expected http://host:port, found 'nonsense'" in err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "prefill_decode = [", "a.toml: "),
        ("a.json", "[]", "expected an object"),
        ("a.json", '{"prefill_decode": "http://a:1"}', 'expected a list of URLs, ["http://host:port"]'),
        ("a.toml", 'prefill_decode = ["http://a:1"]\npd = []', "pd: expected one of encode"),
        ("a.toml", 'encode = ["http://a:1"]', "no instance answers"),
        ("a.toml", 'prefill_decode = ["http://0.0.0.0:1"]', "address to bind"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match="a\\.") as caught:
        read_instances(path)
    assert words in str(caught.value)


def test_names_and_slashes_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('# ours\nprefill-decode = ["http://[::1]:1/"]\nencode = []\n')
    assert read_instances(path) == Topology(prefill_decode=("http://[::1]:1",))


async def test_removed_instances_are_probed_no_more(admin: AdminConfig, caplog: pytest.LogCaptureFixture) -> None:
    from epd_proxy.config import Health

    caplog.set_level(logging.INFO)
    async with ProxyStack(instances=2, admin=admin, health=Health(interval_s=0.02)) as stack:
        gone = stack.instances[0]
        await ask(stack, "instances/remove?wait_s=5", {"stage": "prefill_decode", "url": gone.url})
        await asyncio.sleep(0.1)
        probes, others = gone.probes, stack.instances[1].probes
        await stack.until(lambda: stack.instances[1].probes > others + 3)
        assert gone.probes <= probes
