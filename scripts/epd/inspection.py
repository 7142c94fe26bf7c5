"""The commands that look and start nothing: doctor, plan, describe."""

from __future__ import annotations

import os

from epd import image_lock, planning, preflight, recipes, settings
from epd.context import ROOT, Context
from epd.doctor import inside, report
from epd.doctor.finding import Finding, Status
from epd.doctor.subject import Subject
from epd.errors import StepError
from epd.plan import hosts
from epd.settings import Settings


def doctor(it: Context, words: list[str]) -> int:
    """Check this machine for the stack that would be started; change nothing. `--json` for programs."""
    loaded, found = _settings(it)
    found += preflight.examine(loaded, it.versions, it.machine)
    print(report.as_json(found) if "--json" in words else report.text(found))
    return report.exit_code(found)


def _settings(it: Context) -> tuple[Settings, list[Finding]]:
    """Return the settings; where the model is what is wrong with them, those without it, and that as a finding.

    Raises:
        StepError: something else is wrong with them.
    """
    try:
        return it.settings, []
    except StepError as error:
        fault = Finding("settings", Status.FAIL, error.found, error.expected, error.fix)
    environ = {name: value for name, value in os.environ.items() if name not in ("MODEL", recipes.NAME)}
    return settings.load(ROOT, environ), [fault]


def check_host(it: Context, planned: planning.Planned) -> None:
    """Refuse to start what is known to fail; say all of it at once.

    Raises:
        StepError: a check failed.
    """
    found = preflight.examine_planned(it.settings, it.versions, it.machine, planned, will_start=True)
    unwell = [finding for finding in found if finding.status is not Status.PASS]
    if unwell:
        print(report.details(unwell), flush=True)
    print(f"Host checks: {report.summary(found)} (`make doctor` shows all)", flush=True)
    failed = [finding for finding in found if finding.status is Status.FAIL]
    if failed:
        raise StepError(
            "this machine cannot run the stack yet",
            expected="no FAIL above",
            found=", ".join(finding.name for finding in failed),
            fix="see the fix of each above; `make doctor` checks again without starting anything",
        )


def look_inside(it: Context, planned: planning.Planned) -> None:
    """Say what is wrong in the containers that run now: what the engine was told and a container got can differ."""
    subject = Subject(it.machine, it.settings, it.versions, planned.host.hardware, planned.host, planned.plan)
    unwell = [finding for finding in inside.check(subject) if finding.status is not Status.PASS]
    if unwell:
        print(f"\nThe containers run, yet:\n{report.details(unwell)}", flush=True)


def plan(it: Context, _: list[str]) -> int:
    """Write the plan's files for every host and show it; start nothing."""
    if it.settings.planning.get("EPD_HOSTS"):
        made = planning.for_inventory(it.settings)
    else:
        hardware = planning.choose_hardware(it.settings.hardware, it.machine)
        made = planning.make(it.settings, hardware, it.machine).plan
    print(planning.table(made))
    written = planning.write_all(ROOT, made)
    names = preflight.image_names(it.settings, it.versions, made.head.hardware)
    if names:
        chosen = image_lock.pinned(ROOT, names, it.settings.registry) if it.settings.pull else names
        written += planning.write_environments(it.settings, made, chosen)
    for path in written:
        print(f"  {path.relative_to(ROOT)}: written")
    for host in made.hosts if names else ():
        folder = f"deploy/{made.topology.name}/{host.name}"
        print(f"On {host.name}, in this folder: docker compose --env-file {folder}/.env up --detach --wait")
    return 0


def describe(it: Context, _: list[str]) -> int:
    """Print this machine as an inventory of one host."""
    hardware = planning.choose_hardware(it.settings.hardware, it.machine)
    print(hosts.dump([planning.describe(it.settings, hardware, it.machine)]), end="")
    return 0
