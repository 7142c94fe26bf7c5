"""The commands of the embeddings' pool: Mooncake's master, and the store that owns the memory."""

from __future__ import annotations

from epd_serve.settings import Settings


def master_command(settings: Settings) -> list[str]:
    """Return the command of Mooncake's master with its HTTP metadata server."""
    return [
        "mooncake_master",
        f"--rpc_port={settings.mooncake_ports.rpc}",
        f"--metrics_port={settings.mooncake_ports.metrics}",
        "--enable_http_metadata_server=true",
        f"--http_metadata_server_port={settings.mooncake_ports.metadata}",
        # Or the address of a client that died stays, and its successor is refused.
        "--enable_metadata_cleanup_on_timeout=true",
        "--enable_metric_reporting=false",  # a log line of 2 kB every ten seconds; /metrics is not concerned
        "--logtostderr=true",
    ]


def store_command(settings: Settings) -> list[str]:
    """Return the command of the standalone client that owns the pool's memory, so it survives a vLLM restart."""
    return [
        "mooncake_client",
        f"--host={settings.advertise_host}",
        f"--port={settings.mooncake_ports.store}",
        f"--global_segment_size={settings.store_size_mb}MB",
        "--local_buffer_size=16MB",
        "--protocol=tcp",
        f"--master_server_address={settings.mooncake_host}:{settings.mooncake_ports.rpc}",
        f"--metadata_server={settings.mooncake_metadata}",
        "--enable_http_server=true",
        f"--http_port={settings.mooncake_ports.store_http}",
        "--logtostderr=true",
    ]
