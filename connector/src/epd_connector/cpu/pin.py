"""The vllm-ascend release the host-memory adapter was written against."""

from importlib.metadata import PackageNotFoundError, version

PINNED_VLLM_ASCEND = "0.23.0"


def require_pinned_vllm_ascend() -> None:
    """Refuse any other vllm-ascend: the adapter replaces parts of it by name, and those move between releases.

    Raises:
        ImportError: vllm-ascend is missing or of another version; the message says what to install.
    """
    try:
        found = version("vllm-ascend")
    except PackageNotFoundError:
        found = "none"
    if found != PINNED_VLLM_ASCEND:
        raise ImportError(
            f"the CPU profile's layerwise KV connector expected vllm-ascend {PINNED_VLLM_ASCEND}, found {found}. "
            f"Install it with `pip install --no-deps vllm-ascend=={PINNED_VLLM_ASCEND}`; "
            "on an NPU, leave `kv_connector_module_path` out of --kv-transfer-config: "
            "vllm-ascend registers MooncakeLayerwiseConnector itself."
        )
