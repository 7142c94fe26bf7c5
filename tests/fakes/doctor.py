"""What the doctor looks at in its tests: a fake host, a project folder and a model, and ways to damage them."""

import json
import shutil
from pathlib import Path

from epd import planning, preflight, settings, versions
from epd.doctor.finding import Status
from epd.machine import Machine
from fakes.models import QWEN25_VL_7B
from fakes.npu_hosts import FakeHost

ROOT = Path(__file__).resolve().parents[2]
NPUS = ("a2", "a3", "a5")
VERSIONS = versions.load(ROOT / "docker" / "versions.env")


class Case:
    """A fake host, a project folder and a model; tests damage one of them and look."""

    def __init__(self, folder, hardware):
        self.fake = FakeHost(folder / "host", hardware)
        self.root = folder / "project"
        shutil.copytree(ROOT / "compose", self.root / "compose")
        shutil.copytree(ROOT / "docker", self.root / "docker")
        # Mounted into containers, so the host must have it: a folder of both trees.
        self.model = folder / "my-model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(QWEN25_VL_7B))
        (self.model / "model-00001.safetensors").write_bytes(b"0" * 64)
        self.fake.file(str(self.model / "config.json"))
        self.environ = {"TOPOLOGY": "1e1p1d", "EPD_HOST": "node-a"}
        if hardware != "cpu":
            self.environ["MODEL"] = str(self.model)

    def examine(self):
        loaded = settings.load(self.root, self.environ)
        return preflight.examine(loaded, VERSIONS, Machine(self.fake.root))

    def bad(self):
        """Return what is not well, by name."""
        return {finding.name: finding for finding in self.examine() if finding.status is not Status.PASS}


def remove(name):
    return lambda it: it.fake.remove(name)


def write(name, text):
    return lambda it: it.fake.file(name, text)


def hccn(**states):
    def damage(it):
        it.fake.hccn = {key.replace("_", " "): value for key, value in states.items()}
        it.fake.write()

    return damage


def fake(**values):
    def damage(it):
        for name, value in values.items():
            setattr(it.fake, name, value)
        it.fake.write()

    return damage


def environ(**values):
    return lambda it: it.environ.update(values)


def broken_npu_smi(it):
    it.fake.program(
        "/usr/local/bin/npu-smi", {}, default="echo 'dcmi module initialize failed. ret is -8005'; exit 255"
    )
    it.environ["EPD_HARDWARE"] = it.fake.hardware


def own_compose_file(text):
    """Lay a file of the user's own over the plan's, as the lines of .env allow."""

    def damage(it):
        loaded = settings.load(it.root, it.environ)
        planned = planning.make(loaded, it.fake.hardware, Machine(it.fake.root))
        planning.write(it.root, planned)
        (it.root / "mine.yaml").write_text(text)
        (it.root / ".env").write_text(f"COMPOSE_FILE={planned.compose_files[0]}:mine.yaml\n")

    return damage


def listener(port):
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = f"   0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
    return write("/proc/net/tcp", head + row)


def someone_elses_container(it):
    it.fake.container("training-job", [0, 1, 2, 3, 4, 5, 6, 7])
