"""Zamba2 of transformers: one shared transformer with adapted attention, and two without positions."""

from __future__ import annotations

from peers import transformers_peer

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 6, "mamba_d_state": 16, "n_mamba_heads": 8,
    "intermediate_size": 48, "num_attention_heads": 4, "adapter_rank": 6, "time_step_min": 0.3,
}  # fmt: skip
KINDS = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"]

transformers_peer(
    "zamba2", "Zamba2Config", "Zamba2ForCausalLM", **SIZES, layers_block_type=KINDS, use_mem_rope=True,
    use_shared_attention_adapter=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)  # fmt: skip
transformers_peer(
    "zamba2", "Zamba2Config", "Zamba2ForCausalLM", label="two-blocks", **SIZES, layers_block_type=KINDS,
    num_mem_blocks=2, mamba_ngroups=2, num_key_value_heads=2,
    options={"max_shard_size": "40KB"},
)  # fmt: skip
