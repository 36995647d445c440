"""DeepSeek-V2 and DeepSeek-V3 of transformers: queries with and without a latent, groups of experts, YaRN, biases."""

from __future__ import annotations

import torch

from peers import transformers_peer

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "kv_lora_rank": 10, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 7, "moe_intermediate_size": 20, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8, "mscale": 0.7,
    "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip


def with_bias(model):
    """Biases of the choice that decide something."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)


transformers_peer(
    "deepseek_v3", "DeepseekV3Config", "DeepseekV3ForCausalLM", prepare=with_bias, **SIZES, q_lora_rank=12, n_group=4,
    topk_group=2, rope_parameters=YARN,
)  # fmt: skip
transformers_peer(
    "deepseek_v3", "DeepseekV3Config", "DeepseekV3ForCausalLM", label="halves", prepare=with_bias, **SIZES,
    q_lora_rank=None, n_group=1, topk_group=1, rope_interleave=False, attention_bias=True, norm_topk_prob=False,
    n_shared_experts=2, tie_word_embeddings=True, rms_norm_eps=1e-3, options={"max_shard_size": "30KB"},
)  # fmt: skip
transformers_peer(
    "deepseek_v2", "DeepseekV2Config", "DeepseekV2ForCausalLM", **SIZES, q_lora_rank=None, rope_parameters=YARN,
)  # fmt: skip
transformers_peer(
    "deepseek_v2", "DeepseekV2Config", "DeepseekV2ForCausalLM", label="latent", **{**SIZES, "num_hidden_layers": 2},
    q_lora_rank=12, n_shared_experts=1, routed_scaling_factor=1.5, attention_bias=True,
)  # fmt: skip
