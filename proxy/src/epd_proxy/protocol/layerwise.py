"""The requests of the layerwise handshake, and which requests cannot take part in it.

Facts from vLLM 0.23.0 and vllm-ascend 0.23.0, see docs/layerwise-on-cpu.md.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from .apis import CHAT, COMPLETIONS, MESSAGES, Api
from .inline import Inline
from .requests import InferenceRequest
from .writing import with_member, write_json

# They shape the answer, which decode gives; on prefill they could only make its one token fail.
_DECODE_ONLY = (
    "stream_options", "n", "best_of", "response_format", "structured_outputs", "logprobs", "top_logprobs", "request_id",
)  # fmt: skip
# vLLM never uses block 0 (the null block, BlockPool), so what is written there harms nobody.
_NULL_BLOCK = 0
# More than the shortest chat message takes: prefill's engine ends if it has more blocks to send than addresses.
_RELEASE_BLOCKS = 256


def why_not_split(request: InferenceRequest) -> str | None:
    """Return why prefill and decode of ``request`` have to stay on one instance, or None when they can be split.

    Split, these crash an engine, answer wrongly or never end. Values of unexpected types count as given: vLLM may
    accept them.
    """
    given = request.document.get
    checks = {
        "path": not request.api.splits,
        "n": given("n") not in (None, 1),
        "best_of": given("best_of") not in (None, 1),
        "use_beam_search": given("use_beam_search") not in (None, False),
        "prompt_logprobs": given("prompt_logprobs") is not None,
        # vLLM takes echo with logprobs for prompt_logprobs; for a chat, where top_logprobs is 0 by default, always.
        "echo": given("echo") not in (None, False) and (request.api is CHAT or given("logprobs") is not None),
        # -1 cuts the prompt to what max_tokens leaves room for, and prefill's max_tokens is another.
        "truncate_prompt_tokens": _is_relative(given("truncate_prompt_tokens")),
        "prompt_embeds": given("prompt_embeds") is not None or _has_embedded_prompt(given("messages")),
        "prompt": request.api is COMPLETIONS and not _is_one_prompt(given("prompt")),
    }
    return next((name for name, found in checks.items() if found), None)


def _is_relative(limit: object) -> bool:
    return limit is not None and not (isinstance(limit, int) and limit >= 0)


def _is_one_prompt(prompt: object) -> bool:
    """Whether it is a string or token ids, or a list of one of these."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    return isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(token, int) for token in prompt))


def _has_embedded_prompt(messages: object) -> bool:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and (part.get("type") == "prompt_embeds" or "prompt_embeds" in part):
                return True
    return False


def decode_body(request: InferenceRequest, callback_url: str) -> bytes:
    """Return what decode receives: the client's body as it came, and where to call back."""
    return with_parameters(request, {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": callback_url})


def with_parameters(request: InferenceRequest, parameters: Mapping[str, Any]) -> bytes:
    """Return the client's body as it came, and the parameters of its KV."""
    # The client's own parameters were removed on arrival, so this is the only key of its name.
    return with_member(request.body, "kv_transfer_params", parameters, first=not request.document)


def prefill_body(document: Mapping[str, Any], parameters: Mapping[str, Any], inline: Inline | None = None) -> bytes:
    """Return what prefill receives: the same prompt, one token to generate, and what decode called back with.

    ``inline`` are the contents that were cut out of ``document``.
    """
    body = {name: value for name, value in document.items() if name not in _DECODE_ONLY}
    body |= {"stream": False, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": parameters}
    if isinstance(output := body.get("output_config"), dict):  # of /v1/messages: its effort is part of the prompt
        body["output_config"] = {name: value for name, value in output.items() if name != "format"}
    if "max_completion_tokens" in body:
        body["max_completion_tokens"] = 1
    if body.get("tools") and body.get("tool_choice", "auto") != "none":
        # Tools are part of the prompt, so they stay. With "none" a server started with
        # --exclude-tools-when-tool-choice-none would leave them out; the other choices constrain or parse the answer.
        # null does neither.
        body["tool_choice"] = None
    return write_json(body, inline)


def release_api(api: Api) -> Api:
    """Return the API of a release: one under which vLLM gives a request the same internal id."""
    return CHAT if api is MESSAGES else api


def release_body(api: Api, model: str, parameters: Mapping[str, Any]) -> bytes:
    """Return the shortest prefill whose end makes decode free the blocks of an abandoned request.

    Its KV goes to the null block. Sent to the request's own blocks it would overwrite the first one, which others with
    the same beginning share.
    """
    groups = parameters.get("remote_block_ids")
    nested = isinstance(groups, list) and any(isinstance(group, list) for group in groups)
    nowhere: list[Any] = [_NULL_BLOCK] * _RELEASE_BLOCKS
    body: dict[str, Any] = {
        "stream": False,
        "max_tokens": 1,
        "min_tokens": 1,
        "kv_transfer_params": {
            **parameters,
            "remote_block_ids": [nowhere for _ in groups] if nested and isinstance(groups, list) else nowhere,
        },
    }
    if model:
        body["model"] = model
    if api is CHAT:
        body["messages"] = [{"role": "user", "content": "."}]
    else:
        body["prompt"] = [0]
    return orjson.dumps(body)
