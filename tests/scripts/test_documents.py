"""The documents: complete, in step with what they tell of, and the Chinese ones with the English ones."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from epd import planning, settings, versions
from epd_serve.settings import MooncakePorts

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "proxy/README.md"])
TRANSLATED = [ROOT / "README.zh.md", ROOT / "docs/ascend.zh.md"]
VARIABLE = re.compile(r"\bEPD_[A-Z0-9]+(?:_[A-Z0-9]+)*\b")
NOT_SETTINGS = {"EPD_VERSION", "EPD_INPUTS", "EPD_REVISION", "EPD_PEER"}
"""Variables of the bake file, which come from versions.env and the build; the beginning of names put together."""


def text(path):
    return path.read_text()


def sources():
    files = [*(ROOT / "compose").rglob("*.yaml"), *(ROOT / "docker").rglob("*"), *(ROOT / "scripts").rglob("*.py")]
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".lock"]


def test_every_variable_that_compose_images_and_scripts_read_is_explained():
    used = {name for path in sources() for name in VARIABLE.findall(path.read_text())}
    told = set(VARIABLE.findall(text(ROOT / "docs/configuration.md")))
    proxy = {name for name in used if name.startswith("EPD_PROXY_")}  # its --help explains them
    assert sorted(used - told - NOT_SETTINGS - proxy) == []


def defaults_in_documents():
    """Return what docs/configuration.md names as default, by variable: code in the default's cell, of every table."""
    found = {}
    for line in text(ROOT / "docs/configuration.md").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        names = re.findall(r"`([A-Z][A-Z0-9_]+)`", cells[0]) if len(cells) == 3 else []
        for index, name in enumerate(names):
            told = [re.findall(r"`([^`]+)`", part) for part in re.split(r", (?=`)", cells[1])]
            fitting = [told[index]] if len(told) == len(names) > 1 else told
            found.setdefault(name, set()).update(*fitting)
    return found


NAMED_IN_WORDS = {"EPD_MODEL", "EPD_IMAGE", "EPD_PROXY_IMAGE", "EPD_STORE_IMAGE", "EPD_HARDWARE"}
"""Their default is not a value but what was found, built or made."""


def test_the_defaults_are_those_of_the_compose_files_the_plan_and_the_roles():
    told = defaults_in_documents()
    used = [
        (name, value)
        for path in (ROOT / "compose").rglob("*.yaml")
        for name, value in re.findall(r"\$\{([A-Z][A-Z0-9_]+):-([^${}]+)\}", text(path))
    ]
    limits = vars(planning.NPU_DEFAULTS)
    used += [(f"EPD_{name.upper()}", str(value)) for name, value in limits.items()]
    roles = text(ROOT / "docker/serve/epd_serve/settings.py")
    pairs = re.findall(r'read\.(?:number|text|choice)\("([A-Z_]+)", "?([a-z0-9/._-]+)"?[,)]', roles)
    ports = {f"defaults.{name}": str(port) for name, port in vars(MooncakePorts()).items()}
    used += [(name, ports.get(value, value)) for name, value in pairs]
    wrong = {
        f"{name}: {value}, told: {sorted(told.get(name, ()))}"
        for name, value in used
        if value not in told.get(name, ()) and value != "/dev/null" and name not in NAMED_IN_WORDS
    }
    assert len(used) > 40
    assert sorted(wrong) == []


def test_what_the_doctor_finds_is_in_troubleshooting():
    sources = [*(ROOT / "scripts/epd/doctor").glob("*.py"), ROOT / "scripts/epd/preflight.py"]
    parts = "engine|driver|network|containers|ports|cards|host|model|inside"
    found = {name for path in sources for name in re.findall(rf'"((?:{parts})\.[a-z-]+)"', text(path))}
    told = set(re.findall(rf"`((?:{parts})\.[a-z-]+)`", text(ROOT / "docs/troubleshooting.md")))
    assert len(found) > 30
    assert (sorted(found - told), sorted(told - found)) == ([], [])


def test_the_settings_of_the_proxy_are_as_it_tells_them():
    spec = importlib.util.spec_from_file_location("proxy_settings", ROOT / "scripts/proxy_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    told = set(VARIABLE.findall(text(ROOT / "docs/proxy-settings.md")))
    assert {"EPD_PROXY_PORT", "EPD_PROXY_ENCODE_URLS"} <= told
    handed_on = {
        name for name in VARIABLE.findall(text(ROOT / "compose/services.yaml")) if name.startswith("EPD_PROXY_")
    }
    ours = {"EPD_PROXY_BIND", "EPD_PROXY_IMAGE", "EPD_PROXY_MEMORY_LIMIT"}  # compose's own
    assert sorted(handed_on - told - ours) == []
    assert module.render() == text(ROOT / "docs/proxy-settings.md"), "run `make docs`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_targets_of_make_exist(path):
    targets = set(re.findall(r"^([a-z0-9-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    fenced = "\n".join(re.findall(r"^```(?:bash)?\n(.*?)^```", text(path), re.MULTILINE | re.DOTALL))
    called = re.findall(r"(?<![\w-])make (?:[A-Z_]+=\S* )*([a-z][a-z0-9-]*[a-z0-9])", fenced)
    called += re.findall(r"`(?:[A-Z_]+=\S+ )*make ([a-z][a-z0-9-]*[a-z0-9])", text(path))
    assert sorted(set(called) - targets) == []
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text(path))
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_setting_that_a_document_names_is_one(path):
    code = "\n".join(source.read_text() for source in [*sources(), *(ROOT / "proxy/src").rglob("*.py")])
    known = set(VARIABLE.findall(code)) | {f"EPD_PROXY_{name}" for name in re.findall(r'"([A-Z][A-Z0-9_]+)"', code)}
    known |= settings.PLAN_VARIABLES | set(VARIABLE.findall(text(ROOT / "connector/README.md")))
    told = set(VARIABLE.findall(text(path)))
    assert sorted(name for name in told if name not in known and not name.endswith("_EXTRA_ARGS")) == []


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/ascend.md"], ids=lambda path: path.name)
def test_requirements_are_those_of_versions_env(path):
    minimum = versions.load(ROOT / "docker/versions.env")
    wanted = ", ".join(minimum[name] for name in ("MIN_DOCKER_ENGINE", "MIN_COMPOSE", "MIN_BUILDX"))
    assert f"| Docker engine, Compose, buildx | {wanted}" in text(path)


def test_the_python_that_a_host_needs_is_the_one_that_lint_checks_and_documents_name():
    major, minor = re.search(r"MINIMUM_PYTHON = \((\d), (\d+)\)", text(ROOT / "scripts/epd/__main__.py")).groups()
    assert f"--target={major}.{minor}-" in text(ROOT / "Makefile")
    assert f'"scripts/epd/**" = "py{major}{minor}"' in text(ROOT / "pyproject.toml")
    for path in ("README.md", "README.zh.md", "docs/ascend.md", "docs/ascend.zh.md"):
        assert f"{major}.{minor}" in text(ROOT / path), path


def test_releases_publish_every_image_that_a_host_may_run():
    jobs = yaml.safe_load(text(ROOT / ".github/workflows/release.yml"))["jobs"]
    bake = subprocess.run(
        ["docker", "buildx", "bake", "-f", "docker/docker-bake.hcl", "--print", "release"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert sorted(jobs["images"]["strategy"]["matrix"]["target"]) == sorted(json.loads(bake.stdout)["target"])
    told = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    targets = set(re.findall(r"^([a-z0-9-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"^\s*make ([a-z-]+)", told, re.MULTILINE)) <= targets


def skeleton(path):
    """Return what a translation keeps: levels of headings, fenced blocks, and each table's cells of code."""
    lines = text(path).splitlines()
    fenced, block, headings, tables = [], None, [], []
    for line in lines:
        if line.startswith("```"):
            if block is None:
                block = [line]
            else:
                fenced.append([*block, line])
                block = None
        elif block is not None:
            block.append(line)
        elif line.startswith("#"):
            headings.append(len(line) - len(line.lstrip("#")))
        elif line.startswith("|"):
            tables.append((line.count("|"), sorted(re.findall(r"`[^`]+`", line))))
    return headings, fenced, tables


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
def test_a_translation_is_in_step(path):
    headings, fenced, tables = skeleton(path)
    english = skeleton(path.with_name(path.name.replace(".zh.md", ".md")))
    assert headings == english[0]
    assert fenced == english[1]
    assert tables == english[2]
