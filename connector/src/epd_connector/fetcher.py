"""Brings objects from the store into memory, and lets nothing through that is not verified."""

import logging
from collections.abc import Callable

from .access import StoreAccess
from .header import HEADER_SIZE_BYTES, HeaderError, WrongRowsError, verify_object
from .keys import hash_item_id
from .link import Fetch, Missing, Ready, Reply
from .metadata import Location
from .store.base import StoreError, StoreTimeoutError, StoreUnavailableError

log = logging.getLogger(__name__)

ROOM_TIMEOUT_S = 0.05


class Fetcher:
    """Answers one Fetch after the other; called from the service's I/O threads."""

    def __init__(self, access: StoreAccess) -> None:
        self._access = access
        self._store = access.store
        self._breaker = access.breaker
        self._metrics = access.metrics

    def fetch(self, request: Fetch) -> Reply:
        """Return where the item lies, or why it does not. Never raises."""
        if self._breaker.is_open:
            return Missing(request.item_id, "store_down")
        try:
            with self._metrics.time("epd_ec_get_seconds"):
                return self._fetch_patiently(request)
        except StoreUnavailableError as error:
            log.warning("The store does not answer: %s", error)
            return Missing(request.item_id, "store_down")
        except StoreError as error:
            log.warning("Item %s could not be read: %s", request.item_id, error)
            return Missing(request.item_id, "store_error")
        except Exception:  # no memory, say: without an answer the request would wait for all of its time
            log.exception("Item %s could not be read.", request.item_id)
            return Missing(request.item_id, "store_error")

    def _fetch_patiently(self, request: Fetch) -> Reply:
        # One late answer is no reason to encode: the scheduler's own time limit says when it is.
        try:
            return self._fetch(request)
        except StoreTimeoutError as error:
            log.info("Item %s is asked for once more: %s", request.item_id, error)
            return self._fetch(request)

    def _fetch(self, request: Fetch) -> Reply:
        key = self._access.key_of(request.item_id)
        with self._breaker.operation():
            size_bytes = self._store.find_size(key)
        if size_bytes is None:
            return Missing(request.item_id, "absent")
        if size_bytes < HEADER_SIZE_BYTES:
            return self._refuse(request, key, HeaderError(f"object has {size_bytes} bytes"))
        if size_bytes > self._access.staging.allocator.size_bytes:
            return Missing(request.item_id, "too_large")
        offset = self._access.staging.allocator.allocate(size_bytes, ROOM_TIMEOUT_S)
        if offset is None:
            return Missing(request.item_id, "slab_full")
        return self._release_unless_ready(offset, lambda: self._read(request, key, offset, size_bytes))

    def _release_unless_ready(self, offset: int, read: Callable[[], Reply]) -> Reply:
        reply: Reply | None = None
        try:
            reply = read()
        finally:
            if not isinstance(reply, Ready):
                self._access.staging.allocator.release(offset)
        return reply

    def _read(self, request: Fetch, key: str, offset: int, size_bytes: int) -> Reply:
        region = self._access.staging.open(offset, size_bytes)
        with self._breaker.operation():
            read_bytes = self._store.get(key, region)
        if read_bytes is None:
            return Missing(request.item_id, "absent")
        self._metrics.count("epd_ec_get_bytes", read_bytes)
        try:
            read = self._access.staging.accept(offset, read_bytes)
            header = verify_object(read, hash_item_id(request.item_id), request.rows)
        except WrongRowsError as error:
            log.warning("Item %s is not used: %s", request.item_id, error)
            return Missing(request.item_id, "wrong_rows")
        except HeaderError as error:
            return self._refuse(request, key, error)
        return Ready(request.item_id, Location(offset, header.payload_size_bytes, header.dtype, header.shape))

    def _refuse(self, request: Fetch, key: str, error: HeaderError) -> Reply:
        # A put never replaces an object: without this the item would be broken until it is evicted.
        log.warning("Item %s in the store is corrupt (%s): removing it.", request.item_id, error)
        with self._breaker.operation():
            self._store.remove(key)
        return Missing(request.item_id, "corrupt")
