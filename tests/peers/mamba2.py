"""Mamba-2 of transformers, the same weights as mamba_ssm publishes them, and Falcon Mamba.

Names and order of mamba_ssm: `Mamba2` in mamba_ssm/modules/mamba2.py, in `MambaLMHeadModel` (state-spaces/mamba).
"""

from __future__ import annotations

import json

import torch

from peers import Peer, peer, random_weights, tokens, transformers_peer

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16,
    "n_groups": 2,
}  # fmt: skip

transformers_peer("mamba2", "Mamba2Config", "Mamba2ForCausalLM", **SIZES)
transformers_peer(
    "mamba2", "Mamba2Config", "Mamba2ForCausalLM", label="biases", tie_word_embeddings=True,
    **{**SIZES, "n_groups": 1, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 1, "num_heads": 4,
       "time_step_limit": (0.5, float("inf"))},
    options={"max_shard_size": "20KB"},
)  # fmt: skip
transformers_peer(
    "falcon_mamba", "FalconMambaConfig", "FalconMambaForCausalLM", vocab_size=97, hidden_size=32, state_size=8,
    num_hidden_layers=2, tie_word_embeddings=False, mixer_rms_eps=1e-3,
)  # fmt: skip


def save_as_mamba_ssm(folder):
    """The files of state-spaces/mamba2-*: names and config of `MambaLMHeadModel`, the tied head a second time."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    model = random_weights(Mamba2ForCausalLM(Mamba2Config(**SIZES, tie_word_embeddings=True)))
    state = {k.replace("backbone.embeddings", "backbone.embedding"): v.clone() for k, v in model.state_dict().items()}
    state["lm_head.weight"] = state["backbone.embedding.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    config = {
        "d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 90, "attn_layer_idx": [], "attn_cfg": {},
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16, "ngroups": 2}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return model


peer(Peer("mamba_ssm", "mamba2", save_as_mamba_ssm, lambda m, given: m(**given).logits, tokens(90)))
