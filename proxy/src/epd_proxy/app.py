"""Composition root: makes the parts, joins them, starts and stops them."""

import asyncio
import contextlib
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import logs
from .admin import Admin
from .announcements import State, announcements_in, read_state, write_state
from .config import ProxyConfig
from .cors import Cors
from .edge import TlsConfig
from .flows import Flow, Forwarding, Stages, choose_flow, wants_metaserver
from .guard import BackendKey, Guard
from .handlers import Handlers
from .health import Prober
from .inventory import read_instances
from .keyring import Keyring, read_keys, read_secret
from .known import KnownItems
from .membership import Membership
from .metaserver import Metaserver
from .metrics import Metrics
from .passing import Passing
from .pool import Pool
from .reloads import Reloads
from .restarts import Restarts
from .server import Listener, Routes
from .status import Status
from .tls import backend_context, load_certificate, read_certificate, server_context
from .tracing import Tracing
from .upstream import Upstream
from .workers import Shared

log = logging.getLogger(__name__)

# What answers say of who made them.
SERVER = "epd-proxy"
_REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class App:
    """The parts of a running proxy. ``listener`` is the clients'; it does not listen yet when the app has started."""

    handlers: Handlers
    stages: Stages
    flow: Flow
    metaserver: Metaserver | None
    membership: Membership
    admin: Admin | None
    listener: Listener
    prober: Prober
    reloads: Reloads
    restarts: Restarts

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run all that works beside the requests; at the end the clients' listener is closed before it."""
        await self.stages.upstream.start()
        # Before the first request: what operators did before this worker took another's place holds for it too.
        await self.reloads.look()
        self.prober.follow()
        self.restarts.start()
        tasks = [
            asyncio.create_task(self.reloads.run(), name="reloads"),
            asyncio.create_task(self._refresh_metrics(), name="metrics"),
        ]
        listeners = [each for each in (self.metaserver, self.admin) if each]
        try:
            for listener in listeners:
                await listener.start()
            yield
        finally:
            await self.listener.close()
            await self.flow.close()
            for listener in listeners:
                await listener.close()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self.membership.close()
            await self.prober.close()
            await self.restarts.close()
            await self.stages.upstream.close()
            self.stages.metrics.refresh()
            if self.stages.tracing:
                await asyncio.to_thread(self.stages.tracing.close)
            logs.flush()

    async def _refresh_metrics(self) -> None:
        """Keep the metrics up to date: whichever worker is asked for them answers for all."""
        while True:
            self.stages.metrics.refresh()
            await asyncio.sleep(_REFRESH_S)


def build_app(config: ProxyConfig, shared: Shared | None = None) -> App:
    """Return the application; ``shared`` is what it has with the other workers."""
    loads = shared.loads if shared else None
    metrics = Metrics()
    # An encode stage may be empty: encoders can come later.
    pools = {
        stage: Pool(stage, urls, loads, config.balance)
        for stage, urls in ({"encode": ()} | config.topology.stages()).items()
    }
    store = Pool("store", config.items.store)
    known = KnownItems(config.items.known_ttl_s, store.endpoints)
    tracing = Tracing(config.otlp_endpoint) if config.otlp_endpoint else None
    stages = Stages(pools, Upstream(config.timeouts, backend_context(config.tls)), config, metrics, known, tracing)
    metrics.watch_endpoints(lambda: [sample for pool in (*pools.values(), store) for sample in pool.samples()])
    metaserver = Metaserver(config.metaserver.resolved()) if wants_metaserver(config, pools) else None
    flow = choose_flow(stages, metaserver)
    prober = Prober((*pools.values(), store), stages.upstream, config.health)
    restarts = Restarts(store, stages.upstream)
    reloads = Reloads(metrics)
    membership = _build_membership(config, pools, prober, reloads, shared)
    first = shared is None or shared.index == 0
    admin = _build_admin(config, membership, stages.upstream, reloads) if first else None
    guard, backend_key = _build_guard(config, reloads)
    handlers = Handlers(
        flow, metrics, config, membership.staffed, guard=guard, backend_key=backend_key, tracing=tracing
    )

    routes = Routes(handlers.refuse)
    Status(pools, metrics, lambda: handlers.draining).add_routes(routes)
    handlers.add_routes(routes)
    Passing(handlers, Forwarding(stages), config.timeouts.first_byte_s).add_routes(routes)
    cors = Cors(config.access.origins) if config.access.origins else None
    listener = Listener(
        cors.answer_preflights(routes.handle) if cors else routes.handle,
        tls=_build_tls(config.tls, reloads),
        mark=cors.mark if cors else None,
        server=SERVER,
    )
    return App(handlers, stages, flow, metaserver, membership, admin, listener, prober, reloads, restarts)


def _build_membership(
    config: ProxyConfig, pools: Mapping[str, Pool], prober: Prober, reloads: Reloads, shared: Shared | None
) -> Membership:
    told = announcements_in(shared.folder) if shared else None

    def note_change() -> None:
        prober.follow()
        if shared and told and shared.index == 0:
            write_state(told, membership.state())

    membership = Membership(config, pools, note_change)
    if config.instances_file:
        path = Path(config.instances_file)
        reloads.watch("instances", (path,), lambda: read_instances(path), membership.become, config.topology)
    if told:
        nothing: State = {}
        reloads.watch("operators", (told,), lambda: read_state(told), membership.adopt, nothing)
    return membership


def _build_admin(config: ProxyConfig, membership: Membership, upstream: Upstream, reloads: Reloads) -> Admin | None:
    if not config.admin.port:
        return None
    return Admin(config.admin, _build_keyring("admin-keys", config.admin.keys_file, reloads), membership, upstream)


def _build_guard(config: ProxyConfig, reloads: Reloads) -> tuple[Guard | None, BackendKey | None]:
    """Return nothing where nobody is asked for anything: then requests go through none of it."""
    access, certificates = config.access, bool(config.tls.client_ca_file)
    keyring = _build_keyring("api-keys", access.keys_file, reloads) if access.keys_file else None
    guard = Guard(keyring, certificates=certificates) if keyring or certificates else None
    backend_key = BackendKey("") if keyring else None
    if access.backend_key_file:
        path = Path(access.backend_key_file)
        key = read_secret(path)
        backend_key = BackendKey(key)
        reloads.watch("backend-key", (path,), lambda: read_secret(path), backend_key.exchange, key)
    return guard, backend_key


def _build_keyring(what: str, file: str, reloads: Reloads) -> Keyring:
    path = Path(file)
    keys = read_keys(path)
    keyring = Keyring(keys)
    reloads.watch(what, (path,), lambda: read_keys(path), keyring.exchange, keys)
    return keyring


def _build_tls(config: TlsConfig, reloads: Reloads) -> ssl.SSLContext | None:
    context = server_context(config)
    if context:
        files = (Path(config.cert_file), Path(config.key_file))

        def show(_content: bytes) -> None:
            load_certificate(context, config)

        reloads.watch("tls", files, lambda: read_certificate(config), show, read_certificate(config))
    return context


async def serve(config: ProxyConfig, shared: Shared | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends it at once."""
    app = build_app(config, shared)
    async with app.running():
        await app.listener.start(config.listen.host, config.listen.port, reuse_port=shared is not None)
        log.info("listening on %s", ", ".join(_shown(*address) for address in app.listener.addresses))
        _warn_of_missing_encoders(config)
        await _signalled(shared)
        app.listener.stop()
        await app.handlers.drain(config.timeouts.drain_s)


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _signalled(shared: Shared | None) -> None:
    loop = asyncio.get_running_loop()
    came = asyncio.Event()

    def note(number: signal.Signals) -> None:
        log.info("%s: no new requests from here on", number.name)
        came.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note, number)
    if shared:  # a parent that is gone starts no worker and stops none
        loop.add_reader(shared.parent, came.set)
    await came.wait()
    if shared:
        loop.remove_reader(shared.parent)


def _warn_of_missing_encoders(config: ProxyConfig) -> None:
    if not config.topology.encode:
        log.warning("no --encode instance: pictures, videos and sounds are encoded where they are prefilled")
