"""Composition root: makes the parts, joins them, starts and stops them."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from .admin import Admin
from .config import ProxyConfig
from .flows import Flow, Stages, choose_flow
from .handlers import Handlers
from .health import Prober
from .inventory import read_instances
from .keyring import Keyring, read_keys
from .membership import Membership
from .metaserver import Metaserver
from .metrics import Metrics
from .pool import Pool
from .reloads import Reloads
from .status import Status
from .upstream import Upstream

log = logging.getLogger(__name__)

HANDLERS = web.AppKey("handlers", Handlers)
STAGES = web.AppKey("stages", Stages)
FLOW: web.AppKey[Flow] = web.AppKey("flow", Flow)
METASERVER: web.AppKey[Metaserver | None] = web.AppKey("metaserver")
MEMBERSHIP = web.AppKey("membership", Membership)
ADMIN: web.AppKey[Admin | None] = web.AppKey("admin")
_PROBER = web.AppKey("prober", Prober)
_RELOADS = web.AppKey("reloads", Reloads)


def build_app(config: ProxyConfig) -> web.Application:
    """Return the application."""
    metrics = Metrics()
    # An encode stage may be empty: encoders can come later.
    pools = {stage: Pool(stage, urls) for stage, urls in ({"encode": ()} | config.topology.stages()).items()}
    stages = Stages(pools, Upstream(config.timeouts), config, metrics)
    metrics.watch_endpoints(lambda: [sample for pool in pools.values() for sample in pool.samples()])
    metaserver = Metaserver(config.metaserver.resolved()) if "decode" in pools else None
    flow = choose_flow(stages, metaserver)
    prober = Prober(pools.values(), stages.upstream, config.health)
    membership = Membership(config, pools, prober.follow)
    handlers = Handlers(flow, metrics, config, membership.staffed)
    reloads = Reloads(metrics)
    admin = _build_admin(config, membership, stages.upstream, reloads)
    if config.instances_file:
        path = Path(config.instances_file)
        reloads.watch("instances", (path,), lambda: read_instances(path), membership.become, config.topology)

    app = web.Application(middlewares=[handlers.answer_errors])
    app[HANDLERS] = handlers
    app[STAGES] = stages
    app[FLOW] = flow
    app[METASERVER] = metaserver
    app[MEMBERSHIP] = membership
    app[ADMIN] = admin
    app[_PROBER] = prober
    app[_RELOADS] = reloads
    handlers.add_routes(app)
    Status(pools, metrics).add_routes(app)
    app.cleanup_ctx.append(_run_backends)
    return app


def _build_admin(config: ProxyConfig, membership: Membership, upstream: Upstream, reloads: Reloads) -> Admin | None:
    if not config.admin.port:
        return None
    path = Path(config.admin.keys_file)
    keys = read_keys(path)
    keyring = Keyring(keys)
    reloads.watch("admin-keys", (path,), lambda: read_keys(path), keyring.exchange, keys)
    return Admin(config.admin, keyring, membership, upstream)


def make_runner(app: web.Application) -> web.AppRunner:
    """Return the server of ``app``, not yet listening."""
    return web.AppRunner(
        app,
        access_log=None,  # one line of our own a request, see logs
        handler_cancellation=True,  # a client that leaves ends its handler, and with it every stage
        shutdown_timeout=1.0,  # the draining before it has waited already
    )


async def serve(config: ProxyConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends it at once."""
    app = build_app(config)
    runner = make_runner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.listen.host, config.listen.port, backlog=4096, reuse_address=True)
        await site.start()
        log.info("listening on %s", ", ".join(f"{name[0]}:{name[1]}" for name in runner.addresses))
        _warn_of_missing_encoders(config)
        await _signalled()
        await site.stop()
        await app[HANDLERS].drain(config.timeouts.drain_s)
    finally:
        await runner.cleanup()


async def _signalled() -> None:
    loop = asyncio.get_running_loop()
    came = asyncio.Event()

    def note(number: signal.Signals) -> None:
        log.info("%s: no new requests from here on", number.name)
        came.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note, number)
    await came.wait()


def _warn_of_missing_encoders(config: ProxyConfig) -> None:
    if not config.topology.encode:
        log.warning("no --encode instance: pictures, videos and sounds are encoded where they are prefilled")


async def _run_backends(app: web.Application) -> AsyncIterator[None]:
    stages, prober = app[STAGES], app[_PROBER]
    await stages.upstream.start()
    prober.follow()
    reloading = asyncio.create_task(app[_RELOADS].run(), name="reloads")
    listeners = [each for each in (app[METASERVER], app[ADMIN]) if each]
    try:
        for listener in listeners:
            await listener.start()
        yield
    finally:
        await app[FLOW].close()
        for listener in listeners:
            await listener.close()
        reloading.cancel()
        await asyncio.wait((reloading,))
        await app[MEMBERSHIP].close()
        await prober.close()
        await stages.upstream.close()
