"""Hosts with NPUs, as a folder: device nodes, driver files, and programs that print what the real ones print.

The shapes of the output are recorded ones: npu-smi 25.x on Atlas A2 and A3, 25.7 on 950PR, hccn_tool of driver 25.x, as
shown in public issues and documents. The values are made up.
"""

import json
import stat
from pathlib import Path

A2_BUS = ("c1", "c2", "81", "82", "01", "02", "41", "42")
VERSION_INFO = """\
Version={version}
ascendhal_version=7.35.23
aicpu_version=1.0
tdt_version=1.0
log_version=1.0
prof_version=2.0
dvppkernels_version=1.1
tsfw_version=1.0
Innerversion=V100R001C23SPC002B212
compatible_version=[V100R001C19],[V100R001C20],[V100R001C21],[V100R001C22],[V100R001C23]
compatible_version_fw=[7.0.0,7.9.9]
package_version={version}
"""
LIBRARIES = ("libascend_hal.so", "libc_sec.so", "libdrvdsmi_host.so", "libmmpa.so")


class FakeHost:
    """One machine below a folder. Tests damage it with its methods, or by changing files."""

    def __init__(self, root: Path, hardware: str):
        self.root = root
        self.hardware = hardware
        self.modules = 8
        self.processes: dict[tuple[int, int], tuple[int, str]] = {}
        self.health: dict[tuple[int, int], str] = {}
        self.containers: list[dict] = []
        self.hccn: dict[str, str] = {}
        self.file("/proc/meminfo", "MemTotal:       1583459328 kB\nMemAvailable:   1480000000 kB\n")
        self.file("/proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n")
        self.interfaces = {"enp189s0f0": "10.0.0.7"}
        self.default_route = "enp189s0f0"
        self.docker_version, self.compose_version = "26.1.4", "2.27.1"
        self.absent_images = False
        self.image_labels: dict[str, str] = {}
        self.runtimes = ["runc"]
        self.inside: dict[str, str] = {}
        """What the shell of a container does, by the container's name."""
        self.file("/dev/null")
        if hardware != "cpu":
            self.driver()
        self.write()

    # --- parts

    def file(self, name, text="", mode=0o644):
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def remove(self, name):
        path = self.root / name.lstrip("/")
        if path.is_dir():
            path.rename(path.with_name(f".gone-{path.name}"))
        else:
            path.unlink()

    def program(self, name, cases, default="exit 1"):
        """Add a program: the output and exit code for each command line it knows."""
        lines = ["#!/bin/sh", 'case "$*" in']
        for words, (text, code) in cases.items():
            output = self.file(f"/.outputs/{name.strip('/').replace('/', '_')}/{len(lines)}", text)
            lines.append(f"{json.dumps(words)}) cat '{output}'; exit {code};;")
        path = self.file(name, "\n".join([*lines, f"*) {default};;", "esac", ""]))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def driver(self):
        driver = "/usr/local/Ascend/driver"
        self.file(f"{driver}/version.info", VERSION_INFO.format(version="25.5.2"))
        for library in LIBRARIES:
            self.file(f"{driver}/lib64/driver/{library}", "ELF")
        self.file("/usr/local/dcmi/libdcmi.so", "ELF")
        self.file("/etc/ascend_install.info", "UserName=HwHiAiUser\nDriver_Install_Path_Param=/usr/local/Ascend\n")
        nodes = ["davinci_manager", "hisi_hdc"]
        if self.hardware == "a5":
            nodes += ["ummu/ummu0", "uburma/uburma0"]
            self.file("/etc/hccl_rootinfo.json", '{"version": "2.0"}')
            self.file("/etc/hixlep/endpoint.json", "{}")
            self.file("/lib/route.conf", "route")
            self.file("/usr/bin/urma_admin", "ELF", 0o755)
            self.file(f"{driver}/topo/950/topo.json", "{}")
        else:
            nodes += ["devmm_svm"]
            addresses = "".join(f"address_{i}=10.1.0.{i + 1}\nnetmask_{i}=255.255.255.0\n" for i in range(self.count))
            self.file("/etc/hccn.conf", addresses)
        for name in [*nodes, *(f"davinci{i}" for i in range(self.count))]:
            self.file(f"/dev/{name}")
        for module, chip in self.places():
            self.file(f"/sys/bus/pci/devices/{self.bus(module, chip)}/numa_node", f"{module // 4}\n")

    @property
    def chips_per_module(self):
        return 2 if self.hardware == "a3" else 1

    @property
    def count(self):
        return self.modules * self.chips_per_module

    def places(self):
        return [(module, chip) for module in range(self.modules) for chip in range(self.chips_per_module)]

    def bus(self, module, chip):
        return f"0000:{A2_BUS[module]}:0{chip}.0"

    def physical(self, module, chip):
        return module * self.chips_per_module + chip

    # --- programs

    def write(self):
        """Write the programs anew, from the state of now."""
        if self.hardware != "cpu":
            info = (self.table(), 0)
            cases = {"info": info, "info -m": (self.mapping(), 0), "info -t topo": (self.topology(), 0)}
            self.program("/usr/local/bin/npu-smi", cases)
            self.program("/usr/local/Ascend/driver/tools/hccn_tool", self.hccn_cases())
        self.write_ip()
        self.write_docker()

    def table(self):
        name = {"a2": "910B3", "a3": "Ascend910", "a5": "Ascend950PR"}[self.hardware]
        lines = ["| npu-smi 25.5.0                   Version: 25.5.0                                               |"]
        for module, chip in self.places():
            health = self.health.get((module, chip), "OK")
            bus, used = self.bus(module, chip).upper(), self.hbm_used(module, chip)
            if self.hardware == "a5":
                lines.append(f"| {module}      | {name} | {health:<13} | 276.0     69      0 / 0 |")
                lines.append(f"|        | {bus} | 0  0 / 0        {used} / 131072 |")
                continue
            numbers = f"{chip}     {self.physical(module, chip)}" if self.hardware == "a3" else f"{chip}"
            lines.append(
                f"| {module}     {name:<19} | {health:<13} | 93.1        48                0    / 0             |"
            )
            lines.append(f"| {numbers:<25} | {bus}  | 0           0    / 0          {used} / 65536         |")
        head = "NPU ID" if self.hardware == "a5" else "NPU     Chip"
        lines.append(f"| {head}              | Process id    | Process name             | Process memory(MB)      |")
        for module, chip in self.places():
            if (module, chip) in self.processes:
                pid, process = self.processes[module, chip]
                place = f"{module}" if self.hardware == "a5" else f"{module}       {chip}"
                lines.append(f"| {place}                 | {pid}         | {process}                  | 58743 |")
            else:
                lines.append(f"| No running processes found in NPU {module} |")
        return "\n".join(lines) + "\n"

    def hbm_used(self, module, chip):
        """MiB that are taken: little on an idle card, nearly all where vLLM runs."""
        nodes = {device["PathOnHost"] for c in self.containers for device in c["HostConfig"].get("Devices", [])}
        if (module, chip) in self.processes or f"/dev/davinci{self.physical(module, chip)}" in nodes:
            return {"a5": 124000}.get(self.hardware, 61000)
        return {"a5": 8824}.get(self.hardware, 3400)

    def mapping(self):
        if self.hardware == "a5":
            rows = ["NPU ID   Slot ID   Chip ID   Chip Phy-ID   Chip Name"]
            rows += [f"{module}   {module}   0   {module}   Ascend950PR" for module, _ in self.places()]
            return "\n".join(rows) + "\n"
        rows = [
            "\tNPU ID                         Chip ID                        Chip Logic ID                  Chip Name"
        ]
        for module in range(self.modules):
            for chip in range(self.chips_per_module):
                rows.append(f"\t{module}       {chip}       {self.physical(module, chip)}       Ascend 910B3")
            rows.append(f"\t{module}       {self.chips_per_module}       -       Mcu")
        return "\n".join(rows) + "\n"

    def topology(self):
        label = "Phy-ID" if self.hardware == "a3" else "NPU"
        numbers = range(self.count)
        lines = ["           " + "   ".join(f"{label}{i}" for i in numbers) + "   CPU Affinity"]
        for a in numbers:
            kinds = [self.link(a, b) for b in numbers]
            lines.append(f"{label}{a}   " + "   ".join(kinds) + f"   {a * 24}-{a * 24 + 23}")
        return "\n".join([*lines, "", "Legend:", "  X    = Self", "  HCCS = Connection traversing HCCS."]) + "\n"

    def link(self, a, b):
        if a == b:
            return "X"
        if self.hardware == "a3":
            return "SIO" if a // 2 == b // 2 else "HCCS_SW"
        return "UB" if self.hardware == "a5" else "HCCS"

    def hccn_cases(self):
        cases = {}
        for i in range(self.count):
            tls = self.hccn.get(f"tls {i}", "0")
            cases[f"-i {i} -link -g"] = (f"link status: {self.hccn.get(f'link {i}', 'UP')}\n", 0)
            cases[f"-i {i} -net_health -g"] = (f"net health status: {self.hccn.get(f'health {i}', 'Success')}\n", 0)
            cases[f"-i {i} -ip -g"] = (f"ipaddr:10.1.0.{i + 1}\nnetmask:255.255.255.0\n", 0)
            text = f"dev_id:{i}, tls switch[{tls}](0:disable, 1:enable), tls alarm time threshold[60]days\n"
            cases[f"-i {i} -tls -g"] = (text, 0)
            loss = self.hccn.get("loss", "0.00")
            text = f"device {i} PING 10.1.0.77\n3 packets transmitted, 3 received, {loss}% packet loss\n"
            cases[f"-i {i} -ping -g address 10.1.0.77"] = (text, 0)
        return cases

    def write_ip(self):
        addresses = [
            {"ifname": name, "addr_info": [{"family": "inet", "local": address, "prefixlen": 24}]}
            for name, address in {"lo": "127.0.0.1", **self.interfaces}.items()
        ]
        routes = [{"dst": "default", "gateway": "10.0.0.1", "dev": self.default_route}] if self.default_route else []
        cases = {"-j -4 addr show": (json.dumps(addresses), 0), "-j route show default": (json.dumps(routes), 0)}
        self.program("/usr/sbin/ip", cases)

    def write_docker(self):
        ids = [str(container["Id"]) for container in self.containers]
        labels = [container["Config"].get("Labels") or {} for container in self.containers]
        own = [
            i for i, label in zip(ids, labels, strict=True) if label.get("com.docker.compose.project") == "ascend-epd"
        ]
        project = "--filter label=com.docker.compose.project=ascend-epd"
        services = [
            f"{i} {label['com.docker.compose.service']}"
            for i, label in zip(ids, labels, strict=True)
            if "com.docker.compose.service" in label
        ]
        cases = {
            f'ps {project} --format {{{{.ID}}}} {{{{.Label "com.docker.compose.service"}}}}': (
                "\n".join(services) + "\n",
                0,
            ),
            "ps -q": ("\n".join(ids) + "\n", 0),
            "ps -q --filter label=com.docker.compose.project=ascend-epd": ("\n".join(own) + "\n", 0),
            "info --format {{.DockerRootDir}}": ("/var/lib/docker\n", 0),
            f"inspect {' '.join(ids)}": (json.dumps(self.containers), 0),
            "version --format {{.Server.Version}}": (f"{self.docker_version}\n", 0 if self.docker_version else 1),
            "compose version --short": (f"{self.compose_version}\n", 0 if self.compose_version else 1),
            "info --format {{json .Runtimes}}": (json.dumps({name: {} for name in self.runtimes}), 0),
        }
        labels = self.file("/.outputs/labels.json", json.dumps(self.image_labels))
        inspect = "exit 1" if self.absent_images else f"cat '{labels}'"
        inside = "".join(f"'exec id-{name} '*) {shell};; " for name, shell in self.inside.items())
        default = f'case "$*" in "image inspect"*) {inspect};; {inside}*) exit 1;; esac'
        self.program("/usr/bin/docker", cases, default=default)

    def container(self, name, cards, project="", service=""):
        """Add a running container that has cards; those of a service see them inside."""
        devices = [{"PathOnHost": f"/dev/davinci{card}", "PathInContainer": f"/dev/davinci{card}"} for card in cards]
        labels = {"com.docker.compose.project": project} if project else {}
        if service:
            labels["com.docker.compose.service"] = service
            self.inside.setdefault(name, f"echo null; for i in {' '.join(map(str, cards))}; do echo davinci$i; done")
        self.containers.append(
            {"Id": f"id-{name}", "Name": f"/{name}", "HostConfig": {"Devices": devices}, "Config": {"Labels": labels}}
        )
        self.write()
