"""The pods of a stack on Kubernetes. Hardened as the containers of compose/services.yaml are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epd.plan.ports import EC_METRICS, HTTP, KV
from epd.plan.topology import Topology

MASTER_PORTS: Mapping[str, int] = {"rpc": 50051, "metadata": 8080, "metrics": 9003}
"""Mooncake's own; in a pod nobody else has them."""
_HOST_NETWORK_ROLES = ("prefill", "decode")
"""The transfer engine's id is the address of the host."""
_TMP_SIZE, _SHM_SIZE = "8Gi", "16Gi"
_PEER = {"prefill": "decode", "decode": "prefill"}
# Ascend's Docker runtime mounts the driver, but not these.
_FROM_HOST: Mapping[str, Mapping[str, str]] = {
    "a2": {"/etc/hccn.conf": "File", "/usr/local/Ascend/driver/tools/hccn_tool": "File"},
    "a3": {"/etc/hccn.conf": "File", "/usr/local/Ascend/driver/tools/hccn_tool": "File"},
    "a5": {
        "/etc/hccl_rootinfo.json": "File",
        "/etc/hixlep": "Directory",
        "/lib/route.conf": "File",
        "/usr/bin/urma_admin": "File",
    },
}


def short(image: str) -> str:
    """Return an image's name without registry, tag and digest: what kustomization.yaml replaces."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0]


def role_environment(topology: Topology, role: str) -> dict[str, str]:
    """Return what an instance is told of ports and of the sizes of both sides of its KV transfer."""
    found = {"EPD_PORT": str(HTTP[role]), **_sizes("EPD", topology, role)}
    if role != "decode":
        found |= {"EPD_EC_METRICS_PORT": str(EC_METRICS[role]), "EPD_MOONCAKE_HOST": "mooncake-master"}
    if role in KV:
        found |= {"EPD_KV_PORT": str(KV[role]), **_sizes("EPD_PEER", topology, _PEER[role])}
    if topology.expert_parallel and role != "encode":
        found["EPD_EXPERT_PARALLEL"] = "1"
    return found


def _sizes(prefix: str, topology: Topology, role: str) -> dict[str, str]:
    span = topology.of(role)
    return {f"{prefix}_TENSOR_PARALLEL_SIZE": str(span.tensor), f"{prefix}_DATA_PARALLEL_SIZE": str(span.data)}


def vllm(
    role: str,
    *,
    hardware: str,
    image: str,
    environment: Mapping[str, str],
    limits: Mapping[str, str],
    model_folder: str,
) -> dict[str, Any]:
    """Return the pod of one vLLM instance; `limits` in units of Kubernetes."""
    mounts, volumes = _scratch(shm=True)
    mounts.append({"name": "cache", "mountPath": "/cache"})
    volumes.append({"name": "cache", "emptyDir": {}})
    if model_folder:
        mounts.append({"name": "models", "mountPath": "/models", "subPath": model_folder, "readOnly": True})
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}})
    if role in _HOST_NETWORK_ROLES and hardware != "cpu":
        for index, (path, kind) in enumerate(_FROM_HOST[hardware].items()):
            mounts.append({"name": f"host-{index}", "mountPath": path, "readOnly": True})
            volumes.append({"name": f"host-{index}", "hostPath": {"path": path, "type": kind}})
    env = [
        # The number of the instance, added to its ports.
        _field("EPD_INSTANCE_INDEX", "metadata.labels['apps.kubernetes.io/pod-index']"),
        _field("EPD_ADVERTISE_HOST", "status.podIP"),
        _field("EPD_BIND_HOST", "status.podIP"),
        *_env({**environment, "HF_HOME": "/cache/huggingface"}),
    ]
    container = _container(role, image, [role], env=env, mounts=mounts, limits=limits)
    # While a model loads the check fails: half an hour, as in the image.
    container["startupProbe"] = _health(failures=360, period_s=5)
    container["readinessProbe"] = _health(failures=3, period_s=10)
    container["livenessProbe"] = _health(failures=6, period_s=10)
    if hardware == "a5":  # documented as privileged
        container["securityContext"] = {"privileged": True}
    pod = _pod(container, volumes, grace_s=60)
    if role in _HOST_NETWORK_ROLES and hardware != "cpu":
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return pod


def pool(role: str, *, hardware: str, image: str, size_mb: int, memory_mib: int) -> dict[str, Any]:
    """Return the pod of Mooncake's master, or of the store, which owns `size_mb` MiB."""
    mounts, volumes = _scratch(shm=False)
    env = _env({"EPD_HARDWARE": hardware})
    if size_mb:
        told = {"EPD_MOONCAKE_HOST": "mooncake-master", "EPD_STORE_SIZE_MB": str(size_mb)}
        env += [_field("EPD_ADVERTISE_HOST", "status.podIP"), *_env(told)]
    container = _container(role, image, [role], env=env, mounts=mounts, limits={"memory": f"{memory_mib}Mi"})
    container["startupProbe"] = _health(failures=24, period_s=5)
    container["livenessProbe"] = _health(failures=6, period_s=10)
    return _pod(container, volumes, grace_s=30)


def proxy(image: str, words: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the pod of the proxy with its arguments and settings."""
    mounts, volumes = _scratch(shm=False)
    container = _container("proxy", image, list(words), env=_env(environment), mounts=mounts, limits={"memory": "2Gi"})
    container["ports"] = [{"name": "http", "containerPort": 8000}]
    container["livenessProbe"] = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 10}
    container["readinessProbe"] = {"httpGet": {"path": "/ready", "port": 8000}, "periodSeconds": 5}
    return _pod(container, volumes, grace_s=60)


def _container(
    name: str,
    image: str,
    words: list[str],
    *,
    env: list[dict[str, Any]],
    mounts: list[dict[str, Any]],
    limits: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "name": name,
        "image": short(image),
        "args": words,
        "env": env,
        "resources": {"limits": dict(limits)},
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _pod(container: dict[str, Any], volumes: list[dict[str, Any]], *, grace_s: int) -> dict[str, Any]:
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # The pause container reaps what ends within.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": grace_s,
        # 1000 is the images' user and the owner of the NPUs' device nodes.
        "securityContext": {
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }


def _scratch(*, shm: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sizes = {"tmp": ("/tmp", _TMP_SIZE if shm else "1Gi")}  # noqa: S108 - in the container
    if shm:
        sizes["shm"] = ("/dev/shm", _SHM_SIZE)  # noqa: S108
    mounts: list[dict[str, Any]] = [{"name": name, "mountPath": path} for name, (path, _) in sizes.items()]
    volumes: list[dict[str, Any]] = [
        {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": size}} for name, (_, size) in sizes.items()
    ]
    return mounts, volumes


def _health(*, failures: int, period_s: int) -> dict[str, Any]:
    return {
        "exec": {"command": ["epd-serve", "health"]},
        "periodSeconds": period_s,
        "timeoutSeconds": 20,
        "failureThreshold": failures,
    }


def _env(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
