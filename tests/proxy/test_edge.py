"""Keys, certificates, origins and addresses: who may come in, and how the instances are reached."""

import asyncio
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp import web

from epd_proxy.edge import AccessConfig
from epd_proxy.errors import ConfigError
from epd_proxy.settings import load_config
from fakes.instances import FakeInstance, Recorded
from fakes.proxy_process import ProxyProcess, until_counted
from fakes.proxy_stack import CHAT, ProxyStack, chat, image_part

KEYS = {"team-a": "key-of-team-a-12345", "line-2": "key-without-a-name-67890"}
BACKEND_KEY = "key-of-the-instances"
PD = ("--prefill-decode", "http://pd:1")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"team-a {KEYS['team-a']}\n{KEYS['line-2']}\n")
    return path


@pytest.fixture
def backend_key(tmp_path: Path) -> Path:
    path = tmp_path / "backend-key"
    path.write_text(BACKEND_KEY + "\n")
    return path


async def test_only_known_keys_are_let_in(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "epd_proxy.access")
    async with ProxyStack(access=AccessConfig(str(keys))) as stack:
        good = [{"Authorization": f"Bearer {KEYS['team-a']}"}, {"x-api-key": KEYS["line-2"]}]
        for headers in good:
            assert (await stack.post(chat(image_part()), headers=headers)).status == 200
        assert [record.fields["key"] for record in caplog.records] == list(KEYS)
        bad = [{}, {"Authorization": "Bearer wrong-key-0123456789"}, {"Authorization": f"Basic {KEYS['team-a']}"},
               {"x-api-key": ""}, {"Authorization": "Bearer \xff"}]  # fmt: skip
        for headers in bad:
            reply = await stack.post(chat(), headers=headers)
            assert (reply.status, reply.error["type"]) == (401, "Unauthorized")
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert (await stack.get("/v1/models")).status == 401
        assert len(stack.instances[0].requests) == 2
        for path in ("/health", "/ready", "/status", "/metrics"):
            assert (await stack.get(path)).status == 200
        assert not any(key in caplog.text for key in KEYS.values())


async def test_an_unknown_client_is_not_invited_to_send_its_body(keys: Path) -> None:
    async with ProxyStack(access=AccessConfig(str(keys))) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        writer.close()


async def test_the_clients_key_goes_on_to_the_instances(keys: Path) -> None:
    async with ProxyStack(access=AccessConfig(str(keys))) as stack:
        await stack.post(chat(image_part()), headers={"x-api-key": KEYS["team-a"]})
        for fakes in (stack.encoders, stack.instances):
            assert fakes[0].requests[0].headers["Authorization"] == f"Bearer {KEYS['team-a']}"


async def test_the_instances_key_takes_the_place_of_the_clients(keys: Path, backend_key: Path) -> None:
    async with ProxyStack(access=AccessConfig(str(keys), str(backend_key))) as stack:
        await stack.post(chat(image_part()), headers={"x-api-key": KEYS["team-a"]})
        await stack.post(chat(image_part()), headers={"authorization": f"bearer {KEYS['team-a']}"})
        for instance in (*stack.encoders, *stack.instances):
            for request in instance.requests:
                assert request.headers.getall("Authorization") == [f"Bearer {BACKEND_KEY}"]  # type: ignore[attr-defined]
                assert not any(key in str(request.headers) for key in KEYS.values())


async def test_keys_are_exchanged_while_it_runs(keys: Path) -> None:
    new = "a-new-key-of-some-length"
    async with (
        FakeInstance() as instance,
        ProxyProcess("--prefill-decode", instance.url, "--api-keys-file", str(keys)) as proxy,
    ):
        await proxy.client.post(CHAT, json=chat(), headers={"x-api-key": KEYS["team-a"]})
        assert len(instance.requests) == 1
        await asyncio.to_thread(keys.write_text, new + "\n")
        await until_answered(proxy, new, 200)
        await until_answered(proxy, KEYS["team-a"], 401)
        await asyncio.to_thread(keys.write_text, "# nobody, or so it seems\n")
        await until_counted(proxy.client, 'epd_proxy_file_in_use{file="api-keys"} 0.0')
        await until_answered(proxy, new, 200)  # an empty file neither opens nor closes the door


async def until_answered(proxy: ProxyProcess, key: str, status: int) -> None:
    """Wait until a request with ``key`` is answered ``status``."""
    for _ in range(400):
        async with proxy.client.post(CHAT, json=chat(), headers={"x-api-key": key}) as response:
            if response.status == status:
                return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{key} did not come to be answered {status}")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--api-keys-file", "/nonexistent"), "/nonexistent"),
        (("--backend-key-file", "/dev/null"), "expected one key"),
        (("--tls-cert", "/nonexistent"), "belong together"),
        (("--tls-cert", "/nonexistent", "--tls-key", "/nonexistent"), "expected a PEM certificate chain"),
        (("--backend-tls-ca", "/dev/null"), "expected a file of PEM certificates"),
        (("--admin-port", "1"), "expected --admin-keys-file"),
        (("--tls-client-ca", "/x"), "expected --tls-cert and --tls-key"),
        (("--backend-tls-verify", "maybe"), "expected on or off"),
        (("--cors-origins", "https://a.test/path"), "without a path"),
        (("--cors-origins", "a.test"), "expected * or scheme"),
    ],
)
def test_what_cannot_work_is_refused_at_start(argv: tuple[str, ...], words: str) -> None:
    from epd_proxy.app import build_app

    with pytest.raises(ConfigError) as caught:
        build_app(load_config((*PD, *argv), {}))
    assert words in str(caught.value)


# Certificates.
@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def server_files(ca: trustme.CA, folder: Path, *names: str) -> tuple[Path, Path]:
    """Write a certificate and its key."""
    certificate = ca.issue_cert(*(names or ("127.0.0.1", "::1")))
    cert, key = folder / "tls.crt", folder / "tls.key"
    key.write_bytes(certificate.private_key_pem.bytes())
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    return cert, key


def client_context(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


async def test_tls_towards_clients_and_a_new_certificate(ca: trustme.CA, tmp_path: Path) -> None:
    cert, key = server_files(ca, tmp_path)
    files = ("--tls-cert", str(cert), "--tls-key", str(key))
    async with FakeInstance() as instance:
        async with ProxyProcess("--prefill-decode", instance.url, *files, tls=client_context(ca)) as proxy:
            for stream in (False, True):
                async with proxy.client.post(CHAT, json=chat(stream=stream)) as response:
                    assert (response.status, bool(await response.read())) == (200, True)
            first = await serial(proxy, ca)
            await asyncio.to_thread(server_files, ca, tmp_path)
            for _ in range(400):
                if await serial(proxy, ca) != first:
                    break
                await asyncio.sleep(0.05)
            else:
                raise AssertionError("the new certificate is not shown")
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                async with proxy.client.get(proxy.url.replace("https:", "http:") + "/health"):
                    pass
            proxy.terminate()
            code, err = await proxy.end()
        assert (code, "Traceback" in err) == (0, False)


async def serial(proxy: ProxyProcess, ca: trustme.CA) -> str:
    """Return the serial number of the certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection(proxy.host, proxy.port, ssl=client_context(ca))
    shown = writer.get_extra_info("peercert")
    writer.close()
    return str(shown["serialNumber"])


async def test_client_certificates(ca: trustme.CA, tmp_path: Path) -> None:
    cert, key = server_files(ca, tmp_path)
    ca.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    files = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(tmp_path / "ca.crt"))
    known, stranger = client_context(ca), client_context(ca)
    ca.issue_cert("client@a.test").configure_cert(known)
    trustme.CA().issue_cert("client@b.test").configure_cert(stranger)
    async with FakeInstance() as instance:
        async with ProxyProcess("--prefill-decode", instance.url, *files, tls=client_context(ca)) as proxy:
            async with proxy.client.post(CHAT, json=chat()) as response:
                assert response.status == 401
                assert "client certificate" in (await response.json())["error"]["message"]
            async with proxy.client.post(CHAT, json=chat(), ssl=known) as response:
                assert response.status == 200
            with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
                async with proxy.client.post(CHAT, json=chat(), ssl=stranger):
                    pass
        assert len(instance.requests) == 1


@pytest.mark.parametrize(
    ("given", "names", "status"),
    [
        (("--backend-tls-ca", "CA"), ("127.0.0.1",), 200),
        (("--backend-tls-verify", "off"), ("other.test",), 200),
        ((), ("127.0.0.1",), 503),
        (("--backend-tls-ca", "CA"), ("other.test",), 503),
    ],
    ids=["ca", "not-verified", "unknown-ca", "wrong-name"],
)
async def test_tls_towards_instances(
    ca: trustme.CA, tmp_path: Path, given: tuple[str, ...], names: tuple[str, ...], status: int
) -> None:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    given = tuple(str(tmp_path / "ca.crt") if word == "CA" else word for word in given)
    instance = FakeInstance()
    instance.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(instance.tls)
    async with instance, ProxyProcess("--prefill-decode", instance.url, *given) as proxy:
        assert instance.url.startswith("https:")
        async with proxy.client.post(CHAT, json=chat()) as response:
            assert response.status == status
        assert len(instance.requests) == (status == 200)


async def test_a_certificate_is_shown_to_instances_that_ask_for_one(ca: trustme.CA, tmp_path: Path) -> None:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    cert, key = server_files(ca, tmp_path, "proxy.test")
    instance = FakeInstance()
    instance.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    instance.tls.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(instance.tls)
    ca.issue_cert("127.0.0.1").configure_cert(instance.tls)
    shown = ("--backend-tls-cert", str(cert), "--backend-tls-key", str(key))
    async with instance:
        for given in (shown, ()):
            arguments = ("--prefill-decode", instance.url, "--backend-tls-ca", str(tmp_path / "ca.crt"), *given)
            async with ProxyProcess(*arguments) as proxy, proxy.client.post(CHAT, json=chat()) as response:
                assert (response.status == 200) == bool(given)
        assert len(instance.requests) == 1


# Origins.
PAGE = {"Origin": "https://page.test"}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


async def test_pages_of_known_origins_may_call(keys: Path) -> None:
    access = AccessConfig(str(keys), origins=("https://page.test", "http://localhost:3000"))
    async with ProxyStack(access=access) as stack:
        async with stack.client.options(CHAT, headers={**PAGE, **PREFLIGHT}) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "https://page.test")
            assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
        headers = {**PAGE, "x-api-key": KEYS["team-a"]}
        for reply in (await stack.post(chat(), headers=headers), await stack.post(chat(stream=True), headers=headers),
                      await stack.post(chat(), headers=PAGE)):  # fmt: skip
            assert reply.headers["Access-Control-Allow-Origin"] == "https://page.test"
            assert reply.headers["Vary"] == "Origin"
        other = {"Origin": "https://other.test", "x-api-key": KEYS["team-a"]}
        assert "Access-Control-Allow-Origin" not in (await stack.post(chat(), headers=other)).headers
        async with stack.client.options(CHAT, headers={**other, **PREFLIGHT}) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
        assert all("Origin" not in request.headers for request in stack.instances[0].requests)


async def test_any_origin() -> None:
    async with ProxyStack(access=AccessConfig(origins=("*",))) as stack:
        assert (await stack.post(chat(), headers=PAGE)).headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Origin" not in (await stack.post(chat())).headers


async def test_without_origins_nothing_is_allowed_whatever_the_instances_say() -> None:
    async with ProxyStack() as stack:
        async with stack.client.options(CHAT, headers={**PAGE, **PREFLIGHT}) as response:
            assert response.status == 405
        stack.instances[0].default = allows_all
        reply = await stack.post(chat(), headers=PAGE)
        assert (reply.status, "Access-Control-Allow-Origin" in reply.headers) == (200, False)


async def allows_all(_instance: FakeInstance, _request: web.Request, _recorded: Recorded) -> web.StreamResponse:
    """Answer as vLLM does by default."""
    return web.json_response({"id": "x"}, headers={"Access-Control-Allow-Origin": "*"})


# Addresses.
async def test_ipv6_on_both_sides() -> None:
    instance = FakeInstance()
    instance.host = "::1"
    async with instance, ProxyProcess("--prefill-decode", instance.url, host="::1") as proxy:
        assert instance.url.startswith("http://[::1]:")
        async with proxy.client.post(CHAT, json=chat()) as response:
            assert response.status == 200
        proxy.terminate()
        _, err = await proxy.end()
        assert f"listening on [::1]:{proxy.port}" in err
        assert instance.requests[0].headers["Host"] == f"[::1]:{instance.port}"
