"""The proxy as a process, and beside it on a port of its own what is in it now: `inspected.py INSPECT_PORT FLAGS…`."""

import asyncio
import gc
import json
import os
import sys
from typing import Any

import uvloop

from epd_proxy import logs, memory
from epd_proxy.app import App, build_app
from epd_proxy.server import Listener, Request, Response
from epd_proxy.settings import load_config


def resident_bytes(pid: int | str = "self") -> int:
    """What a process has in memory now."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def state(app: App) -> dict[str, Any]:
    """Return what has to be the same before a load and after it."""
    gc.collect()
    endpoints = [endpoint for pool in app.stages.pools.values() for endpoint in pool.endpoints]
    return {
        "resident_bytes": resident_bytes(),
        "objects": len(gc.get_objects()),
        "tasks": sum(not task.get_name().startswith("client ") for task in asyncio.all_tasks()),
        "clients": len(app.listener.connections),
        "leases": sum(endpoint.active_leases for endpoint in endpoints),
        "cost": sum(endpoint.active_cost for endpoint in endpoints),
        "bodies_bytes": app.handlers.bodies.held_bytes,
        "handlers": repr(app.handlers),
        "connections_in_use": app.stages.upstream.in_use,
        "flow": repr(app.flow) if "running" in repr(app.flow) else "",
    }


async def serve(port: int, flags: list[str]) -> None:
    """Run the proxy with ``flags`` and tell at ``port`` what is in it."""
    config = load_config(flags, {})
    memory.set_up()
    logs.set_up(config.logging.level, config.logging.style)
    app = build_app(config)

    async def show(_request: Request) -> Response:
        return Response(200, json.dumps(state(app)).encode(), [("Connection", "close")])

    async with app.running():
        await app.listener.start(config.listen.host, config.listen.port)
        await Listener(show).start("127.0.0.1", port)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2:]))
