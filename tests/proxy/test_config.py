"""Flags and variables to a configuration, or to all faults at once."""

import re
from pathlib import Path

import pytest

import epd_proxy
from epd_proxy.config import MIB, MetaserverConfig, ProxyConfig, Timeouts, Topology
from epd_proxy.errors import ConfigError
from epd_proxy.settings import load_config

PD = ("--prefill-decode", "http://pd:1")
SPLIT = ("--prefill", "http://p:1", "--decode", "http://127.0.0.1:1", "http://d:1")


def load(*argv: str, **environ: str) -> ProxyConfig:
    return load_config(argv, environ)


def test_defaults() -> None:
    config = load(*PD)
    assert (config.listen.host, config.listen.port) == ("0.0.0.0", 8000)
    assert config.topology == Topology(prefill_decode=("http://pd:1",))
    assert (config.limits.body_bytes, config.encode_fallback, config.retry.max_attempts) == (128 * MIB, "local", 3)


def test_flags_beat_variables_and_lists_come_in_either_form() -> None:
    config = load("--encode", "http://a:1", "http://b:1/", "--encode", "http://c:1", *PD, "--port", "9",
                  EPD_PROXY_ENCODE_URLS="http://no:1", EPD_PROXY_PORT="8", EPD_PROXY_MAX_BODY_MIB="2")  # fmt: skip
    assert config.topology.encode == ("http://a:1", "http://b:1", "http://c:1")
    assert (config.listen.port, config.limits.body_bytes) == (9, 2 * MIB)
    config = load(EPD_PROXY_PREFILL_DECODE_URLS="http://a:1, http://b:1 http://c:1", EPD_PROXY_PORT="")
    assert config.topology.prefill_decode == ("http://a:1", "http://b:1", "http://c:1")
    assert config.listen.port == 8000


def test_names_of_the_example_proxy() -> None:
    config = load("--encoder-hosts", "e", "::1", "--encoder-ports", "1", "2", "--prefiller-hosts", "p",
                  "--prefiller-ports", "3", "--decoder-hosts", "[::2]", "--decoder-ports", "4", "--max-retries", "5",
                  "--retry-delay", "0.5", "--host", "h", "--metaserver-advertise-url", "http://h:1/")  # fmt: skip
    assert config.topology == Topology(("http://e:1", "http://[::1]:2"), (), ("http://p:3",), ("http://[::2]:4",))
    assert (config.retry.max_attempts, config.retry.delay_s) == (5, 0.5)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), ["no instance answers"]),
        (("--prefill", "http://p:1"), ["belong together"]),
        ((*PD, "--decode", "http://127.0.0.1:1"), ["not both"]),
        ((*PD, "--prefill", "http://p:1"), ["not both"]),
        (SPLIT, ["expected http://host:8001, with this host's name or address as http://d:1 sees it"]),
        ((*SPLIT, "--metaserver-advertise-url", "http://0.0.0.0:8001"), ["address to bind"]),
        ((*SPLIT, "--metaserver-advertise-url", "http://[::]:8001"), ["address to bind"]),
        ((*SPLIT, "--metaserver-advertise-url", "http://localhost:8001"), ["leads http://d:1 to itself"]),
        ((*SPLIT, "--metaserver-advertise-url", "http://127.0.0.2:8001"), ["leads http://d:1 to itself"]),
        ((*SPLIT, "--metaserver-advertise-url", "http://[::1]:8001"), ["leads http://d:1 to itself"]),
        ((*SPLIT, "--metaserver-advertise-url", "proxy:8001"), ["http://host:port"]),
        ((*SPLIT, "--metaserver-advertise-url", "http://p:1", "--metaserver-port", "0"), ["--metaserver-port"]),
        ((*PD, "http://pd:1"), ["given twice"]),
        ((*PD, "--encode", "e:1"), ["http://host:port"]),
        ((*PD, "--encode", "http://e:99999"), ["http://host:port"]),
        ((*PD, "--encode", "http://e:1/v1"), ["leave out path"]),
        ((*PD, "--encode", "http://u:p@e:1"), ["leave out path"]),
        ((*PD, "--encode", "http://0.0.0.0:1"), ["address to bind"]),
        ((*PD, "--encode", "http://[::]:1"), ["address to bind"]),
        ((*PD, "--pd-hosts", "a", "b", "--pd-ports", "1"), ["2 hosts and 1 ports"]),
        ((*PD, "--port", "70000", "--max-retries", "0", "--retry-delay", "-1", "--idle-timeout-s", "0",
          "--health-interval-s", "0", "--health-timeout-s", "nan", "--max-body-mib", "0", "--max-media-items", "0",
          "--log-level", "loud", "--log-format", "xml", "--encode-fallback", "maybe"),
         ["--port", "--idle-timeout-s", "--max-retries", "--retry-delay", "--max-body-mib", "--max-media-items",
          "--health-interval-s", "--health-timeout-s", "--log-level", "--log-format", "--encode-fallback"]),
        ((*PD, "--known-items-ttl-s", "-1", "--store", "nowhere", "--consumers-wait", "maybe"),
         ["--known-items-ttl-s", "--consumers-wait: expected on or off, found maybe", "--store"]),
        ((*PD, "--policy", "best", "--breaker-failures", "-1", "--breaker-open-s", "0", "--max-requests", "0",
          "--max-queued", "-1", "--queue-timeout-s", "0"),
         ["--policy: expected least_loaded, power_of_two, prefix or session, found best", "--breaker-failures",
          "--breaker-open-s", "--max-requests", "--max-queued", "--queue-timeout-s"]),
        ((*SPLIT, "--handshake", "magic", "--bootstrap-port", "0"),
         ["--handshake: expected layerwise, pull or bootstrap, found magic", "--bootstrap-port"]),
        ((*PD, "--max-body-mib", "500"), ["--max-bodies-mib: expected --max-body-mib (500) or more, found 256"]),
        (("--port", "x", "--connect-timeout-s", "soon"), ["--port", "--connect-timeout-s", "no instance"]),
    ],
)  # fmt: skip
def test_every_fault_is_told(argv: tuple[str, ...], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert len(caught.value.faults) == len(expected), caught.value.faults
    for fault, words in zip(caught.value.faults, expected, strict=True):
        assert words in fault


def test_abbreviated_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("--enc", "http://a:1")
    assert "--enc" in capsys.readouterr().err


def test_defect_23_the_address_that_decode_calls() -> None:
    here = ("--prefill", "http://p:1", "--decode", "http://localhost:1", "http://[::1]:2", "http://127.0.0.1:3")
    assert load(*here, "--metaserver-port", "9").metaserver.resolved().advertise_url == "http://127.0.0.1:9"
    given = load(*SPLIT, EPD_PROXY_METASERVER_ADVERTISE_URL="http://proxy:8001/", EPD_PROXY_METASERVER_HOST="::")
    assert given.metaserver == given.metaserver.resolved() == MetaserverConfig("::", 8001, "http://proxy:8001")
    assert load(*PD, "--metaserver-advertise-url", "nonsense").topology.decode == ()  # not used, not judged


def test_each_time_has_a_flag() -> None:
    times = {"connect": 1, "encode": 2, "callback": 3, "prefill": 4, "handover": 5, "release": 6, "first-byte": 7,
             "idle": 8, "body-idle": 9, "write-idle": 10, "drain": 11}  # fmt: skip
    given = [text for name, value in times.items() for text in (f"--{name}-timeout-s", str(value))]
    assert load(*PD, *given).timeouts == Timeouts(*range(1, 12))


def test_only_layerwise_needs_an_address_to_call() -> None:
    for name in ("pull", "bootstrap"):
        assert load(*SPLIT, EPD_PROXY_HANDSHAKE=name).handshake.name == name


def test_the_secret_in_the_names_of_items(tmp_path: Path) -> None:
    assert load(*PD).items.key != load(*PD).items.key
    file = tmp_path / "key"
    file.write_text("a secret of 24 letters.!\n")
    first = load(*PD, "--item-key-file", str(file)).items.key
    assert len(first) == 32
    assert load(*PD, EPD_PROXY_ITEM_KEY_FILE=str(file)).items.key == first
    assert "secret" not in repr(load(*PD, "--item-key-file", str(file)))
    file.write_text("short")
    with pytest.raises(ConfigError, match=r"expected 24 characters or more in .*, found 5; make them with: openssl"):
        load(*PD, "--item-key-file", str(file))
    with pytest.raises(ConfigError, match=r"missing cannot be read: No such file.*; --port"):
        load(*PD, "--item-key-file", str(tmp_path / "missing"), "--port", "70000")


def test_whose_items_they_are_and_where_they_lie() -> None:
    items = load(*PD, "--tenant-headers", "X-Team", "--store", "http://m:1/", "http://s:2").items
    assert (items.tenant_headers, items.store) == (("X-Team",), ("http://m:1", "http://s:2"))
    assert load(*PD, "--tenant-headers", "none").items.tenant_headers == ()


def test_one_version_everywhere() -> None:
    root = Path(__file__).parents[2]
    [version] = re.findall(r"^EPD_VERSION=(.+)$", (root / "docker/versions.env").read_text(), re.MULTILINE)
    [packaged] = re.findall(r'^version = "(.+)"$', (root / "proxy/pyproject.toml").read_text(), re.MULTILINE)
    assert epd_proxy.__version__ == packaged == version
