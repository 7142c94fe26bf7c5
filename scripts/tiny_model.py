#!/usr/bin/env python3
"""Make the tiny Qwen2.5-VL that the CPU profile serves: real architecture, random weights, 1.3 MB.

The weights are drawn with a standard deviation of 0.08 from one seed, large enough that the greedy answer depends
on the picture, so "the split stack answers as one vLLM does" is a real check. The answers themselves are gibberish.

The tokenizer knows the 256 bytes and Qwen's special tokens, so every prompt can be written without a download.

Needs torch, torchvision, transformers and tokenizers, all of them in the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

WEIGHT_STD = 0.08
PATCH_PIXELS = 28 * 28
MIN_IMAGE_TOKENS, MAX_IMAGE_TOKENS = 4, 256
MAX_POSITIONS = 32768
HEAD_WIDTH = 32

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] in ('video', 'video_url') -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer without merges: one token a byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Transformers 4 takes nothing but Qwen's own class in Qwen's processor; 5 gives that class no tokenizer_object.
    is_old = transformers.__version__.startswith("4.")
    make = transformers.Qwen2TokenizerFast if is_old else PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106 - tokens of the vocabulary, no secrets
        pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(
    tokenizer: PreTrainedTokenizerFast, *, vision_depth: int = 2, vision_width: int = 64, text_width: int = 128
) -> Qwen2_5_VLConfig:
    """Return the configuration.

    `vision_depth` layers of `vision_width` make the encoder as heavy as wanted, and `text_width` an embedding as large:
    it has that many values a token.
    """
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": text_width // HEAD_WIDTH,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_width,
            "intermediate_size": 2 * vision_width,
            "num_heads": vision_width // 16,
            "out_hidden_size": text_width,
            "fullatt_block_indexes": [vision_depth - 1],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def make_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Return the model in bfloat16; the norms keep their ones, all else is drawn in the order of the names."""
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "norm" not in name and not name.endswith("ln_q.weight"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * WEIGHT_STD)
    return model.to(torch.bfloat16)


def save(out: Path, *, seed: int = 0, **sizes: int) -> None:
    """Write model, tokenizer and processor to the folder `out`; `sizes` are those of :func:`make_config`."""
    tokenizer = make_tokenizer()
    size = {"shortest_edge": MIN_IMAGE_TOKENS * PATCH_PIXELS, "longest_edge": MAX_IMAGE_TOKENS * PATCH_PIXELS}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    model = make_model(make_config(tokenizer, **sizes), seed)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # the weights are written 0600, and another user serves them


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-depth", type=int, default=2, help="layers of the vision tower (default: %(default)s)")
    parser.add_argument("--vision-width", type=int, default=64, help="width of its layers, a multiple of 16")
    parser.add_argument("--text-width", type=int, default=128, help="width of embeddings, a multiple of 64")
    args = parser.parse_args()
    sizes = {"vision_depth": args.vision_depth, "vision_width": args.vision_width, "text_width": args.text_width}
    save(args.out, seed=args.seed, **sizes)
    size_bytes = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"wrote {args.out} ({size_bytes / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
