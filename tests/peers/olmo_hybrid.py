"""OLMo Hybrid of transformers: without positions as released, and with rotary ones, biases and shared keys.

Where values are larger than keys, the class writes the convolutions cut at other places than it reads them (equal parts
of the joined one): the tensors are those of files only where the sizes are equal.
"""

from __future__ import annotations

from peers import transformers_peer

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "pad_token_id": None, "eos_token_id": 0,
}  # fmt: skip

transformers_peer(
    "olmo_hybrid", "OlmoHybridConfig", "OlmoHybridForCausalLM", **SIZES, linear_key_head_dim=8, linear_value_head_dim=8
)
transformers_peer(
    "olmo_hybrid", "OlmoHybridConfig", "OlmoHybridForCausalLM", label="rotary", folds=True, **SIZES,
    num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=12, linear_allow_neg_eigval=False, linear_conv_kernel_dim=3,
    layer_types=["full_attention", "linear_attention", "full_attention", "linear_attention"],
    rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3,
)  # fmt: skip
