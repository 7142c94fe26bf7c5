"""From the settings to a stack's Kubernetes objects, below `deploy/`."""

from __future__ import annotations

from pathlib import Path

from epd import image_lock, images, planning, preflight, values
from epd.context import ROOT, Context
from epd.errors import StepError
from epd.plan import kubernetes
from epd.settings import Settings

_MEMORY_LIMIT = {"cpu": "6g"}
_NPU_MEMORY_LIMIT = "128g"
"""What compose/ says."""
_PASSED_ON = (
    "EPD_ALLOWED_MEDIA_DOMAINS", "EPD_INTERFACE", "EPD_JEMALLOC", "EPD_SKIP_PROBE", "HCCL_BUFFSIZE",
    "HCCL_INTRA_ROCE_ENABLE", "HCCL_OP_EXPANSION_MODE", "OMP_NUM_THREADS",
)  # fmt: skip
"""What every vLLM instance is told when it is set, as in compose/."""
_OF_THIS_HOST = frozenset({"EPD_PROXY_PORT", "EPD_PROXY_BIND", "EPD_PROXY_IMAGE", "EPD_PROXY_MEMORY_LIMIT"})
_TINY_MODEL = "/opt/ascend-epd/tiny-model"


def write(it: Context, _: list[str]) -> int:
    """Write the objects of the stack that is asked for; touch no cluster."""
    hardware = planning.choose_hardware(it.settings.hardware.lower(), it.machine)
    names = preflight.image_names(it.settings, it.versions, hardware)
    if not names:
        raise StepError(
            "the images' names cannot be told",
            expected=f"docker buildx, which reads {images.BAKE_FILE}",
            found="none that works",
            fix="make doctor",
        )
    cluster = describe(it.settings, hardware, image_lock.pinned(ROOT, names, it.settings.registry))
    folder = ROOT / "deploy" / cluster.topology.name / "kubernetes"
    print(f"{cluster.topology.name} ({hardware}): {cluster.topology.arithmetic()} cards in the cluster")
    for path in write_files(folder, cluster):
        print(f"  {path.relative_to(ROOT)}: written")
    left_out = sorted(name for name in it.settings.planning if name.startswith("EPD_PROXY_") and _is_file(name))
    if left_out:
        print(f"Left out, as they are files of this host: {', '.join(left_out)}; mount a Secret with an overlay")
    if cluster.model_folder:
        print(f"Needed: a PersistentVolumeClaim `models` with the folder {cluster.model_folder} in it")
    print(f"Then: kubectl apply -k {folder.relative_to(ROOT)}")
    return 0


def describe(settings: Settings, hardware: str, names: dict[str, str]) -> kubernetes.Cluster:
    """Return what the objects are made from; `names` are the images by variable.

    Raises:
        StepError: a setting is not usable, or there is no model to serve on NPUs.
    """
    told = settings.planning
    topology, limits = planning.wanted(settings, hardware)
    planning.check_model(told, hardware)
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
