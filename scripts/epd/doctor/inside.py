"""The running containers, from the inside: what the engine was told and a container got can differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from epd.doctor.finding import Finding, failed, passed, warned
from epd.doctor.subject import Subject
from epd.plan import compose
from epd.plan.placing import Instance

_NODES = "ls /dev"
_CARD = re.compile(r"^davinci\d+$", re.MULTILINE)
_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()"


def check(subject: Subject) -> Iterator[Finding]:
    """Check the instances of this host that run; nothing before a start, as that may well replace them."""
    if subject.will_start:
        return
    running = subject.running
    instances = [instance for instance in subject.instances if instance.name in running]
    if subject.npu and instances:
        yield _cards(subject, running, instances)
    decoding = [instance for instance in instances if instance.role == "decode"]
    if decoding:
        yield _metaserver(subject, running, decoding)


def _cards(subject: Subject, running: Mapping[str, str], instances: list[Instance]) -> Finding:
    """Check that a container sees as many cards as it was given; a privileged one (A5) sees all."""
    wrong = []
    for instance in instances:
        listed = subject.machine.run("docker", "exec", running[instance.name], "sh", "-c", _NODES)
        found, wanted = len(_CARD.findall(listed.stdout)), len(instance.cards)
        if found < wanted or (found > wanted and subject.hardware != "a5"):
            wrong.append(f"{instance.name}: {found} of {wanted}")
    if wrong:
        return failed(
            "inside.cards",
            expected="each container sees the cards that the plan gave it (/dev/davinci<n>)",
            found="; ".join(wrong),
            fix="`make down` and `make up` with the files of `make plan`; look for devices in an own Compose file",
        )
    return passed("inside.cards", ", ".join(f"{instance.name}: {len(instance.cards)}" for instance in instances))


def _metaserver(subject: Subject, running: Mapping[str, str], decoding: list[Instance]) -> Finding:
    """Check that decode instances reach the proxy's metaserver: a request whose callback is lost ends in a time-out."""
    if subject.plan is None:
        return passed("inside.metaserver", "no plan")
    host, port = compose.metaserver(subject.plan)
    lost, refused = {}, False
    for instance in decoding:
        argv = ["exec", running[instance.name], "python3", "-c", _CONNECT, host, str(port)]
        answer = subject.machine.run("docker", *argv)
        if not answer.ok:
            refused |= answer.code is not None
            lost[instance.name] = (answer.stderr or answer.stdout or "no answer in time").strip().splitlines()[-1]
    if not lost:
        return passed("inside.metaserver", f"{', '.join(i.name for i in decoding)} reach {host}:{port}")
    # While the proxy starts nobody listens there yet, and a busy machine may just be slow.
    make = failed if refused and (subject.host != subject.plan.head or "proxy" in running) else warned
    return make(
        "inside.metaserver",
        expected=f"every decode instance can connect to {host}:{port}, where the proxy waits for callbacks",
        found="; ".join(f"{name}: {why}" for name, why in lost.items()),
        fix="is the proxy up (`make status`), and is the port open between the hosts (firewall)?",
    )
