"""Names under which embeddings lie in the store: ``ec/v1/<sha256(model identity)>/<sha256(item id)>``.

Both parts are hashed: an item id may be a client's uuid, verbatim, and must not be able to shape the key.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

KEY_PREFIX = "ec/v1"


@dataclass(frozen=True)
class ModelIdentity:
    """Everything that changes an embedding although the item's id stays the same.

    Role, parallel sizes and quantisation of the language model are left out on purpose: instances that
    differ only in these share embeddings. ``mm_processor_kwargs`` are the server's: vLLM merges them after
    it hashed the item (vllm/multimodal/processing, 0.23.0). ``vllm_minor`` is in because the item hash itself
    changes between minor versions.
    """

    model: str
    revision: str | None = None
    dtype: str = ""
    vllm_minor: str = ""
    mm_processor_kwargs: Mapping[str, object] = field(default_factory=dict)
    hf_overrides: Mapping[str, object] = field(default_factory=dict)
    video_pruning_rate: float | None = None
    namespace: str = ""

    def digest(self) -> str:
        """Return 64 hex digits that are equal exactly when all fields are."""
        fields = {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "vllm_minor": self.vllm_minor,
            "mm_processor_kwargs": dict(self.mm_processor_kwargs),
            "hf_overrides": dict(self.hf_overrides),
            "video_pruning_rate": self.video_pruning_rate,
            "namespace": self.namespace,
        }
        # repr for what JSON does not know (torch dtypes, enums): stable between processes of one version.
        text = json.dumps(fields, sort_keys=True, default=repr, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def hash_item_id(item_id: str) -> bytes:
    """Return the 32-byte SHA-256 of an item id (any string, lone surrogates included)."""
    return hashlib.sha256(item_id.encode("utf-8", "surrogatepass")).digest()


def build_key(model_digest: str, item_id: str) -> str:
    """Return the store key of one item."""
    return f"{KEY_PREFIX}/{model_digest}/{hash_item_id(item_id).hex()}"
