"""OpenAI JSON to dataclasses and back. Pure: no I/O, no state."""

from .affinity import prefix_of
from .answers import error_for, find_fetch_failure, is_openai_error
from .apis import APIS, CHARS_PER_TOKEN, CHAT, COMPLETIONS, MESSAGES, RESPONSES, Api
from .bootstrap import BOOTSTRAP_PATH, RANK_HEADER, bootstrap_decode, bootstrap_prefill, find_engines
from .encode import encode_body
from .headers import Headers, choose_request_id, forwarded_headers, returned_headers, tenant_of, trace_id
from .layerwise import decode_body, prefill_body, release_api, release_body, why_not_split, with_parameters
from .media import MediaItem
from .overlap import can_wait, pending_body
from .pull import PULL_PREFILL, find_parameters
from .requests import InferenceRequest, parse_request, strip_transfer_params

__all__ = [
    "APIS",
    "BOOTSTRAP_PATH",
    "CHARS_PER_TOKEN",
    "CHAT",
    "COMPLETIONS",
    "MESSAGES",
    "PULL_PREFILL",
    "RANK_HEADER",
    "RESPONSES",
    "Api",
    "Headers",
    "InferenceRequest",
    "MediaItem",
    "bootstrap_decode",
    "bootstrap_prefill",
    "can_wait",
    "choose_request_id",
    "decode_body",
    "encode_body",
    "error_for",
    "find_engines",
    "find_fetch_failure",
    "find_parameters",
    "forwarded_headers",
    "is_openai_error",
    "parse_request",
    "pending_body",
    "prefill_body",
    "prefix_of",
    "release_api",
    "release_body",
    "returned_headers",
    "strip_transfer_params",
    "tenant_of",
    "trace_id",
    "why_not_split",
    "with_parameters",
]
