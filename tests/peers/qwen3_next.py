"""Qwen3-Next of transformers: every layer with experts; and layers with and without, packed heads that differ in size.

The published files have the names that the class writes, and those of a module that predicts further tokens (`mtp.`),
which the class passes over by name.
"""

from __future__ import annotations

from peers import transformers_peer

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
}  # fmt: skip

transformers_peer("qwen3_next", "Qwen3NextConfig", "Qwen3NextForCausalLM", **SIZES)
transformers_peer(
    "qwen3_next", "Qwen3NextConfig", "Qwen3NextForCausalLM", label="mixed", **{**SIZES, "num_hidden_layers": 3},
    layer_types=["full_attention", "linear_attention", "full_attention"], decoder_sparse_step=2, mlp_only_layers=[0],
    attention_bias=True, norm_topk_prob=False, linear_conv_kernel_dim=3, tie_word_embeddings=True, rms_norm_eps=1e-3,
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    options={"max_shard_size": "40KB"},
)  # fmt: skip
