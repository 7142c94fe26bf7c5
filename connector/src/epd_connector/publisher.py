"""Puts embeddings into the store, off the model thread, and lets the model thread wait for it, bounded."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from .access import StoreAccess
from .header import HEADER_SIZE_BYTES, Header, HeaderError, checksum
from .keys import hash_item_id
from .store.base import Draft, StoreError, StoreFullError, StoreUnavailableError
from .tensors import EmbeddingTensor, copy_to_memory, describe_tensor

log = logging.getLogger(__name__)

FIRST_BACK_OFF_S = 0.005
MAX_BACK_OFF_S = 0.1
BREAKER_POLL_S = 0.02


@dataclass(frozen=True)
class Item:
    """An embedding on its way to the store: the payload is in ``draft``, ``blank`` its header but for the checksum.

    ``deadline_s``, of time.monotonic, is when to give up.
    """

    item_id: str
    blank: Header
    draft: Draft
    deadline_s: float


class Publisher:
    """Copies on the caller's thread, stores on the threads of ``submit``.

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
        """Copy the embedding (rows first, any device) and have it stored; drop it when that cannot be."""
        if self._step_started_s is None:
            self._step_started_s = time.monotonic()
        item = self._prepare(item_id, tensor, self._step_started_s + self._timeout_s)
        if item is None:
            return
        with self._changed:
            self._pending += 1
        self._submit(lambda: self._put_pending(item))

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
        item = self._prepare(item_id, tensor, deadline_s)
        if item is not None and self._put(item):
            self._metrics.count("epd_ec_republished")

    def _put_pending(self, item: Item) -> None:
        try:
            self._put(item)
        finally:
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()

    def _prepare(self, item_id: str, tensor: EmbeddingTensor, deadline_s: float) -> Item | None:
        """Copy the payload and return the item; None, counted, when there is no place for it."""
        if self._breaker.is_open:
            self._fail(item_id, "store_down")
            return None
        try:
            dtype, shape = describe_tensor(tensor)
            blank = Header(dtype, shape, 0, hash_item_id(item_id))
        except HeaderError as error:
            self._fail(item_id, "unsupported", error)
            return None
        if blank.object_size_bytes > self._access.allocator.size_bytes:
            self._fail(item_id, "too_large")
            return None
        draft = self._access.find_draft(blank.object_size_bytes, deadline_s - time.monotonic())
        if draft is None:
            self._fail(item_id, "slab_full")
            return None
        try:
            copy_to_memory(tensor, draft.data[HEADER_SIZE_BYTES:])
        except Exception:
            draft.close()
            raise
        return Item(item_id, blank, draft, deadline_s)

    def _put(self, item: Item) -> bool:
        try:
            header = replace(item.blank, payload_checksum=checksum(item.draft.data[HEADER_SIZE_BYTES:]))
            item.draft.data[:HEADER_SIZE_BYTES] = header.pack()
            with self._metrics.time("epd_ec_put_seconds"):
                self._put_with_retries(item)
        except StoreFullError as error:
            self._fail(item.item_id, "no_space", error)
        except StoreUnavailableError as error:
            self._fail(item.item_id, "store_down", error)
        except StoreError as error:
            self._fail(item.item_id, "store_error", error)
        else:
            self._metrics.count("epd_ec_published")
            self._metrics.count("epd_ec_put_bytes", len(item.draft.data))
            return True
        finally:
            item.draft.close()
        return False

    def _put_with_retries(self, item: Item) -> None:
        key = self._access.key_of(item.item_id)
        back_off_s = FIRST_BACK_OFF_S
        while True:
            error: StoreError
            try:
                with self._breaker.operation():
                    item.draft.put(key)
                    # A put of an object that another encoder is writing returns at once: look whether it is visible.
                    if self._store.exists(key):
                        return
                error = StoreError("the object did not become visible")
            except StoreFullError as full:
                error = full
            if time.monotonic() + back_off_s >= item.deadline_s or self._breaker.is_open:
                raise error
            time.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, MAX_BACK_OFF_S)

    def _fail(self, item_id: str, reason: str, error: Exception | None = None) -> None:
        self._metrics.count("epd_ec_publish_failures", label=reason)
        log.warning("Item %s is not published (%s): %s", item_id, reason, error or "consumers will encode it")
