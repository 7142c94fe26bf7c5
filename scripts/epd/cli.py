"""The commands: each one puts the steps of the other modules in order."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from epd import (
    banner,
    base_image,
    clustering,
    command,
    container_user,
    delivery,
    dotenv,
    fetching,
    images,
    inspection,
    planning,
    services,
    settings,
    stack,
    survey,
    venv,
)
from epd.context import ROOT, Context, context
from epd.errors import StepError
from epd.provision import prepare_engine, provide_images

_UP_TIMEOUT_S, _NPU_UP_TIMEOUT_S = 900.0, 2400.0
"""On NPUs vLLM itself gives an engine half an hour to load."""
_DOCKER_FIX = "`make up` installs Docker"
_TESTED = ("connector", "docker", "proxy", "scripts", "tests", "pyproject.toml")
"""What the tests in the images read."""


def main(argv: list[str]) -> int:
    """Run one command; return its exit code. Errors that we foresee are printed without a traceback."""
    parser = argparse.ArgumentParser(prog="epd", description=__doc__, allow_abbrev=False)
    chosen = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        chosen.add_parser(name, help=text, usage=f"epd {name} [words passed on to the command]")
    # Not argparse's for what follows the command: words such as `-k name` are pytest's, not ours.
    arguments, words = parser.parse_args(argv[:1]), argv[1:]
    os.chdir(ROOT)
    try:
        for sentence in settings.describe_unknown(ROOT, os.environ):
            print(f"Warning: {sentence}", file=sys.stderr)
        return COMMANDS[arguments.command][0](context(), words) or 0
    except StepError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; `make up` goes on from here, `make down` stops what runs.", file=sys.stderr)
        return 128 + signal.SIGINT


def up(it: Context, _: list[str]) -> int:
    """Do everything from a fresh machine to an answering stack."""
    profile = planning.choose_hardware(it.settings.hardware, it.machine)
    print(f"Host: {it.distribution.pretty_name}; {survey.sentence(it.machine, profile)}", flush=True)
    planning.check_model(it.settings.planning, profile)  # before anything is installed for nothing
    prepare_engine(it)
    planned = planning.make(it.settings, profile, it.machine)
    print(planning.table(planned.plan), flush=True)
    inspection.check_host(it, planned)
    tags = provide_images(it, images.served(profile, it.settings), pull=it.settings.pull)
    running = write_dotenv(it, planned, tags)
    print(f"Starting {it.settings.topology} …", flush=True)
    stack.up(running, timeout_s=up_timeout_s(it.settings, profile))
    images.remove_replaced()  # only now does no container use them any more
    inspection.look_inside(it, planned)
    if planned.host != planned.plan.head:
        print(banner.render_member(it.settings.topology, planned.host.name, planned.plan.head.name))
        return 0
    # With keys the proxy does not tell a stranger what it serves.
    model = banner.model_name(running.address) or running.environment.get("EPD_SERVED_MODEL_NAME", "")
    print(banner.render(running.address, model, it.settings.topology, banner.options(running.environment)))
    return 0


def up_timeout_s(chosen: settings.Settings, profile: str) -> float:
    """Return how long the services may take to get healthy: as chosen, else what the hardware profile needs."""
    return chosen.up_timeout_s or (_UP_TIMEOUT_S if profile == "cpu" else _NPU_UP_TIMEOUT_S)


def write_dotenv(it: Context, planned: planning.Planned, tags: dict[str, str]) -> stack.Stack:
    """Write the plan's files and `.env`, and return the stack they describe."""
    for path in planning.write(ROOT, planned):
        print(f"{path.relative_to(ROOT)}: written", flush=True)
    entries = settings.entries(
        it.settings,
        compose_file=":".join(planned.compose_files),
        planned=planned.variables,
        images=images.variables(tags),
    )
    settings.check_set_once(it.settings, entries, os.environ)
    path = ROOT / ".env"
    changed = dotenv.write(path, entries)
    print(f".env: {'written' if changed else 'unchanged'}", flush=True)
    return current_stack()


def current_stack() -> stack.Stack:
    """Return the stack that `.env` describes.

    Raises:
        StepError: `.env` lacks what `make up` writes.
    """
    file = dotenv.read(ROOT / ".env")
    values = {**file.managed, **file.own}
    absent = [name for name in ("COMPOSE_PROJECT_NAME", "COMPOSE_FILE", "EPD_PROXY_PORT") if not values.get(name)]
    if absent:
        raise StepError(
            "there is no stack yet", expected=".env as `make up` writes it", found=f"no {absent[0]}", fix="make up"
        )
    return stack.Stack(ROOT, values)


def build(it: Context, words: list[str]) -> int:
    """Build the images of this machine's hardware profile (or of EPD_HARDWARE), or the bake targets named."""
    prepare_engine(it)
    hardware = planning.choose_hardware(it.settings.hardware, it.machine)
    provide_images(it, tuple(words) or images.served(hardware, it.settings), pull=False)
    return 0


def down(_: Context, __: list[str]) -> int:
    """Stop the stack; images, volumes and `.env` stay."""
    stack.down(current_stack(), volumes=False)
    return 0


def clean(it: Context, _: list[str]) -> int:
    """Remove what `make up` made, and say what."""
    tags = images.tags(ROOT, (*images.SERVED, *images.TESTS.values()), it.bake)
    compat = [images.tags(ROOT, images.COMPAT, images.compat(it.bake, vllm)) for vllm in images.compat_versions(ROOT)]
    managed = dotenv.read(ROOT / ".env").managed
    started = [managed[name] for name in ("EPD_IMAGE", "EPD_PROXY_IMAGE") if name in managed]
    made = [name for tags_ in (tags, *compat) for name in tags_.values()]
    names = dict.fromkeys([*made, *started, f"ascend-epd-base:{it.versions['DEBIAN_SUITE']}"])
    there = [name for name in names if base_image.is_there(name)]
    print("Removing: containers, network and volumes of the stack; its part of .env; build/ (logs);")
    print(f"  images: {', '.join(there) or 'none'}, and older ones of ours without a name", flush=True)
    if managed:
        stack.down(current_stack(), volumes=True)
    if there:
        command.show(
            "docker", "image", "rm", "--force", *there, timeout_s=300, fix="`docker ps -a` shows who uses them"
        )
    images.remove_replaced()
    dotenv.remove_block(ROOT / ".env")
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    print(
        "Left alone: Docker and its build cache (`docker builder prune`), pulled base images, the virtual environment."
    )
    return 0


def logs(_: Context, words: list[str]) -> int:
    """Follow the logs of all services, or of those named, until interrupted."""
    running = current_stack()
    return command.attach(
        *running.compose("logs", "--follow", "--tail", "100", *words), env=running.environment, fix=_DOCKER_FIX
    )


def status(_: Context, __: list[str]) -> int:
    """Show each service and whether the proxy is ready; the exit code says whether all is well."""
    running = current_stack()
    states = services.complete(stack.expected_services(running), stack.inspect(running))
    for service in states:
        detail = services.hint(service) if service.failed else ""
        print(f"  {service.name:<18} {service.phase:<11} restarts {service.restarts}  {detail}".rstrip())
    well = all(service.ready for service in states)
    if services.PROXY not in {service.name for service in states}:
        print("  the proxy is on another host: `make status` there tells whether requests are answered")
        return 0 if well else 1
    code, body = stack.fetch(f"{running.address}/ready")
    print(f"  {running.address}/ready: {code or 'no answer'}  {body.strip()[:400]}")
    return 0 if code == 200 and well else 1


def smoke(it: Context, words: list[str]) -> int:
    """Run the live tests; they start a stack of their own beside the one that `make up` started."""
    return _test_live(it, "tests/smoke", words)


def test_faults(it: Context, words: list[str]) -> int:
    """Run the live tests of what befalls the store of embeddings."""
    return _test_live(it, "tests/faults", words)


def bench_proxy(it: Context, words: list[str]) -> int:
    """Compare the proxy of the image with vllm-router."""
    prepare_engine(it)
    return _attach(provide_images(it, ("proxy",), pull=it.settings.pull), "python", "tests/bench/compare.py", *words)


def bench_ec(it: Context, words: list[str]) -> int:
    """Measure how an embedding gets from process to process."""
    return _attach(_served(it), "python", "tests/bench/ec.py", *words)


def bench_turns(it: Context, words: list[str]) -> int:
    """Measure the time to the first token when a picture is asked about again."""
    return _attach(_served(it), "python", "tests/bench/turns.py", *words)


def _test_live(it: Context, folder: str, words: list[str]) -> int:
    return _attach(_served(it), "pytest", folder, *words)


def _served(it: Context) -> dict[str, str]:
    prepare_engine(it)
    return provide_images(it, images.SERVED, pull=it.settings.pull)


def _attach(tags: Mapping[str, str], program: str, *words: str) -> int:
    environment = {**images.variables(tags), "PYTHONPATH": "scripts:tests"}
    argv = (str(venv.program(ROOT, program)), *words)
    return command.attach(*argv, env=environment, fix="remove .venv, then `make venv`")


def test_connector(it: Context, words: list[str]) -> int:
    """Run the connector's tests in the image that serves, where vLLM and Mooncake are."""
    return _test_in_image(it, "connector", words)


def test_proxy(it: Context, words: list[str]) -> int:
    """Run the proxy's tests in the image that serves, where it is compiled."""
    return _test_in_image(it, "proxy", words)


def _test_in_image(it: Context, package: str, words: list[str]) -> int:
    require_readable_checkout()
    prepare_engine(it)
    target = images.TESTS[package]
    tag = provide_images(it, (target,), pull=False)[target]
    return _run_in_image(tag, f"tests/{package}", *words)


def test_compat(it: Context, words: list[str]) -> int:
    """Run the connector's contract tests and the live tests of 1E1PD with another vLLM, the first of the words."""
    there = images.compat_versions(ROOT)
    if words[:1] == [it.versions["VLLM_VERSION"]]:
        test, cpu = images.TESTS["connector"], "cpu"
    elif words and words[0] in there:
        cpu, test = images.COMPAT
        it = dataclasses.replace(it, versions=images.compat(it.versions, words[0]))
    else:
        raise StepError(
            "there is no image for that vLLM",
            expected=f"VLLM= one of {', '.join((*there, it.versions['VLLM_VERSION']))}",
            found=f"VLLM={' '.join(words[:1])}",
            fix="make test-compat VLLM=…; docker/cpu/README.md tells how to add a version",
        )
    require_readable_checkout()
    prepare_engine(it)
    tags = provide_images(it, (cpu, test, "proxy"), pull=False)
    code = _run_in_image(tags[test], "tests/connector/test_contract.py")
    served = {"cpu": tags[cpu], "proxy": tags["proxy"]}
    return code or _attach(served, "pytest", "tests/smoke/test_1e1pd.py", *words[1:])


def _run_in_image(tag: str, *words: str) -> int:
    argv = ["docker", "run", "--rm", "--shm-size=1g", f"--volume={ROOT}:/src:ro", "--workdir=/src"]
    if Path("/proc/sys/net/ipv6").exists():  # some kernels are started without
        argv += ["--sysctl=net.ipv6.conf.all.disable_ipv6=0"]  # for its loopback
    argv += ["--env=HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis", tag]
    argv += ["-p", "no:cacheprovider", *words]
    return command.attach(*argv, fix=_DOCKER_FIX)


def require_readable_checkout(root: Path = ROOT) -> None:
    """Check that the containers of the tests can read it: a umask of 077 hides it.

    Raises:
        StepError: it cannot.
    """
    parts = [root / name for name in _TESTED if (root / name).exists()]
    hidden = [root] if not container_user.may_read(root) else []
    hidden += [path for part in parts for path in container_user.find_unreadable(part)]
    if hidden:
        raise StepError(
            "the test container cannot read this folder",
            expected=f"files that uid {container_user.UID}, the user in the containers, may read",
            found=f"{hidden[0]} {container_user.describe_mode(hidden[0])}",
            fix=f"chmod o+rx '{root}' && chmod -R o+rX {' '.join(str(part) for part in parts)}",
        )


def check_ascend_image(it: Context, words: list[str]) -> int:
    """Build the Ascend image on a stand-in for CANN's."""
    prepare_engine(it)
    base = base_image.obtain(it.settings, it.versions["DEBIAN_SUITE"], it.distribution, root=it.root_user)
    environment = images.bake_environment(it.settings, it.versions, base=base, inputs="check")
    environment["CHECK_BASE_IMAGE"] = base
    pytest = str(venv.program(ROOT, "pytest"))
    return command.attach(pytest, "tests/images", *words, env=environment, fix="remove .venv, then `make venv`")


def make_venv(it: Context, _: list[str]) -> int:
    """Make the virtual environment of the tests, unless it is up to date."""
    venv.provide(ROOT, it.distribution, root_user=it.root_user, no_install=it.settings.no_install)
    return 0


COMMANDS: dict[str, tuple[Callable[[Context, list[str]], int], str]] = {
    "up": (up, "install what is missing, build, start, wait"),
    "down": (down, "stop the stack"),
    "clean": (clean, "remove everything that up made"),
    "doctor": (inspection.doctor, "check this machine, change nothing"),
    "plan": (inspection.plan, "show which instance gets which cards and ports, and write the files"),
    "fetch-model": (fetching.fetch, "fetch a model's files from a hub"),
    "kubernetes": (clustering.write, "write the stack as Kubernetes objects"),
    "describe": (inspection.describe, "print this machine as an inventory for plan"),
    "build": (build, "build the images"),
    "push": (delivery.push, "build, push to a registry, write images.lock"),
    "publish": (delivery.publish, "build release images straight into a registry"),
    "bundle": (delivery.bundle, "write a folder for a host without a network"),
    "load": (delivery.load, "take the images of such a folder"),
    "logs": (logs, "follow the logs"),
    "status": (status, "show how the stack is"),
    "smoke": (smoke, "live tests in containers"),
    "test-faults": (test_faults, "live tests of what befalls the store of embeddings"),
    "bench-proxy": (bench_proxy, "the proxy beside vllm-router"),
    "bench-ec": (bench_ec, "how an embedding gets from process to process"),
    "bench-turns": (bench_turns, "time to the first token when a picture is asked about again"),
    "test-connector": (test_connector, "the connector's tests, in the image"),
    "test-proxy": (test_proxy, "the proxy's tests, in the image, where it is compiled"),
    "test-compat": (test_compat, "the tests that another version of vLLM has to pass"),
    "check-ascend-image": (check_ascend_image, "build the Ascend image on a stand-in for CANN's"),
    "venv": (make_venv, "make the virtual environment of the tests"),
}
