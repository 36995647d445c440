"""Decoders with experts, of transformers."""

from __future__ import annotations

from peers import transformers_peer

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

transformers_peer(
    "mixtral", "MixtralConfig", "MixtralForCausalLM", **SIZES, num_local_experts=4, router_aux_loss_coef=0.02
)
transformers_peer(
    "mixtral", "MixtralConfig", "MixtralForCausalLM", label="tied", **SIZES, num_local_experts=4, sliding_window=9,
    tie_word_embeddings=True, head_dim=12,
)  # fmt: skip
transformers_peer(
    "olmoe", "OlmoeConfig", "OlmoeForCausalLM", **SIZES, num_experts=4, num_experts_per_tok=2, eos_token_id=2,
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3},
)  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
transformers_peer(
    "qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", **SIZES, **EXPERTS, shared_expert_intermediate_size=40,
    options={"max_shard_size": "30KB"},
)  # fmt: skip
transformers_peer(
    "qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", label="mixed", **SIZES, **EXPERTS, mlp_only_layers=[0],
    shared_expert_intermediate_size=40, use_sliding_window=True, sliding_window=7, max_window_layers=1,
    norm_topk_prob=True, qkv_bias=False,
)  # fmt: skip
