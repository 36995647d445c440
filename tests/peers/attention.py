"""Attention models of transformers: one of each kind of adapter; the rest are in tests/convert/test_teachers.py."""

from __future__ import annotations

from peers import transformers_peer

transformers_peer(
    "llama", "LlamaConfig", "LlamaForCausalLM", vocab_size=97, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
transformers_peer(
    "gpt2", "GPT2Config", "GPT2LMHeadModel", vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
)  # fmt: skip
transformers_peer(
    "distilbert", "DistilBertConfig", "DistilBertForMaskedLM", vocab_size=97, dim=32, hidden_dim=48, n_layers=2,
    n_heads=4, max_position_embeddings=64, greedy=False,
)  # fmt: skip
