"""OpenAI JSON to dataclasses and back. Pure: no I/O, no state."""

from .answers import error_for, find_fetch_failure, is_openai_error
from .apis import APIS, CHARS_PER_TOKEN, CHAT, COMPLETIONS, MESSAGES, RESPONSES, Api
from .encode import encode_body
from .headers import Headers, choose_request_id, forwarded_headers, returned_headers, tenant_of, trace_id
from .layerwise import decode_body, prefill_body, release_api, release_body, why_not_split
from .media import MediaItem
from .requests import InferenceRequest, parse_request, strip_transfer_params

__all__ = [
    "APIS",
    "CHARS_PER_TOKEN",
    "CHAT",
    "COMPLETIONS",
    "MESSAGES",
    "RESPONSES",
    "Api",
    "Headers",
    "InferenceRequest",
    "MediaItem",
    "choose_request_id",
    "decode_body",
    "encode_body",
    "error_for",
    "find_fetch_failure",
    "forwarded_headers",
    "is_openai_error",
    "parse_request",
    "prefill_body",
    "release_api",
    "release_body",
    "returned_headers",
    "strip_transfer_params",
    "tenant_of",
    "trace_id",
    "why_not_split",
]
