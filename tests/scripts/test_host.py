"""The distribution, read from files made up for the test."""

import pytest

from epd import host

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
