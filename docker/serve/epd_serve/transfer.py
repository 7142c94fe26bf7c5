"""What vLLM is told of the caches that instances hand to each other: embeddings (EC) and keys and values (KV)."""

from __future__ import annotations

from epd_serve.hardware import HARDWARE
from epd_serve.settings import Settings


def ec_transfer_config(role: str, settings: Settings) -> dict[str, object]:
    """Return vLLM's --ec-transfer-config; keys under the extra config are those of connector/README.md."""
    ec_role = "ec_producer" if role == "encode" else "ec_consumer"
    if settings.ec_store == "example":
        extra = {"shared_storage_path": settings.ec_shared_dir}
        return {"ec_connector": "ECExampleConnector", "ec_role": ec_role, "ec_connector_extra_config": extra}
    return {
        "ec_connector": "ECMooncakeStoreConnector",
        "ec_connector_module_path": "epd_connector.connector",
        "ec_role": ec_role,
        "ec_connector_extra_config": {
            **ec_store_config(settings),
            **HARDWARE[settings.hardware].ec_limits,
            "copy_in_hooks": settings.ec_copy_in_hooks,
            "metrics_host": settings.bind_host,
            "metrics_port": settings.ec_metrics_port,
        },
    }


def ec_store_config(settings: Settings) -> dict[str, object]:
    """Return the part of the EC connector's configuration that says where embeddings are kept."""
    if settings.ec_store == "shared_dir":
        return {
            "store": "shared_dir",
            "shared_dir_path": settings.ec_shared_dir,
            "shared_dir_size_mb": settings.store_size_mb,
        }
    return {
        "store": "mooncake",
        "master_server_address": f"{settings.mooncake_host}:{settings.mooncake_ports.rpc}",
        "metadata_server": settings.mooncake_metadata,
        "local_hostname": settings.advertise_host,
    }


def kv_transfer_config(role: str, settings: Settings) -> dict[str, object]:
    """Return vLLM's --kv-transfer-config of a prefill or decode instance; each side has to know the sizes of both.

    No engine_id: vLLM draws a new one at each start. Prefill remembers the addresses of a decode instance by that id,
    so one that came back under the same id would be sent its KV to where it no longer listens
    (docs/layerwise-on-cpu.md).
    """
    own, peer = settings.parallel, settings.peer_parallel
    prefill, decode = (own, peer) if role == "prefill" else (peer, own)
    return {
        **HARDWARE[settings.hardware].kv_connector,
        "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
        "kv_port": str(settings.kv_port),
        "kv_connector_extra_config": {
            "prefill": {"dp_size": prefill.data, "tp_size": prefill.tensor},
            "decode": {"dp_size": decode.data, "tp_size": decode.tensor},
        },
    }
