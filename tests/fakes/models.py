"""What the config.json of real models says of their shapes: that which sizes are computed from."""

_QWEN3_VISION = {"depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 4304,
                 "patch_size": 16, "spatial_merge_size": 2, "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip
_QWEN3_TEXT = {"dtype": "bfloat16", "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144}
_EXPERTS = _QWEN3_TEXT | {"num_key_value_heads": 4, "num_experts": 128}

QWEN25_VL_7B = {
    "torch_dtype": "bfloat16", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    "max_position_embeddings": 128000,
    "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
                      "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2},
}  # fmt: skip
QWEN3_VL_8B = {
    "text_config": _QWEN3_TEXT | {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
                                  "num_key_value_heads": 8, "intermediate_size": 12288},
    "vision_config": _QWEN3_VISION,
}  # fmt: skip
QWEN3_VL_30B_A3B = {
    "text_config": _EXPERTS | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
                               "intermediate_size": 6144, "moe_intermediate_size": 768},
    "vision_config": _QWEN3_VISION,
}  # fmt: skip
QWEN3_VL_235B_A22B = {
    "text_config": _EXPERTS | {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64,
                               "intermediate_size": 12288, "moe_intermediate_size": 1536},
    "vision_config": _QWEN3_VISION,
}  # fmt: skip

PUBLISHED_GB = {
    "qwen2.5-vl-7b": (QWEN25_VL_7B, 16.58),
    "qwen3-vl-8b": (QWEN3_VL_8B, 17.53),
    "qwen3-vl-30b-a3b": (QWEN3_VL_30B_A3B, 62.14),
    "qwen3-vl-235b-a22b": (QWEN3_VL_235B_A22B, 471.4),
}
"""The shapes of each recipe's model, and the published size of its weights in GB."""
