"""From the settings to a stack's Kubernetes objects, below `deploy/`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from epd import image_lock, images, planning, preflight, values
from epd.context import ROOT, Context
from epd.errors import StepError
from epd.plan import kubernetes
from epd.served_model import MODEL_MOUNT
from epd.settings import PLAN_VARIABLES, Settings, load, stack_variables

_MEMORY_LIMIT = {"cpu": "6g"}
_NPU_MEMORY_LIMIT = "128g"
"""What compose/ says."""
_PASSED_ON = (
    "EPD_ALLOWED_MEDIA_DOMAINS", "EPD_INTERFACE", "EPD_JEMALLOC", "EPD_SKIP_PROBE", "HCCL_BUFFSIZE",
    "HCCL_INTRA_ROCE_ENABLE", "HCCL_OP_EXPANSION_MODE", "HF_ENDPOINT", "OMP_NUM_THREADS",
)  # fmt: skip
"""What every vLLM instance is told when it is set, as in compose/."""
_TAKEN = frozenset({
    *_PASSED_ON, *PLAN_VARIABLES, "EPD_HARDWARE", "EPD_MODEL", "EPD_MODELS", "EPD_SERVED_MODEL_NAME", "HF_HUB_OFFLINE",
    "EPD_MAX_MODEL_LEN", "EPD_MAX_NUM_SEQS", "EPD_STORE_SIZE_MB", "EPD_MEMORY_LIMIT", "EPD_EC_STORE",
})  # fmt: skip
"""What the objects are made from, and what a cluster has in its place."""
_OF_THIS_HOST = frozenset({"EPD_PROXY_PORT", "EPD_PROXY_BIND", "EPD_PROXY_IMAGE", "EPD_PROXY_MEMORY_LIMIT"})
_TINY_MODEL = "/opt/ascend-epd/tiny-model"


def write(it: Context, _: list[str]) -> int:
    """Write the objects of the stack that is asked for; touch no cluster."""
    told = load(ROOT, on_a_volume(os.environ))
    hardware = planning.choose_hardware(told.hardware, it.machine)
    names = preflight.image_names(told, it.versions, hardware)
    if not names:
        raise StepError(
            "the images' names cannot be told",
            expected=f"docker buildx, which reads {images.BAKE_FILE}",
            found="none that works",
            fix="make doctor",
        )
    cluster = describe(told, hardware, image_lock.pinned(ROOT, names, told.registry))
    folder = ROOT / "deploy" / cluster.topology.name / "kubernetes"
    print(f"{cluster.topology.name} ({hardware}): {cluster.topology.arithmetic()} cards in the cluster")
    for path in write_files(folder, cluster):
        print(f"  {path.relative_to(ROOT)}: written")
    ignored = left_out(told, cluster)
    if ignored:
        advice = "an overlay of Kustomize can say it; files and keys belong into a Secret"
        print(f"Left out: {', '.join(ignored)}; {advice}")
    if cluster.model_folder:
        print(f"Needed: a PersistentVolumeClaim `models` with the folder {cluster.model_folder} in it")
    print(f"Then: kubectl apply -k {folder.relative_to(ROOT)}")
    return 0


def on_a_volume(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with what MODEL stands for where it is a folder that the cluster's volume alone has."""
    model = environ.get("MODEL", "").strip()
    if not model.startswith("/") or os.path.isdir(model):
        return dict(environ)
    name = Path(model).name
    told = {"EPD_MODEL": MODEL_MOUNT, "EPD_MODELS": model, "EPD_SERVED_MODEL_NAME": name, **environ}
    return {**told, "MODEL": "tiny"}  # nothing by itself, and no model of a recipe either


def describe(settings: Settings, hardware: str, names: dict[str, str]) -> kubernetes.Cluster:
    """Return what the objects are made from; `names` are the images by variable.

    Raises:
        StepError: a setting is not usable, or there is no model to serve on NPUs.
    """
    told = settings.planning
    topology, limits = planning.wanted(settings, hardware)
    planning.check_model(told, hardware)
    if told.get("EPD_EC_STORE") == "shared_dir":
        raise StepError(
            "pods share no folder",
            expected="embeddings in the pool: EPD_EC_STORE=mooncake, the default",
            found="EPD_EC_STORE=shared_dir",
            fix="make kubernetes EPD_EC_STORE=",
        )
    folder = told.get("EPD_MODELS", "")
    model = told.get("EPD_MODEL") or _TINY_MODEL
    memory = told.get("EPD_MEMORY_LIMIT") or _MEMORY_LIMIT.get(hardware, _NPU_MEMORY_LIMIT)
    return kubernetes.Cluster(
        topology=topology,
        hardware=hardware,
        limits=limits,
        images=names,
        model=model,
        model_folder=Path(folder).name if folder else "",
        served_model_name=told.get("EPD_SERVED_MODEL_NAME") or Path(model).name,
        memory_bytes=values.size_bytes("EPD_MEMORY_LIMIT", memory),
        vllm_environment={name: told[name] for name in _PASSED_ON if told.get(name)},
        extra_args={role: told[name] for role in topology.counts if told.get(name := _extra_args(role))},
        proxy_environment={
            name: value
            for name, value in sorted(told.items())
            if name.startswith("EPD_PROXY_") and value and name not in _OF_THIS_HOST and not _is_file(name)
        },
        npu_resource=told.get("EPD_NPU_RESOURCE") or kubernetes.NPU_RESOURCE.get(hardware, ""),
    )


def left_out(settings: Settings, cluster: kubernetes.Cluster) -> list[str]:
    """Return the names of settings that are set and not in the objects: files and keys, and what only Compose has."""
    used = {*_TAKEN, *_OF_THIS_HOST, *cluster.proxy_environment, *map(_extra_args, cluster.topology.counts)}
    known = stack_variables(settings.root)
    return sorted(name for name, value in settings.planning.items() if value and name in known - used)


def _extra_args(role: str) -> str:
    return f"EPD_{role.upper().replace('-', '_')}_EXTRA_ARGS"


def _is_file(name: str) -> bool:
    return name.endswith(("_FILE", "_TLS_CERT", "_TLS_KEY"))


def write_files(folder: Path, cluster: kubernetes.Cluster) -> list[Path]:
    """Write the files, and take away those of an earlier plan; return them."""
    texts = kubernetes.render(cluster)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        if old.name not in texts:
            old.unlink()
    written = []
    for name, text in texts.items():
        path = folder / name
        path.write_text(text)
        written.append(path)
    return written
