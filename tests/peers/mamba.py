"""Mamba of transformers, and the same weights as mamba_ssm publishes them."""

from __future__ import annotations

import json

import torch

from peers import Peer, peer, random_weights, tokens, transformers_peer

SIZES = {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}

transformers_peer("mamba", "MambaConfig", "MambaForCausalLM", **SIZES)
transformers_peer(
    "mamba", "MambaConfig", "MambaForCausalLM", label="untied", **SIZES,
    tie_word_embeddings=False, use_bias=True, use_conv_bias=False, expand=3, time_step_rank=5,
    options={"max_shard_size": "20KB"},
)  # fmt: skip


def save_as_mamba_ssm(folder):
    """The files of state-spaces/mamba-*: names and config of `MambaLMHeadModel`, the tied head a second time."""
    from transformers import MambaConfig, MambaForCausalLM

    model = random_weights(MambaForCausalLM(MambaConfig(**{**SIZES, "vocab_size": 96, "state_size": 16})))
    state = {k.replace("backbone.embeddings", "backbone.embedding"): v.clone() for k, v in model.state_dict().items()}
    state["lm_head.weight"] = state["backbone.embedding.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    config = {
        "d_model": 32, "n_layer": 2, "vocab_size": 90, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return model


peer(Peer("mamba_ssm", "mamba", save_as_mamba_ssm, lambda m, given: m(**given).logits, tokens(90)))
