"""The NPU driver and the cards: nodes, libraries, versions, health, who uses them."""

from __future__ import annotations

from collections.abc import Iterator

from epd import npu_smi, survey, versions
from epd.doctor.finding import Finding, failed, passed, warned
from epd.doctor.subject import Subject

_MANAGERS = {
    "a2": ("davinci_manager", "devmm_svm", "hisi_hdc"),
    "a3": ("davinci_manager", "devmm_svm", "hisi_hdc"),
    "a5": ("davinci_manager", "hisi_hdc", "ummu", "uburma"),
}
_REINSTALL = "install the Ascend HDK driver and firmware for this server, reboot, and check with `npu-smi info`"


def check(subject: Subject) -> Iterator[Finding]:
    """Check the driver and the cards; nothing on the CPU profile."""
    if not subject.npu:
        return
    yield _nodes(subject)
    yield from _npu_smi(subject)
    yield _version(subject)
    yield _library(subject)
    yield _install_path(subject)
    yield _users(subject)


def _nodes(subject: Subject) -> Finding:
    cards = subject.cards or tuple(survey.card_nodes(subject.machine))
    wanted = [f"/dev/{name}" for name in _MANAGERS[subject.hardware]] + [f"/dev/davinci{n}" for n in cards]
    missing = [name for name in wanted if not subject.machine.exists(name)]
    if missing or not cards:
        found = f"missing: {', '.join(missing)}" if missing else "no card (/dev/davinci<n>)"
        return failed("driver.nodes", expected=", ".join(wanted), found=found, fix=_REINSTALL)
    return passed("driver.nodes", f"{len(cards)} card(s) and the driver's own nodes")


def _npu_smi(subject: Subject) -> Iterator[Finding]:
    result = subject.machine.run("npu-smi", "info")
    chips = survey.chips(subject.machine)
    if not chips:
        said = (result.stderr or result.stdout).strip().splitlines()
        ended = "no answer in time" if result.code is None else f"exit code {result.code}"
        found = f"{ended}: {said[-1]}" if said else ended
        yield failed("driver.npu-smi", expected="a table of the cards from `npu-smi info`", found=found, fix=_REINSTALL)
        return
    yield passed("driver.npu-smi", f"answers, version {npu_smi.version(result.stdout) or 'unknown'}")
    kind, names = npu_smi.profile(chips), ", ".join(sorted({chip.name for chip in chips}))
    if kind != subject.hardware:
        yield failed(
            "driver.soc",
            expected=f"chips of the profile {subject.hardware}: an image is built for one kind of chip",
            found=f"{names}, which is {kind or 'none of our profiles'}",
            fix=f"leave out EPD_HARDWARE, or EPD_HARDWARE={kind}" if kind else "use the CPU profile: EPD_HARDWARE=cpu",
        )
    else:
        yield passed("driver.soc", f"{len(chips)} x {names}")
    ill = [f"card {c.physical}: {c.health}" for c in chips if c.physical in subject.cards and c.health != "OK"]
    if ill:
        yield failed(
            "driver.health",
            expected="OK for every card of the plan",
            found=", ".join(ill),
            fix="`npu-smi info -t health -i <module>` says why; leave the card out with EPD_CARDS meanwhile",
        )
    else:
        yield passed("driver.health", "every card is OK")


def _version(subject: Subject) -> Finding:
    path = f"{_driver(subject)}/version.info"
    lines = dict(line.split("=", 1) for line in subject.machine.text(path).splitlines() if "=" in line)
    found, minimum = lines.get("Version", ""), subject.versions["MIN_ASCEND_DRIVER"]
    if not found:
        return failed("driver.version", expected=f"{path} with a line Version=", found="none", fix=_REINSTALL)
    cann = subject.versions["CANN_VERSION"]
    if not versions.at_least(found, minimum):
        return warned(
            "driver.version",
            expected=f"{minimum} or newer, with which CANN {cann} was tested",
            found=found,
            fix="upgrade the Ascend HDK driver and firmware; older ones may lack symbols that CANN calls",
        )
    return passed("driver.version", f"{found} (CANN {cann} wants {minimum} or newer)")


def _library(subject: Subject) -> Finding:
    folder = subject.machine.path(f"{_driver(subject)}/lib64")
    if folder.is_dir() and any(folder.rglob("libascend_hal.so*")):
        return passed("driver.library", "libascend_hal.so is there")
    where = f"libascend_hal.so below {_driver(subject)}/lib64"
    fix = f"{_REINSTALL}; a driver elsewhere: EPD_ASCEND_DRIVER=<folder>/driver"
    return failed("driver.library", expected=where, found="no such file", fix=fix)


def _install_path(subject: Subject) -> Finding:
    text = subject.machine.text("/etc/ascend_install.info")
    told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line).get("Driver_Install_Path_Param", "")
    if not told:
        expected = "/etc/ascend_install.info with Driver_Install_Path_Param"
        return failed("driver.path", expected=expected, found="none", fix=_REINSTALL)
    installed = f"{told.strip().rstrip('/')}/driver"
    if installed != _driver(subject):
        return failed(
            "driver.path",
            expected=f"the driver that is mounted: {_driver(subject)}",
            found=f"{installed} is installed",
            fix=f"EPD_ASCEND_DRIVER={installed}",
        )
    return passed("driver.path", installed)


def _users(subject: Subject) -> Finding:
    users = survey.card_users(subject.machine, subject.settings.project)
    taken = {card: user for card, user in users.items() if card in subject.cards}
    if taken:
        return failed(
            "cards.free",
            expected="cards that nobody else uses: the driver gives one to one container only",
            found=", ".join(f"card {card}: {user}" for card, user in sorted(taken.items())),
            fix="stop what uses them, or leave them out: EPD_CARDS=<others>",
        )
    return passed("cards.free", "nobody else uses them")


def _driver(subject: Subject) -> str:
    return subject.settings.planning.get("EPD_ASCEND_DRIVER") or "/usr/local/Ascend/driver"
