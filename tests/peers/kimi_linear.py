"""Kimi Linear of transformers, with the config of the class and with that of the published files.

Dense MLPs are `mlp.` in published files. The class reads that, but writes them under the name of the experts' block, so
they are renamed here.
"""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

from peers import transformers_peer
from peers.deepseek import with_bias

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "kv_lora_rank": 10, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 7, "moe_intermediate_size": 20, "num_local_experts": 8,
    "num_experts_per_tok": 3, "linear_num_heads": 4, "linear_head_dim": 8, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 0,
}  # fmt: skip
PUBLISHED = {  # facts that stand in config.json of moonshotai/Kimi-Linear-48B-A3B-Base, here of four layers
    "linear_attn_config": {
        "kda_layers": [1, 2, 4], "full_attn_layers": [3], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4,
    },
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "mla_use_nope": True, "use_grouped_topk": True,
    "moe_router_activation_func": "sigmoid", "num_nextn_predict_layers": 0, "rope_theta": 10000.0, "rope_scaling": None,
}  # fmt: skip


def named_as_published(folder):
    """Dense MLPs under the names of published files."""
    file = folder / "model.safetensors"
    dense = {f".block_sparse_moe.{n}_proj.": f".mlp.{n}_proj." for n in ("gate", "up", "down")}
    tensors = load_file(file)
    for old, new in dense.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def as_published(folder):
    """Those names, and the config without what only the class writes."""
    named_as_published(folder)
    values = json.loads((folder / "config.json").read_text())
    for key in ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"):
        del values[key]
    (folder / "config.json").write_text(json.dumps({**values, **PUBLISHED}))


transformers_peer(
    "kimi_linear", "KimiLinearConfig", "KimiLinearForCausalLM", prepare=with_bias, saved=as_published, **SIZES,
    layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
)  # fmt: skip
transformers_peer(
    "kimi_linear", "KimiLinearConfig", "KimiLinearForCausalLM", label="mixed", prepare=with_bias,
    saved=named_as_published, **{**SIZES, "num_hidden_layers": 3},
    layer_types=["full_attention", "linear_attention", "full_attention"],
    mlp_layer_types=["sparse", "dense", "sparse"], q_lora_rank=12, n_shared_experts=2, n_group=4, topk_group=2,
    linear_conv_kernel_dim=3, attention_bias=True, norm_topk_prob=False, rms_norm_eps=1e-3,
)  # fmt: skip
