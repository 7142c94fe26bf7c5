"""The cards' own network: what hccn_tool says of each card that takes part in a transfer."""

from __future__ import annotations

import re
from collections.abc import Iterator

from epd.doctor.finding import Finding, failed, passed, warned
from epd.doctor.subject import Subject

_HCCN_CONF = "/etc/hccn.conf"
_TLS = re.compile(r"tls switch\[(\d)\]")
_NO_LOSS = re.compile(r"\b0(?:\.0+)?% packet loss")
_STATUS = re.compile(r"status:\s*(\S+)")
_GARBAGE = "without it a transfer starts, and the answers are garbage"


def check(subject: Subject) -> Iterator[Finding]:
    """Check the network of the cards of prefill and decode. A5 has no hccn_tool; its files are checked as mounts."""
    cards = sorted(c.id for i in subject.instances if i.role in ("prefill", "decode") for c in i.cards)
    if subject.hardware not in ("a2", "a3") or not cards:
        return
    yield _conf(subject, cards)
    answers = {card: subject.machine.run(_tool(subject), "-i", str(card), "-ip", "-g") for card in cards}
    silent = [card for card, result in answers.items() if not result.ok]
    if silent:
        first = answers[silent[0]]
        said = (first.stderr or first.stdout).strip().splitlines()
        yield failed(
            "network.hccn-tool",
            expected=f"{_tool(subject)} answers for every card of prefill and decode: {_GARBAGE}",
            found=f"cards {_list(silent)}: {said[-1] if said else f'exit code {first.code}'}",
            fix="install the driver's tools, and give the cards addresses: hccn_tool -i <card> -ip -s address …",
        )
        return
    yield passed("network.hccn-tool", f"answers for cards {_list(cards)}")
    yield _links(subject, cards)
    yield _health(subject, cards)
    yield _tls(subject, cards)
    if subject.several_hosts:
        yield _ping(subject, cards)


def _conf(subject: Subject, cards: list[int]) -> Finding:
    text = subject.machine.text(_HCCN_CONF)
    missing = [card for card in cards if f"address_{card}=" not in text]
    if not text.strip() or missing:
        return failed(
            "network.hccn-conf",
            expected=f"{_HCCN_CONF} with an address for each card of prefill and decode: {_GARBAGE}",
            found="it is empty or missing" if not text.strip() else f"no address for cards {_list(missing)}",
            fix="hccn_tool -i <card> -ip -s address <address> netmask <mask>, for every card",
        )
    return passed("network.hccn-conf", f"addresses for cards {_list(cards)}")


def _links(subject: Subject, cards: list[int]) -> Finding:
    states = {card: _status(subject, card, "-link") for card in cards}
    down = [card for card, state in states.items() if state != "UP"]
    if not down:
        return passed("network.link", "UP on every card")
    if len(down) == len(cards) and not subject.several_hosts:
        return passed("network.link", "no card has a link; within one server the transfer does without (HCCS)")
    return failed(
        "network.link",
        expected="UP on every card of prefill and decode"
        + (", as other hosts are reached through it" * subject.several_hosts),
        found=", ".join(f"card {card}: {states[card] or 'unknown'}" for card in down),
        fix="check optics, cables and switch ports; HCCL would end in EI0006 after HCCL_CONNECT_TIMEOUT",
    )


def _health(subject: Subject, cards: list[int]) -> Finding:
    """Check what the cards think of their network; `Init` is a card that was given nothing to probe."""
    states = {card: _status(subject, card, "-net_health") for card in cards}
    bad = [card for card, state in states.items() if state not in ("Success", "Init", "")]
    if not bad:
        return passed("network.health", ", ".join(sorted({state or "unknown" for state in states.values()})))
    make = failed if subject.several_hosts else warned
    return make(
        "network.health",
        expected="Success on every card of prefill and decode",
        found=", ".join(f"card {card}: {states[card]}" for card in bad),
        fix="`hccn_tool -i <card> -netdetect -g` shows what is probed; check route, gateway and switch",
    )


def _tls(subject: Subject, cards: list[int]) -> Finding:
    switches = {}
    for card in cards:
        match = _TLS.search(subject.machine.run(_tool(subject), "-i", str(card), "-tls", "-g").stdout)
        switches[card] = match[1] if match else "?"
    on = [card for card, switch in switches.items() if switch == "1"]
    if on and len(on) < len(cards):
        return failed(
            "network.tls",
            expected="the same TLS switch on every card: one with and one without cannot connect",
            found=f"on: {_list(on)}; off: {_list([card for card in cards if card not in on])}",
            fix="hccn_tool -i <card> -tls -s enable 0, for every card of every host",
        )
    if on and subject.several_hosts:
        return warned(
            "network.tls",
            expected="TLS off, or on with certificates on every host",
            found="on",
            fix="run `make doctor` on the other hosts too: their switch must be the same",
        )
    return passed("network.tls", "on for all cards" if on else "off for all cards")


def _ping(subject: Subject, cards: list[int]) -> Finding:
    """Check that the first card reaches a card of every other host that takes part in a transfer."""
    peers: dict[str, str] = {}
    for instance in subject.plan.instances if subject.plan else ():
        if instance.host != subject.host and instance.role in ("prefill", "decode"):
            peers.setdefault(instance.host.name, next((card.address for card in instance.cards if card.address), ""))
    lost = []
    for name, address in peers.items():
        answer = subject.machine.run(_tool(subject), "-i", str(cards[0]), "-ping", "-g", "address", address)
        if address and not (answer.ok and _NO_LOSS.search(answer.stdout)):
            lost.append(f"{name} {address}")
    unknown = [name for name, address in peers.items() if not address]
    if lost:
        return failed(
            "network.ping",
            expected=f"card {cards[0]} reaches a card of every other host without loss",
            found=f"lost: {', '.join(lost)}",
            fix="check address, mask and gateway (hccn_tool -i <card> -ip -g, -gateway -g) and the switch in between",
        )
    if unknown:
        return warned(
            "network.ping",
            expected="the cards' addresses of every host in the inventory",
            found=f"none for {', '.join(unknown)}",
            fix="run `make describe` on those hosts and put what it prints into the inventory",
        )
    return passed("network.ping", f"card {cards[0]} reaches {', '.join(peers) or 'no other host that it needs'}")


def _status(subject: Subject, card: int, question: str) -> str:
    match = _STATUS.search(subject.machine.run(_tool(subject), "-i", str(card), question, "-g").stdout)
    return match[1] if match else ""


def _tool(subject: Subject) -> str:
    driver = subject.settings.planning.get("EPD_ASCEND_DRIVER") or "/usr/local/Ascend/driver"
    return f"{driver}/tools/hccn_tool"


def _list(cards: list[int]) -> str:
    return ", ".join(map(str, cards))
