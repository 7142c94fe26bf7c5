"""The roles that a container can have."""

VLLM_ROLES = ("encode", "prefill-decode", "prefill", "decode", "monolith")
EC_ROLES = ("encode", "prefill-decode", "prefill")
"""Those that hand over or take embeddings."""
KV_ROLES = ("prefill", "decode")
"""Those that hand over or take keys and values."""
ROLES = (*VLLM_ROLES, "mooncake-master", "mooncake-store", "proxy")
