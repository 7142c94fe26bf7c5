"""The plan as files: for each host a Compose file, and the overlays that may be laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epd import yamltext
from epd.plan.fitting import STORE_PROCESS_MIB
from epd.plan.hosts import Host
from epd.plan.placing import Instance, Plan
from epd.plan.ports import METASERVER, POOL

OVERLAYS = ("runtime-ascend", "non-root")
HEALTHY = {"condition": "service_healthy"}
_HEAD = """\
# {what}
# Written by `make plan`, and written anew by the next one: change the plan's inputs, not this file.
"""


@dataclass(frozen=True)
class HostFiles:
    """What one host needs beside this project's folder."""

    compose: str
    """Text of its Compose file."""
    overlays: Mapping[str, str]
    """Text of each overlay, by name."""


def render(plan: Plan, host: Host, *, fragments: str) -> HostFiles:
    """Return the files of one host; `fragments` is the path to the folder `compose/` from where they will be."""
    share = f"{len(plan.on(host))} of {len(plan.instances)} instances"
    what = f"{plan.topology.name} on {host.name} ({host.hardware}): {share}."
    services = _services(plan, host, fragments)
    volumes = {"models": {}, "cache": {}, "ec": _ec_volume(plan)}
    document = {"name": "ascend-epd", "services": services, "volumes": volumes}
    return HostFiles(
        compose=_HEAD.format(what=what) + yamltext.dump(document),
        overlays={} if host.hardware == "cpu" else _overlays(plan, host),
    )


def metaserver(plan: Plan) -> tuple[str, int]:
    """Return host and port that decode instances call the proxy back at."""
    return (_bind(plan, plan.head) if _host_network(plan) else "proxy"), METASERVER


def variables(plan: Plan) -> dict[str, str]:
    """Return what `.env` has to tell the fragments."""
    planned = {"EPD_PLANNED": plan.topology.name} if _host_network(plan) else {}
    return {"EPD_HARDWARE": plan.head.hardware, **planned}


def _services(plan: Plan, host: Host, fragments: str) -> dict[str, Any]:
    """Return the services of a host: the pool and the proxy on the first one, instances where the plan has them."""
    head = host == plan.head
    services: dict[str, Any] = {}
    if head:
        services |= {name: _pool_service(plan, name) for name in ("mooncake-master", "mooncake-store")}
    for instance in plan.on(host):
        services[instance.name] = _instance_service(plan, instance)
        if head:
            services[instance.name]["depends_on"] = {"mooncake-store": HEALTHY}
    if head:
        services["proxy"] = _proxy_service(plan)
    for name, service in services.items():
        role = service.pop("fragment", name)
        services[name] = {"extends": {"file": f"{fragments}/services.yaml", "service": role}, **service}
    return services


def _ec_volume(plan: Plan) -> dict[str, Any]:
    """Return the volume in memory that holds embeddings with EPD_EC_STORE=shared_dir, and nothing otherwise."""
    size_mb = str(plan.limits.store_size_mb) if _host_network(plan) else "${EPD_STORE_SIZE_MB:-512}"
    return {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": f"mode=1777,size={size_mb}m"}}


def _pool_service(plan: Plan, name: str) -> dict[str, Any]:
    service: dict[str, Any] = {}
    if name == "mooncake-store":
        service = {"environment": {"EPD_ADVERTISE_HOST": _address(plan, name)}}
        service["depends_on"] = {"mooncake-master": HEALTHY}
    if _host_network(plan):
        service = {"network_mode": "host", **service}
        service["environment"] = {**service.get("environment", {}), **_pool(plan)}
        if name == "mooncake-store":
            size_mb = plan.limits.store_size_mb
            service["environment"]["EPD_STORE_SIZE_MB"] = str(size_mb)
            # The pool's segment, and what its process needs besides.
            service["mem_limit"] = f"${{EPD_STORE_MEMORY_LIMIT:-{size_mb + STORE_PROCESS_MIB}m}}"
    return service


def _instance_service(plan: Plan, instance: Instance) -> dict[str, Any]:
    environment = {"EPD_ADVERTISE_HOST": _address(plan, instance.name, instance.host)}
    service: dict[str, Any] = {"fragment": instance.role, "environment": environment}
    if not _host_network(plan):
        return service
    environment |= {
        "EPD_BIND_HOST": _bind(plan, instance.host),
        "EPD_PORT": str(instance.ports.http),
        "EPD_MAX_MODEL_LEN": str(plan.limits.max_model_len),
        "EPD_MAX_NUM_SEQS": str(plan.limits.max_num_seqs),
        "EPD_STORE_SIZE_MB": str(plan.limits.store_size_mb),
        **_parallel(plan, instance),
    }
    if instance.host.interface:
        environment["EPD_INTERFACE"] = instance.host.interface
    if instance.role != "decode":
        environment |= {"EPD_EC_METRICS_PORT": str(instance.ports.metrics), **_pool(plan)}
    if instance.ports.kv:
        environment["EPD_KV_PORT"] = str(instance.ports.kv)
    if instance.host.hardware == "a2":
        environment["HCCL_INTRA_ROCE_ENABLE"] = f"${{HCCL_INTRA_ROCE_ENABLE:-{int(instance.host.roce)}}}"
    if instance.host.hardware == "a5":  # privileged, so it sees all cards
        environment["ASCEND_RT_VISIBLE_DEVICES"] = _ids(instance)
    service["devices"] = [f"/dev/davinci{card.id}" for card in instance.cards]
    return service


def _parallel(plan: Plan, instance: Instance) -> dict[str, str]:
    """Return what an instance spans, and what the other side of its KV transfer does."""
    found = {
        "EPD_TENSOR_PARALLEL_SIZE": str(instance.parallel.tensor),
        "EPD_DATA_PARALLEL_SIZE": str(instance.parallel.data),
    }
    peer = {"prefill": "decode", "decode": "prefill"}.get(instance.role)
    if peer:
        span = plan.topology.of(peer)
        found |= {
            "EPD_PEER_TENSOR_PARALLEL_SIZE": str(span.tensor),
            "EPD_PEER_DATA_PARALLEL_SIZE": str(span.data),
        }
    if plan.topology.expert_parallel and instance.role != "encode":
        found["EPD_EXPERT_PARALLEL"] = "1"
    return found


def _proxy_service(plan: Plan) -> dict[str, Any]:
    words: list[str] = []
    for role in plan.topology.counts:
        words += [f"--{role}", *(_url(plan, instance) for instance in plan.of(role))]
    network = _host_network(plan)
    words += ["--store", *_pool_urls(plan)]
    if "decode" in plan.topology.counts:
        host, port = metaserver(plan)
        if network:  # decode instances alone call it, and on a bridge nobody else can
            words += ["--metaserver-host", host]
        words += ["--metaserver-advertise-url", f"http://{_bracketed(host)}:{port}"]
    service: dict[str, Any] = {"fragment": "_proxy" if network else "proxy"}
    if network:
        service |= {
            "network_mode": "host",
            "environment": {
                "EPD_BIND_HOST": "${EPD_PROXY_BIND:-127.0.0.1}",
                "EPD_PORT": "${EPD_PROXY_PORT:-8000}",
            },
        }
    return {**service, "command": words, "depends_on": {i.name: HEALTHY for i in plan.on(plan.head)}}


def _overlays(plan: Plan, host: Host) -> dict[str, str]:
    """Return the overlays of an NPU host, each for all its instances."""
    runtime = {
        instance.name: {
            "runtime": "ascend",
            "environment": {"ASCEND_VISIBLE_DEVICES": _ids(instance)},
            "devices": yamltext.Reset(),
        }
        for instance in plan.on(host)
    }
    plain_user = {instance.name: {"user": "1000:1000", "cap_add": yamltext.Reset()} for instance in plan.on(host)}
    texts = {
        "runtime-ascend": (
            "Devices through the Ascend Docker Runtime instead of by name; the mounts of the driver stay.",
            runtime,
        ),
        "non-root": ("Instances as HwHiAiUser (1000), whose device nodes these are, without capabilities.", plain_user),
    }
    return {
        name: _HEAD.format(what=what) + yamltext.dump({"services": services})
        for name, (what, services) in texts.items()
        if services
    }


def _host_network(plan: Plan) -> bool:
    return plan.head.hardware != "cpu"


def _address(plan: Plan, service: str, host: Host | None = None) -> str:
    """Return under what the others know a service: its host's address, or its own name on Compose's network."""
    return (host or plan.head).address if _host_network(plan) else service


def _bind(plan: Plan, host: Host) -> str:
    """Return what the instances of a host listen on: nothing outside of it when there is no other host."""
    return host.address if len(plan.hosts) > 1 else "127.0.0.1"


def _url(plan: Plan, instance: Instance) -> str:
    if not _host_network(plan):
        return f"http://{instance.name}:8000"
    return f"http://{_bracketed(_bind(plan, instance.host))}:{instance.ports.http}"


def _pool_urls(plan: Plan) -> list[str]:
    """Return where the proxy sees whether the pool lives."""
    if not _host_network(plan):
        return ["http://mooncake-master:9003", "http://mooncake-store:9300"]
    names = ("EPD_MOONCAKE_METRICS_PORT", "EPD_STORE_HTTP_PORT")
    return [f"http://{_bracketed(plan.head.address)}:{POOL[name]}" for name in names]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _pool(plan: Plan) -> dict[str, str]:
    return {"EPD_MOONCAKE_HOST": plan.head.address, **{name: str(port) for name, port in POOL.items()}}


def _ids(instance: Instance) -> str:
    return ",".join(str(card.id) for card in instance.cards)
