"""OpenAI JSON to dataclasses and back. Pure: no I/O, no state."""

from .answers import describe_fetch_failure, is_openai_error
from .encode import encode_body
from .headers import Headers, choose_request_id, forwarded_headers, returned_headers, trace_id
from .media import MediaItem
from .requests import CHAT, COMPLETIONS, Api, InferenceRequest, parse_request

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "Api",
    "Headers",
    "InferenceRequest",
    "MediaItem",
    "choose_request_id",
    "describe_fetch_failure",
    "encode_body",
    "forwarded_headers",
    "is_openai_error",
    "parse_request",
    "returned_headers",
    "trace_id",
]
