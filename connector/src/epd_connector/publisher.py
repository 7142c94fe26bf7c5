"""Puts embeddings into the store, off the model thread, and lets the model thread wait for it, bounded."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from .access import StoreAccess
from .header import Header, HeaderError, checksum
from .keys import hash_item_id
from .store.base import StoreError, StoreFullError, StoreUnavailableError
from .tensors import EmbeddingTensor, describe_tensor

log = logging.getLogger(__name__)

FIRST_BACK_OFF_S = 0.005
MAX_BACK_OFF_S = 0.1
BREAKER_POLL_S = 0.02


class Publisher:
    """Stages on the caller's thread, stores on the threads of ``submit``.

    ``timeout_s`` bounds, from the moment an item is handed over, both the retries of its put and the wait of
    the model thread at the end of the step.
    """

    def __init__(
        self,
        access: StoreAccess,
        submit: Callable[[Callable[[], None]], None],
        timeout_s: float,
    ) -> None:
        self._access = access
        self._store = access.store
        self._breaker = access.breaker
        self._metrics = access.metrics
        self._submit = submit
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._pending = 0
        self._step_started_s: float | None = None

    def save(self, item_id: str, tensor: EmbeddingTensor) -> None:
        """Stage the embedding (rows first, any device) and have it stored; drop it when that cannot be."""
        if self._step_started_s is None:
            self._step_started_s = time.monotonic()
        deadline_s = self._step_started_s + self._timeout_s
        put = self._prepare(item_id, tensor, deadline_s)
        if put is None:
            return
        with self._changed:
            self._pending += 1
        self._submit(lambda: self._run(put))

    def wait_for_step(self) -> None:
        """Wait until the items of this step are visible in the store, the time is up, or the store is given up."""
        started_s, self._step_started_s = self._step_started_s, None
        if started_s is None:
            return
        with self._metrics.time("epd_ec_barrier_seconds"), self._changed:
            deadline_s = started_s + self._timeout_s
            while self._pending and not self._breaker.is_open:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, BREAKER_POLL_S))
            if self._pending:
                self._metrics.count("epd_ec_barrier_timeouts")

    def republish(self, item_id: str, find_tensor: Callable[[], EmbeddingTensor | None]) -> None:
        """Put an item again if the store has lost it and vLLM's cache still holds it. Runs on an I/O thread."""
        if self._breaker.is_open:
            return
        deadline_s = time.monotonic() + self._timeout_s
        try:
            with self._breaker.operation():
                is_there = self._store.exists(self._access.key_of(item_id))
        except StoreError as error:
            log.warning("Item %s could not be looked up: %s", item_id, error)
            return
        tensor = None if is_there else find_tensor()
        if tensor is None:
            return
        put = self._prepare(item_id, tensor, deadline_s)
        if put is not None and put():
            self._metrics.count("epd_ec_republished")

    def _run(self, put: Callable[[], bool]) -> None:
        try:
            put()
        finally:
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()

    def _prepare(self, item_id: str, tensor: EmbeddingTensor, deadline_s: float) -> Callable[[], bool] | None:
        """Stage the payload and return what stores it; None, counted, when there is no place for it."""
        if self._breaker.is_open:
            self._fail(item_id, "store_down")
            return None
        try:
            dtype, shape = describe_tensor(tensor)
            blank = Header(dtype, shape, 0, hash_item_id(item_id))
        except HeaderError as error:
            self._fail(item_id, "unsupported", error)
            return None
        allocator = self._access.staging.allocator
        if blank.object_size_bytes > allocator.size_bytes:
            self._fail(item_id, "too_large")
            return None
        offset = allocator.allocate(blank.object_size_bytes, deadline_s - time.monotonic())
        if offset is None:
            self._fail(item_id, "slab_full")
            return None
        try:
            write = self._access.staging.stage(offset, tensor)
        except Exception:
            allocator.release(offset)
            raise

        def put() -> bool:
            try:
                header, payload = write()
                header[:] = replace(blank, payload_checksum=checksum(payload)).pack()
                return self._put(item_id, [header, payload], deadline_s)
            except Exception as error:
                self._fail(item_id, "store_error", error)
                raise
            finally:
                allocator.release(offset)

        return put

    def _put(self, item_id: str, parts: Sequence[memoryview], deadline_s: float) -> bool:
        try:
            with self._metrics.time("epd_ec_put_seconds"):
                self._put_with_retries(self._access.key_of(item_id), parts, deadline_s)
        except StoreFullError as error:
            self._fail(item_id, "no_space", error)
        except StoreUnavailableError as error:
            self._fail(item_id, "store_down", error)
        except StoreError as error:
            self._fail(item_id, "store_error", error)
        else:
            self._metrics.count("epd_ec_published")
            self._metrics.count("epd_ec_put_bytes", sum(map(len, parts)))
            return True
        return False

    def _put_with_retries(self, key: str, parts: Sequence[memoryview], deadline_s: float) -> None:
        back_off_s = FIRST_BACK_OFF_S
        while True:
            error: StoreError
            try:
                with self._breaker.operation():
                    self._store.put(key, parts)
                    # A put of an object that another encoder is writing returns at once: look whether it is visible.
                    if self._store.exists(key):
                        return
                error = StoreError("the object did not become visible")
            except StoreFullError as full:
                error = full
            if time.monotonic() + back_off_s >= deadline_s or self._breaker.is_open:
                raise error
            time.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, MAX_BACK_OFF_S)

    def _fail(self, item_id: str, reason: str, error: Exception | None = None) -> None:
        self._metrics.count("epd_ec_publish_failures", label=reason)
        log.warning("Item %s is not published (%s): %s", item_id, reason, error or "consumers will encode it")
