"""Starting the Docker engine, with a dockerd and a docker client made up for the test."""

import os
from pathlib import Path

import pytest

from epd import engine
from epd.errors import StepError

# The client answers as soon as the engine's "socket" is there.
CLIENT = 'test -e "$SOCKET" && echo id || { echo "Cannot connect to the Docker daemon" >&2; exit 1; }'


@pytest.fixture
def daemon(programs, tmp_path, monkeypatch):
    monkeypatch.setenv("SOCKET", str(tmp_path / "socket"))
    programs.add("docker", CLIENT)
    return engine.Daemon(pid_files={tmp_path / "docker.pid": "dockerd"}, log=tmp_path / "log" / "dockerd.log")


def ensure(daemon, environ=(), **changes):
    options = {"root": True, "systemd": False} | changes
    engine.ensure_running(dict(environ), daemon=daemon, **options)


def called(programs, name):
    return [call for call in programs.calls if call.split()[0] == name]


def test_an_engine_that_answers_is_left_alone(programs, daemon, tmp_path):
    (tmp_path / "socket").touch()
    ensure(daemon, root=False)
    assert called(programs, "dockerd") == []


def test_by_hand_the_engine_is_started_and_waited_for(programs, daemon, tmp_path):
    (tmp_path / "docker.pid").write_text(str(os.getpid()))  # a pid that another program has by now
    programs.add("dockerd", 'echo starting; sleep 0.3; touch "$SOCKET"')
    ensure(daemon)
    assert len(called(programs, "dockerd")) == 1
    assert not (tmp_path / "docker.pid").exists()
    assert "starting" in daemon.log.read_text()


def test_with_systemd_the_engine_is_its_service(programs, daemon):
    programs.add("systemctl", 'touch "$SOCKET"')
    ensure(daemon, systemd=True)
    assert called(programs, "systemctl") == ["systemctl enable --now docker.service"]
    assert called(programs, "dockerd") == []


def test_an_engine_that_dies_is_reported_with_the_end_of_its_log(programs, daemon):
    programs.add("dockerd", "echo 'failed to mount overlay'; exit 1")
    with pytest.raises(StepError, match=r"exit code 1[\s\S]*failed to mount overlay"):
        ensure(daemon)


def test_an_engine_that_never_answers_is_not_waited_for_without_end(programs, daemon, monkeypatch):
    monkeypatch.setattr(engine, "START_TIMEOUT_S", 0.5)
    programs.add("dockerd", "exec sleep 5")
    with pytest.raises(StepError, match="no answer"):
        ensure(daemon)


@pytest.mark.parametrize(
    ("environ", "root", "message"),
    [({"DOCKER_HOST": "tcp://far:2375"}, True, "tcp://far:2375"), ({}, False, "as root")],
)
def test_what_is_not_ours_is_not_started(programs, daemon, environ, root, message):
    with pytest.raises(StepError, match=message):
        ensure(daemon, environ, root=root)
    assert called(programs, "dockerd") == []


def test_a_user_outside_the_docker_group_is_told_so(programs, daemon):
    programs.add("docker", "echo 'permission denied while trying to connect to the socket' >&2; exit 1")
    with pytest.raises(StepError, match="usermod -aG docker"):
        ensure(daemon, root=False)


@pytest.mark.parametrize("text", ["999999999", "not a number", "0", ""])
def test_a_stale_pid_file_is_removed(tmp_path, text):
    path = tmp_path / "docker.pid"
    path.write_text(text)
    assert engine.remove_stale_pid_file(path, "dockerd")
    assert not path.exists()
    assert not engine.remove_stale_pid_file(path, "dockerd")


def test_the_pid_file_of_a_living_engine_stays(tmp_path):
    path = tmp_path / "docker.pid"
    path.write_text(f"{os.getpid()}\n")
    assert not engine.remove_stale_pid_file(path, Path("/proc/self/comm").read_text().strip())
    assert path.exists()
