"""RWKV-4 of transformers, tied and untied, of other inner sizes than its width."""

from __future__ import annotations

from peers import transformers_peer

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}


def logits(model, given):
    """Without a cache, which is of the width whatever the inner size."""
    return model(**given, use_cache=False).logits


transformers_peer("rwkv4", "RwkvConfig", "RwkvForCausalLM", **SIZES, forward=logits)
transformers_peer(
    "rwkv4", "RwkvConfig", "RwkvForCausalLM", label="tied", **SIZES, attention_hidden_size=48, intermediate_size=80,
    tie_word_embeddings=True, forward=logits,
)  # fmt: skip
