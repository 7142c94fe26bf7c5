"""Which packages a machine gets, and that nothing is installed unasked."""

from dataclasses import replace

import pytest

from epd import host, needs
from epd.errors import StepError
from epd.needs import Inventory

MINIMUM = {"MIN_DOCKER_ENGINE": "20.10", "MIN_COMPOSE": "2.24", "MIN_BUILDX": "0.10"}
BOOKWORM = host.parse_os_release("ID=debian\nVERSION_CODENAME=bookworm\nPRETTY_NAME=Debian12")
TRIXIE = host.parse_os_release("ID=debian\nVERSION_CODENAME=trixie\nPRETTY_NAME=Debian13")
NOBLE = host.parse_os_release("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\nPRETTY_NAME=Ubuntu")
FEDORA = host.parse_os_release("ID=fedora\nPRETTY_NAME=Fedora")
BARE = Inventory(client="", engine_installed=False, engine="", compose="", buildx="", apparmor_lacks_parser=False)
FULL = Inventory(
    client="Docker version 28.2.2",
    engine_installed=True,
    engine="20.10.24+dfsg1",
    compose="2.26.1-4",
    buildx="github.com/docker/buildx 0.13.1",
    apparmor_lacks_parser=False,
)


def packages(inventory, distribution):
    return [(need.package, need.suite) for need in needs.find_missing(inventory, MINIMUM, distribution)]


@pytest.mark.parametrize(
    ("inventory", "distribution", "expected"),
    [
        (BARE, BOOKWORM, [("docker.io", ""), ("docker-compose", "trixie"), ("docker-buildx", "trixie")]),
        (BARE, TRIXIE, [("docker.io", ""), ("docker-cli", ""), ("docker-compose", ""), ("docker-buildx", "")]),
        (BARE, NOBLE, [("docker.io", ""), ("docker-compose-v2", ""), ("docker-buildx", "")]),
        (FULL, BOOKWORM, []),
        (FULL, FEDORA, []),
        (replace(FULL, compose="", buildx=""), BOOKWORM, [("docker-compose", "trixie"), ("docker-buildx", "trixie")]),
        (replace(FULL, compose="1.29.2"), NOBLE, [("docker-compose-v2", "")]),
        (replace(FULL, engine=""), BOOKWORM, []),  # installed and not running: started, not installed
        (replace(FULL, engine_installed=False), BOOKWORM, []),  # an engine elsewhere answers
        (replace(FULL, apparmor_lacks_parser=True), NOBLE, [("apparmor", "")]),
    ],
)
def test_find_missing(inventory, distribution, expected):
    assert packages(inventory, distribution) == expected


def test_take_inventory_asks_the_programs(programs):
    programs.add(
        "docker",
        'case "$*" in "--version") echo Docker version 28.2.2;; "compose version --short") echo 2.26.1;; '
        '*) echo "docker: not a docker command" >&2; exit 1;; esac',
    )
    found = needs.take_inventory()
    assert (found.client, found.compose, found.buildx, found.engine) == ("Docker version 28.2.2", "2.26.1", "", "")
    assert found.engine_installed


def provide(missing, distribution, **changes):
    options = {"root": True, "no_install": False, "mirror": ""} | changes
    needs.provide(missing, distribution, **options)


def test_nothing_missing_calls_nothing(programs, capsys):
    provide([], BOOKWORM)
    assert programs.calls == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("distribution", "changes", "message"),
    [
        (BOOKWORM, {"no_install": True}, "EPD_NO_INSTALL"),
        (BOOKWORM, {"root": False}, "needs root"),
        (FEDORA, {}, "expected: Debian or Ubuntu"),
    ],
)
def test_what_is_missing_is_reported_and_not_installed(programs, capsys, distribution, changes, message):
    missing = needs.find_missing(BARE, MINIMUM, distribution)
    with pytest.raises(StepError, match=message):
        provide(missing, distribution, **changes)
    assert programs.calls == []
    assert "docker.io" in capsys.readouterr().out


def test_installing_is_announced_before_the_first_package(programs, capfd):
    programs.add("apt-get", "echo APT")
    provide(needs.find_missing(BARE, MINIMUM, NOBLE), NOBLE)
    out = capfd.readouterr().out
    assert out.index("docker-compose-v2") < out.index("APT")
    assert programs.calls[-1].endswith("docker-buildx docker-compose-v2 docker.io")


def test_an_old_plugin_that_hides_the_new_one_is_named():
    with pytest.raises(StepError, match=r"Compose plug-in[\s\S]*cli-plugins"):
        needs.check_provided(replace(FULL, compose="2.3.0"), MINIMUM, BOOKWORM)
    needs.check_provided(FULL, MINIMUM, BOOKWORM)


def test_an_engine_that_is_too_old_is_refused():
    with pytest.raises(StepError, match=r"20.10 or newer\n.*19.03"):
        needs.check_engine_version(replace(FULL, engine="19.03.1"), MINIMUM)
    needs.check_engine_version(FULL, MINIMUM)
