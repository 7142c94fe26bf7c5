"""What one worker per engine runs for all: store client, I/O threads, prober, link to the scheduler, metrics port."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .access import StoreAccess
from .breaker import Breaker
from .compat import Engine
from .config import ConnectorConfig
from .device import Device
from .fetcher import Fetcher
from .keys import KEY_PREFIX
from .link import Confirm, Confirmed, Counts, Fetch, LinkServer, Missing, Release, Request
from .metrics import Collector, Metrics, MetricsServer, add_sums
from .native import SumsTaker
from .publisher import Publisher
from .slab import OwnedDirectory
from .staging import make_staging
from .store.base import Store, StoreError, StoreUnavailableError
from .tensors import EmbeddingTensor

log = logging.getLogger(__name__)

PROBE_KEY = f"{KEY_PREFIX}/probe"
JOIN_TIMEOUT_S = 2.0
LOG_INTERVAL_S = 60.0
"""One line of what was counted, when anything was, after so long."""


class StoreService:
    """Owns everything that talks to the store. Raises ConfigError when something cannot be set up on this host.

    ``find_tensor`` returns an embedding from vLLM's own encoder cache, or None.
    """

    def __init__(
        self,
        *,
        config: ConnectorConfig,
        engine: Engine,
        directory: Path,
        store: Store,
        metrics: Metrics,
        device: Device,
        find_tensor: Callable[[str], EmbeddingTensor | None],
    ) -> None:
        self._config = config
        self._store = store
        self._device = device
        self._find_tensor = find_tensor
        self._scheduler_sums: Mapping[str, float] = {}
        self._counting = threading.Lock()
        self._closing = threading.Event()
        self._directory = OwnedDirectory(directory)
        try:
            self.staging = make_staging(config, engine.loader_count, directory, store, device)
            # A call is overdue when both the request that needs it and its own RPCs should have ended.
            self.breaker = Breaker(slow_s=max(config.fetch_timeout_ms, config.publish_timeout_ms) / 1000)
            self._metrics_server = self._start_metrics(metrics, engine.data_parallel_rank)
            self._pool = ThreadPoolExecutor(
                config.io_threads, thread_name_prefix="epd-ec-io", initializer=device.enter_thread
            )
            digest = engine.identity.digest()
            access = StoreAccess(store, self.breaker, self.staging, digest, metrics)
            self._fetcher = Fetcher(access)
            self.publisher = Publisher(access, self._submit, config.publish_timeout_ms / 1000)
            self._fetching = threading.Semaphore(config.io_threads)
            # One more than fetch at most, so that one always hears what the scheduler says.
            self._link = LinkServer(directory, self._handle, config.io_threads + 1, device.enter_thread)
        except Exception:
            self._directory.close()
            raise
        self._counted = SumsTaker(lambda: add_sums([metrics.snapshot(), self._scheduler_sums]))
        self._logged_at_s = time.monotonic()
        self._prober = threading.Thread(target=self._probe_until_closed, name="epd-ec-probe", daemon=True)
        self._prober.start()

    def close(self) -> None:
        """End all threads that can be ended in time, then let go of the store."""
        if self._closing.is_set():
            return
        self._closing.set()
        # First, because vLLM kills a worker that takes long to end. What is mapped and connected stays so.
        self._directory.close()
        self._link.close()
        if self._metrics_server is not None:
            self._metrics_server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        threads = [self._prober, *self._pool._threads, *self._link.threads]
        for thread in threads:
            if thread.ident is not None:  # only the first of the link's starts before the scheduler connects
                thread.join(timeout=JOIN_TIMEOUT_S)
        if not any(thread.is_alive() for thread in threads):
            # Only then: a call on a closed Mooncake client crashes the process.
            self._store.close()

    def _start_metrics(self, metrics: Metrics, data_parallel_rank: int) -> MetricsServer | None:
        if not self._config.metrics_port:
            return None
        gauges = {
            "epd_ec_breaker_open": lambda: float(self.breaker.is_open),
            "epd_ec_slab_used_bytes": lambda: float(self.staging.allocator.used_bytes),
        }
        collector = Collector([metrics.snapshot, lambda: self._scheduler_sums], gauges)
        return MetricsServer(collector, self._config.metrics_host, self._config.metrics_port + data_parallel_rank)

    def _submit(self, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                job()
            except Exception:
                log.exception("A job of the store service failed.")

        self._pool.submit(run)

    def _handle(self, message: Request) -> None:
        if isinstance(message, Fetch) and self.breaker.is_open:
            # Not behind I/O that hangs: a scheduler may be standing still for this answer.
            self._link.reply(Missing(message.item_id, "store_down"))
        elif isinstance(message, Fetch):
            self._fetch(message)
        elif isinstance(message, Confirm):
            self._submit(lambda: self._confirm(message.item_id))
        elif isinstance(message, Release):
            self.staging.allocator.release(message.offset, message.after_step)
        elif isinstance(message, Counts):
            with self._counting:  # several threads take messages: the older of two must not come last
                if sum(message.sums.values()) >= sum(self._scheduler_sums.values()):
                    self._scheduler_sums = message.sums

    def _fetch(self, message: Fetch) -> None:
        if not self._fetching.acquire(blocking=False):
            self._submit(lambda: self._link.reply(self._fetcher.fetch(message)))
            return
        # On this thread: to wake another takes as long as a look-up.
        try:
            self._link.reply(self._fetcher.fetch(message))
        finally:
            self._fetching.release()

    def _confirm(self, item_id: str) -> None:
        try:
            self.publisher.republish(item_id, lambda: self._find_tensor(item_id))
        finally:
            self._link.reply(Confirmed(item_id))

    def _log_counts(self) -> None:
        if time.monotonic() - self._logged_at_s < LOG_INTERVAL_S:
            return
        self._logged_at_s = time.monotonic()
        if (counted := self._counted.take()) is not None:
            log.info("Since the last such line: %s", ", ".join(f"{k}={v}" for k, v in counted.reduce().items()))

    def _probe_until_closed(self) -> None:
        self._device.enter_thread()
        is_connected = False
        was_open = True
        while not self._closing.is_set():
            try:
                if not is_connected:
                    self._store.connect(self.staging.registered)
                    is_connected = True
                self._store.exists(PROBE_KEY)
                self.breaker.record_probe(None)
            except StoreError as error:
                self.breaker.record_probe(error)
                log.log(logging.DEBUG if was_open else logging.WARNING, "A probe of the store failed: %s", error)
            except Exception as error:
                self.breaker.record_probe(StoreUnavailableError(str(error)))
                log.exception("The store's probe failed.")
            is_open = self.breaker.is_open
            if is_open != was_open:
                log.warning("The store is %s now.", "not used, items are encoded locally," if is_open else "used")
            was_open = is_open
            self._log_counts()
            self._closing.wait(self._config.probe_interval_ms / 1000)
