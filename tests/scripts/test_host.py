"""Distribution and NPUs, read from files made up for the test."""

import pytest

from epd import host
from epd.errors import StepError

DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n'
UBUNTU = 'PRETTY_NAME="Ubuntu 24.04.1 LTS"\nID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n'
MINT = "ID=linuxmint\nID_LIKE=\"ubuntu debian\"\nVERSION_CODENAME=wilma\nPRETTY_NAME='Linux Mint 22'\n"
FEDORA = 'ID=fedora\nVERSION_ID=41\nPRETTY_NAME="Fedora Linux 41"\n# comment = yes\n'


@pytest.mark.parametrize(
    ("text", "family", "codename", "pretty"),
    [
        (DEBIAN, "debian", "bookworm", "Debian GNU/Linux 12 (bookworm)"),
        (UBUNTU, "ubuntu", "noble", "Ubuntu 24.04.1 LTS"),
        (MINT, "ubuntu", "wilma", "Linux Mint 22"),
        (FEDORA, "", "", "Fedora Linux 41"),
        ("", "", "", "unknown Linux"),
    ],
)
def test_os_release(text, family, codename, pretty):
    found = host.parse_os_release(text)
    assert (found.family, found.codename, found.pretty_name) == (family, codename, pretty)


def test_a_missing_os_release_is_no_error(tmp_path):
    assert host.distribution(tmp_path / "none").family == ""


def make_nodes(dev, *names):
    for name in names:
        (dev / name).touch()


def test_no_npu_is_the_cpu_profile(tmp_path):
    make_nodes(tmp_path, "null", "davincissimo")
    found = host.detect_hardware("", available=("cpu",), dev=tmp_path)
    assert found == host.Hardware(profile="cpu", cards=(), manager=False)
    assert "no NPU found" in host.describe_hardware(found)


def test_npus_are_counted_in_numeric_order_and_left_alone_by_the_cpu_profile(tmp_path):
    make_nodes(tmp_path, "davinci10", "davinci2", "davinci_manager", "devmm_svm")
    found = host.detect_hardware("", available=("cpu",), dev=tmp_path)
    assert found.cards == ("/dev/davinci2", "/dev/davinci10")
    assert found.manager
    assert found.profile == "cpu"
    assert "2 Ascend NPU node(s) found" in host.describe_hardware(found)
    assert "leaves them alone" in host.describe_hardware(found)


def test_hardware_can_be_chosen_among_the_profiles_there_are(tmp_path):
    assert host.detect_hardware("A2", available=("a2", "cpu"), dev=tmp_path).profile == "a2"
    with pytest.raises(StepError, match=r"expected: one of: cpu\n.*EPD_HARDWARE=a3\n.*fix:"):
        host.detect_hardware("a3", available=("cpu",), dev=tmp_path)
