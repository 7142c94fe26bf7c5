"""Names of media items: what vLLM takes, as ``uuid``, for the identity of all that it caches of an item.

vLLM 0.23 uses a content part's uuid as it is: for the processor's cache, for blocks of KV and for the encoder cache.
Whoever knows a uuid can use what lies under it, or put something else there first. So every name is made here, with a
secret and the tenant in it: a client can name what it has sent itself, and nothing of anyone else's.
"""

from collections.abc import Mapping
from typing import Any

import blake3

from .writing import write_sorted

# They change what the encoder makes of the same content. vLLM mixes the first into a uuid, but never the second: by
# itself it takes one picture for the same on any background colour (ImageMediaIO, 0.23).
_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs")


class Namer:
    """Names the items of one request with a ``key`` of 32 bytes. ``used`` tells whether it gave any name."""

    def __init__(self, key: bytes, tenant: str, document: Mapping[str, Any]) -> None:
        self.used = False
        self._key = key
        self._tenant = tenant
        self._document = document
        self._content: blake3.blake3 | None = None

    def name_content(self, modality: str, media_type: str, content: bytes | memoryview) -> str:
        """Return the name of inline ``content``: the same for the same content and options of one tenant."""
        if self._content is None:
            options = {name: self._document[name] for name in _OPTIONS if self._document.get(name)}
            self._content = self._begin("content", write_sorted(options))
        hashed = self._content.copy()
        _add(hashed, modality.encode(), media_type.encode())
        hashed.update(content)
        self.used = True
        return hashed.hexdigest()

    def name_given(self, given: object) -> str:
        """Return the name for a uuid that the client gave: it holds for this tenant alone."""
        hashed = self._begin("uuid", write_sorted(given))
        self.used = True
        return hashed.hexdigest()

    def _begin(self, kind: str, text: bytes) -> blake3.blake3:
        hashed = blake3.blake3(key=self._key)
        _add(hashed, kind.encode(), self._tenant.encode("utf-8", "surrogateescape"), text)
        return hashed


def _add(hashed: blake3.blake3, *fields: bytes) -> None:
    """Add fields so that no two sequences of them look the same."""
    for field in fields:
        hashed.update(len(field).to_bytes(8, "big"))
        hashed.update(field)
