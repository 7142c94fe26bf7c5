"""The proxy as a process, and beside it on a port of its own what is in it now: `inspected.py INSPECT_PORT FLAGS…`."""

import asyncio
import gc
import os
import sys
from typing import Any

import uvloop
from aiohttp import web

from epd_proxy import logs
from epd_proxy.app import FLOW, HANDLERS, STAGES, build_app, make_runner
from epd_proxy.settings import load_config


def resident_bytes() -> int:
    """What the process has in memory now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def state(app: web.Application) -> dict[str, Any]:
    """Return what has to be the same before a load and after it."""
    gc.collect()
    endpoints = [endpoint for pool in app[STAGES].pools.values() for endpoint in pool.endpoints]
    return {
        "resident_bytes": resident_bytes(),
        "objects": len(gc.get_objects()),
        "tasks": len(asyncio.all_tasks()),
        "leases": sum(endpoint.active_leases for endpoint in endpoints),
        "cost": sum(endpoint.active_cost for endpoint in endpoints),
        "bodies_bytes": app[HANDLERS].bodies.held_bytes,
        "handlers": repr(app[HANDLERS]),
        "connections_in_use": app[STAGES].upstream.in_use,
        "flow": repr(app[FLOW]) if "running" in repr(app[FLOW]) else "",
    }


async def serve(port: int, flags: list[str]) -> None:
    """Run the proxy with ``flags`` and tell at ``port`` what is in it."""
    config = load_config(flags, {})
    logs.set_up(config.logging.level, config.logging.style)
    app = build_app(config)
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, config.listen.host, config.listen.port, backlog=4096).start()
    inspect = web.Application()

    async def show(_request: web.Request) -> web.Response:
        return web.json_response(state(app), headers={"Connection": "close"})

    inspect.router.add_get("/", show)
    inspector = web.AppRunner(inspect, access_log=None)
    await inspector.setup()
    await web.TCPSite(inspector, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2:]))
