"""Bamba and Falcon-H1 of transformers; Falcon's constants once at one and once away from it, which are folded."""

from __future__ import annotations

from peers import transformers_peer

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 1.7, "lm_head_multiplier": 0.4, "key_multiplier": 0.6, "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 1.3], "mlp_multipliers": [0.85, 0.6],
}  # fmt: skip

transformers_peer("bamba", "BambaConfig", "BambaForCausalLM", **SIZES, attn_layer_indices=[1])
transformers_peer(
    "bamba", "BambaConfig", "BambaForCausalLM", label="biases", **{**SIZES, "mamba_n_groups": 1},
    tie_word_embeddings=True, attn_layer_indices=[0, 2], mamba_proj_bias=True, mamba_conv_bias=False,
    attention_bias=True, mlp_bias=True, options={"max_shard_size": "40KB"},
    rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
)  # fmt: skip

FALCON = {**SIZES, "mamba_d_ssm": 64, "mamba_norm_before_gate": False}
transformers_peer(
    "falcon_h1", "FalconH1Config", "FalconH1ForCausalLM", **FALCON, mamba_rms_norm=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e11},
)  # fmt: skip
for tied in (False, True):
    transformers_peer(
        "falcon_h1", "FalconH1Config", "FalconH1ForCausalLM", label="folded-tied" if tied else "folded", folds=True,
        **FALCON, **MULTIPLIERS, tie_word_embeddings=tied,
    )  # fmt: skip
