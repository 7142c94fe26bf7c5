"""How much memory a model takes, from its config.json. Estimates: the docstrings say of what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd.errors import StepError

MIB = 1 << 20
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ACTIVATIONS_MIB = 4096
"""Kept free on a card for the runtime, HCCL buffers and activations. An estimate, not measured on an NPU."""
PICTURE_PIXELS = 1 << 20
"""A picture of 1024 x 1024 pixels, to make sizes tangible."""


@dataclass(frozen=True)
class ModelSize:
    """What decides how much memory a multimodal model takes."""

    name: str
    weights_bytes: int
    """All weights, vision tower included: an encoder loads them too."""
    exact: bool
    """Whether that is the size of files, not computed from the shapes in config.json."""
    kv_bytes_per_token: int
    """Keys and values of all layers, before they are split over cards."""
    kv_heads: int
    embedding_bytes_per_token: int
    """One visual token as the EC connector hands it over; DeepStack layers are part of it."""
    pixels_per_token: int
    context_tokens: int
    """The longest context the model was made for."""
    heads: int = 0
    """Attention heads of the language model; 0 where they are not known."""

    @property
    def picture_tokens(self) -> int:
        """Visual tokens of a picture of 1024 x 1024 pixels."""
        return PICTURE_PIXELS // self.pixels_per_token

    @property
    def picture_bytes(self) -> int:
        """Its embedding in the EC store."""
        return self.picture_tokens * self.embedding_bytes_per_token

    def weights_mib(self, tensor: int) -> int:
        """Return the weights on each of `tensor` cards, rounded up."""
        return -(-self.weights_bytes // tensor // MIB)

    def kv_bytes_per_card(self, tensor: int) -> int:
        """Return keys and values of one token on each card; with fewer heads than cards, heads are on several."""
        return self.kv_bytes_per_token // min(tensor, self.kv_heads)


def read_folder(folder: Path) -> ModelSize:
    """Return the sizes of the model in a folder.

    Raises:
        StepError: config.json is missing or not one of a Qwen-VL-like model.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise StepError(
            "cannot read the model's config.json",
            expected="the folder of a Hugging Face model",
            found=str(error),
            fix="name the folder that has config.json in it: MODEL=/path/to/model",
        ) from error
    if not isinstance(config, dict):
        config = {}  # refused below, with the same advice
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return from_config(folder.name, config, files_bytes=files)


def from_config(name: str, config: Mapping[str, Any], *, files_bytes: int = 0) -> ModelSize:
    """Return the sizes that a config.json tells; `files_bytes` of weights, where they are there, are exact.

    Raises:
        StepError: a shape that the estimate needs is not in it.
    """
    # Qwen2.5-VL of transformers 4 has the text model's shapes at the top, later ones below text_config.
    text: Mapping[str, Any] = config.get("text_config") or config
    vision: Mapping[str, Any] = config.get("vision_config") or {}
    try:
        width = _BYTES.get(str(text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype")), 2)
        hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
        kv_heads = text.get("num_key_value_heads") or heads
        head = text.get("head_dim") or hidden // heads
        levels = 1 + len(vision.get("deepstack_visual_indexes") or [])
        side = vision["patch_size"] * vision["spatial_merge_size"]
        parameters = _text(text, head) + _vision(vision, hidden)
    except (KeyError, TypeError) as error:
        raise StepError(
            f"cannot estimate the memory of {name}",
            expected="a config.json with text and vision shapes, as Qwen2.5-VL and Qwen3-VL have",
            found=f"no usable {error}",
            fix="serve it all the same: EPD_SKIP_MEMORY_CHECK=1",
        ) from error
    return ModelSize(
        name=name,
        weights_bytes=files_bytes or parameters * width,
        exact=files_bytes > 0,
        kv_bytes_per_token=2 * layers * kv_heads * head * width,
        kv_heads=kv_heads,
        embedding_bytes_per_token=hidden * levels * width,
        pixels_per_token=side * side,
        context_tokens=text.get("max_position_embeddings", 32768),
        heads=heads,
    )


def _text(text: Mapping[str, Any], head: int) -> int:
    """Return the parameters of the language model; norms and biases, below a thousandth, are left out."""
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
    experts = text.get("num_experts") or 0
    if experts:
        mlp = experts * (3 * hidden * text["moe_intermediate_size"] + hidden)
    else:
        mlp = 3 * hidden * text["intermediate_size"]
    tables = 1 if text.get("tie_word_embeddings") else 2
    return int(text["num_hidden_layers"] * (attention + mlp) + tables * text["vocab_size"] * hidden)


def _vision(vision: Mapping[str, Any], out: int) -> int:
    """Return the parameters of the vision tower and what projects its output to the language model's width."""
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    gates = 3 if vision.get("hidden_act") == "silu" else 2
    merged = hidden * vision["spatial_merge_size"] ** 2
    mergers = 1 + len(vision.get("deepstack_visual_indexes") or [])
    depth = vision["depth"]
    return int(depth * (4 * hidden * hidden + gates * hidden * inner) + mergers * (merged * merged + merged * out))
