"""Attention models of transformers, of text and of images, which are teachers too."""

from __future__ import annotations

import torch

from peers import transformers_peer

transformers_peer(
    "llama", "LlamaConfig", "LlamaForCausalLM", vocab_size=97, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
transformers_peer(
    "llama", "Qwen3Config", "Qwen3ForCausalLM", label="qwen3", vocab_size=97, hidden_size=32, intermediate_size=48,
    head_dim=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
transformers_peer(
    "gpt2", "GPT2Config", "GPT2LMHeadModel", vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
)  # fmt: skip
transformers_peer(
    "distilbert", "DistilBertConfig", "DistilBertForMaskedLM", vocab_size=97, dim=32, hidden_dim=48, n_layers=2,
    n_heads=4, max_position_embeddings=64, greedy=False,
)  # fmt: skip

ENCODER = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
MOBILE = {**ENCODER, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
BARE = {"label": "bare", "output": "last_hidden_state", "greedy": False}
transformers_peer("bert", "BertConfig", "BertForMaskedLM", **ENCODER, greedy=False)
transformers_peer(
    "bert", "BertConfig", "BertForSequenceClassification", label="classifier", **ENCODER, num_labels=3, greedy=False
)
transformers_peer("bert", "BertConfig", "BertModel", **BARE, **ENCODER)
transformers_peer(
    "roberta", "RobertaConfig", "RobertaForMaskedLM", **ENCODER, greedy=False,
    inputs=lambda: {"input_ids": torch.randint(4, 97, (2, 20))},
)  # fmt: skip
transformers_peer(
    "albert", "AlbertConfig", "AlbertForMaskedLM", **ENCODER, embedding_size=16, num_hidden_groups=2, greedy=False
)
transformers_peer("albert", "AlbertConfig", "AlbertModel", **BARE, **ENCODER, embedding_size=16)
transformers_peer("mobilebert", "MobileBertConfig", "MobileBertForMaskedLM", **MOBILE, greedy=False)
transformers_peer("mobilebert", "MobileBertConfig", "MobileBertModel", **BARE, **MOBILE)
transformers_peer("distilbert", "DistilBertConfig", "DistilBertForSequenceClassification", vocab_size=97, dim=32,
    hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, greedy=False, label="classifier", num_labels=3,
)  # fmt: skip
transformers_peer(
    "opt", "OPTConfig", "OPTForCausalLM", vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False,
)  # fmt: skip
transformers_peer(
    "gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", **ENCODER, eos_token_id=0, bos_token_id=0,
    options={"max_shard_size": "20KB"},
)  # fmt: skip


def pixels(size):
    """Two images of normal noise."""
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_labels": 5, "greedy": False, "inputs": pixels(32),
}  # fmt: skip
transformers_peer("vit", "ViTConfig", "ViTForImageClassification", **IMAGES)
transformers_peer("deit", "DeiTConfig", "DeiTForImageClassification", **IMAGES)
transformers_peer("deit", "DeiTConfig", "DeiTForImageClassificationWithTeacher", label="distilled", **IMAGES)
transformers_peer(
    "swin", "SwinConfig", "SwinForImageClassification", image_size=32, patch_size=2, embed_dim=16, depths=[1, 2],
    num_heads=[2, 4], window_size=4, num_labels=5, greedy=False, inputs=pixels(32),
)  # fmt: skip
