"""What a value may look like, and what is said about one that may not."""

import ipaddress

import pytest

from epd import values
from epd.errors import StepError


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("64m", 64 << 20), ("6g", 6 << 30), ("1.5GiB", 3 << 29), ("2 gb", 2 << 30), ("512K", 512 << 10)],
)
def test_sizes_are_read_as_docker_reads_them(text, size):
    assert values.size_bytes("EPD_MEMORY_LIMIT", text) == size


@pytest.mark.parametrize("text", ["six", "6x", "-6g", "6 g b", "g", "6g 7g"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(StepError, match=r"EPD_MEMORY_LIMIT is not usable[\s\S]*512m, 6g"):
        values.check_all({"EPD_MEMORY_LIMIT": text})


def test_no_limit_and_a_default_are_fine():
    values.check_all({"EPD_MEMORY_LIMIT": "0", "EPD_MAX_MODEL_LEN": "", "EPD_MAX_NUM_SEQS": "1"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("EPD_MAX_MODEL_LEN", "0"),
        ("EPD_MAX_MODEL_LEN", "2_048"),
        ("EPD_MAX_NUM_SEQS", "-1"),
        ("EPD_STORE_SIZE_MB", "8"),
        ("EPD_STORE_SIZE_MB", "²"),
        ("EPD_CPU_KV_CACHE_GIB", "1.5"),
        ("EPD_EXPERT_PARALLEL", "yep"),
        ("EPD_PROXY_MEMORY_LIMIT", "2"),
    ],
)
def test_what_the_stack_could_not_use_is_refused_by_name(name, text):
    with pytest.raises(StepError, match=f"{name} is not usable") as caught:
        values.check_all({name: text})
    assert f"{name}={text}" in caught.value.found


def test_the_pool_must_fit_into_its_container():
    values.check_store(512, "2g")
    values.check_store(1920, "2g")
    values.check_store(100_000, "0")
    with pytest.raises(StepError) as caught:
        values.check_store(4096, "2g")
    assert caught.value.found == "4096 + 128 = 4224 MiB; EPD_STORE_MEMORY_LIMIT=2g is 2048 MiB"
    assert "EPD_STORE_SIZE_MB" in caught.value.expected
    assert "EPD_STORE_MEMORY_LIMIT=4224m" in caught.value.fix


@pytest.mark.parametrize("text", ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"])
def test_addresses(text):
    assert values.address(text) == ipaddress.ip_address(text.strip("[]"))


@pytest.mark.parametrize(
    ("text", "fix"), [("::1", "'[::1]'"), ("localhost", "127.0.0.1"), ("[127.0.0.1]", "127.0.0.1"), ("10.0.0", "127.")]
)
def test_what_compose_could_not_bind_is_refused(text, fix):
    with pytest.raises(StepError, match="EPD_PROXY_BIND is not usable") as caught:
        values.address(text)
    assert fix in caught.value.fix


def test_the_prefix_of_names_has_its_slash_and_no_scheme():
    assert values.registry("") == ""
    assert values.registry("registry.example:5000/team") == values.registry("registry.example:5000/team/")
    assert values.registry("registry.example") == "registry.example/"
    for text in ("https://registry.example/team", "registry.example/Team", "registry.example/a image"):
        with pytest.raises(StepError, match="REGISTRY is not usable"):
            values.registry(text)
