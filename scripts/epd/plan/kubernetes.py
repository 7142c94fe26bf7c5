"""The plan as Kubernetes objects, for `kubectl apply -k`: one StatefulSet per role, the pool and the proxy beside them.

Where an instance runs and which cards it gets is for the cluster's scheduler and Ascend's device plugin to say. So an
instance is known by the name that its StatefulSet gives it, and its ports are those of its role plus its index: prefill
and decode need the network of their node, where two of them may meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epd import yamltext
from epd.plan import pods
from epd.plan.placing import Limits
from epd.plan.ports import HTTP, METASERVER, PROXY
from epd.plan.topology import Topology

NPU_RESOURCE = {"a2": "huawei.com/Ascend910", "a3": "huawei.com/Ascend910", "a5": "huawei.com/npu"}
"""What Ascend's device plugin calls the cards (MindCluster's documents; that of A5 is inferred)."""
_PART_OF = {"app.kubernetes.io/part-of": "ascend-epd"}
_HEAD = """\
# {what}
# Written by `make kubernetes`, and written anew by the next one: change it with an overlay of Kustomize.
"""


@dataclass(frozen=True)
class Cluster:
    """What a stack in a cluster is made from."""

    topology: Topology
    hardware: str
    """`cpu`, `a2`, `a3` or `a5`."""
    limits: Limits
    images: Mapping[str, str]
    """Image of each variable that tells Compose one: EPD_IMAGE, EPD_PROXY_IMAGE, EPD_STORE_IMAGE."""
    model: str
    """Hub id, path in the image, or `/models`."""
    model_folder: str
    """Folder of the model on the volume `models`, mounted at /models; empty for a hub id or a path in the image."""
    served_model_name: str
    vllm_environment: Mapping[str, str]
    """What every vLLM instance is told beside what the plan says."""
    extra_args: Mapping[str, str]
    """Further vLLM arguments of a role, as a shell reads them."""
    proxy_environment: Mapping[str, str]
    memory_bytes: int
    """Memory of a vLLM container."""
    npu_resource: str
    """Name of the cards as a resource; empty on the CPU profile."""


def render(cluster: Cluster) -> dict[str, str]:
    """Return the text of each file, by name; `kustomization.yaml` names the others."""
    parts = {f"{role}.yaml": _role(cluster, role) for role in cluster.topology.counts}
    parts |= {"pool.yaml": _pool(cluster), "proxy.yaml": _proxy(cluster)}
    texts = {
        name: _HEAD.format(what=f"{cluster.topology.name} ({cluster.hardware}): {name.removesuffix('.yaml')}.")
        + "---\n".join(yamltext.dump(item) for item in objects)
        for name, objects in parts.items()
    }
    return {"kustomization.yaml": _kustomization(cluster, list(texts)), **texts}


def _kustomization(cluster: Cluster, files: list[str]) -> str:
    images = []
    for image in dict.fromkeys(cluster.images.values()):
        name, _, tag = image.partition("@") if "@" in image else image.rpartition(":")
        images.append({"name": pods.short(image), "newName": name, ("digest" if "@" in image else "newTag"): tag})
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": files,
        "images": images,
    }
    return _HEAD.format(what=f"{cluster.topology.name} on Kubernetes ({cluster.hardware}).") + yamltext.dump(document)


def _role(cluster: Cluster, role: str) -> list[dict[str, Any]]:
    return [
        _headless(role, HTTP[role]),
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": _metadata(role),
            "spec": {
                "serviceName": role,
                "replicas": cluster.topology.counts[role],
                "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": _labels(role)},
                "template": {"metadata": {"labels": _labels(role)}, "spec": _vllm_pod(cluster, role)},
            },
        },
        _disruption_budget(role),
    ]


def _vllm_pod(cluster: Cluster, role: str) -> dict[str, Any]:
    span, limits = cluster.topology.of(role), cluster.limits
    environment = {
        "EPD_HARDWARE": cluster.hardware,
        "EPD_MODEL": cluster.model,
        "EPD_SERVED_MODEL_NAME": cluster.served_model_name,
        "EPD_MAX_MODEL_LEN": str(limits.max_model_len),
        "EPD_MAX_NUM_SEQS": str(limits.max_num_seqs),
        **pods.role_environment(cluster.topology, role),
        **cluster.vllm_environment,
    }
    if role in cluster.extra_args:
        environment["EPD_EXTRA_ARGS"] = cluster.extra_args[role]
    if "/" in cluster.model and not cluster.model.startswith("/"):
        environment["HF_HUB_OFFLINE"] = "0"
    accelerator = {cluster.npu_resource: str(span.cards)} if cluster.npu_resource else {}
    return pods.vllm(
        role,
        hardware=cluster.hardware,
        image=cluster.images["EPD_IMAGE"],
        environment=environment,
        limits={"memory": str(cluster.memory_bytes), **accelerator},
        model_folder=cluster.model_folder,
    )


def _pool(cluster: Cluster) -> list[dict[str, Any]]:
    """Return Mooncake's master and the store, one each: what they hold is a cache, and instances do without."""
    image = cluster.images.get("EPD_STORE_IMAGE", cluster.images["EPD_IMAGE"])
    objects: list[dict[str, Any]] = []
    for role in ("mooncake-master", "mooncake-store"):
        own_mib = cluster.limits.store_size_mb if role == "mooncake-store" else 0
        memory_mib = own_mib + 2048 if own_mib else 1024
        spec = pods.pool(role, hardware=cluster.hardware, image=image, size_mb=own_mib, memory_mib=memory_mib)
        objects.append(_deployment(role, spec))
    ports = [{"name": name, "port": port} for name, port in pods.MASTER_PORTS.items()]
    objects.append(_service("mooncake-master", {"ports": ports}))
    return objects


def _proxy(cluster: Cluster) -> list[dict[str, Any]]:
    words = [word for role, count in cluster.topology.counts.items() for word in (f"--{role}", *_urls(role, count))]
    services = [_service("proxy", {"ports": [{"name": "http", "port": PROXY}]})]
    if "decode" in cluster.topology.counts:
        words += ["--metaserver-host", "0.0.0.0", "--metaserver-advertise-url", f"http://metaserver:{METASERVER}"]
        # Not part of the service that clients are given: decode instances alone call it.
        workers = int(cluster.proxy_environment.get("EPD_PROXY_WORKERS") or 1)
        ports = [{"name": f"worker-{index}", "port": METASERVER + index} for index in range(workers)]
        services.append(_service("metaserver", {"ports": ports}, selects="proxy"))
    return [
        _deployment("proxy", pods.proxy(cluster.images["EPD_PROXY_IMAGE"], words, cluster.proxy_environment)),
        *services,
    ]


def _urls(role: str, count: int) -> list[str]:
    return [f"http://{role}-{index}.{role}:{HTTP[role] + index}" for index in range(count)]


def _labels(role: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": role, **_PART_OF}


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "labels": _labels(name)}


def _service(name: str, spec: Mapping[str, Any], selects: str = "") -> dict[str, Any]:
    whole = {"selector": _labels(selects or name), **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(name), "spec": whole}


def _headless(role: str, port: int) -> dict[str, Any]:
    """Return what gives each instance a name. Also while it loads: the proxy judges by itself who is ready."""
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "ports": [{"name": "http", "port": port}]}
    return _service(role, spec)


def _deployment(name: str, pod: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(name),
        "spec": {
            "replicas": 1,
            # Two at once would be two pools, or two proxies of which one has the callbacks of the other.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": _labels(name)},
            "template": {"metadata": {"labels": _labels(name)}, "spec": pod},
        },
    }


def _disruption_budget(role: str) -> dict[str, Any]:
    """Return what lets a drain of nodes take one instance of a role at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(role),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(role)}},
    }
