"""Encoders of transformers with another mixer than attention, each as a masked LM, a classifier and a bare encoder."""

from __future__ import annotations

import torch

from peers import transformers_peer

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 66,
}  # fmt: skip
OUTPUTS = {"ForMaskedLM": "logits", "ForSequenceClassification": "logits", "Model": "last_hidden_state"}


def words(length):
    """Two rows of tokens, none of them the padding, from which Longformer counts its positions."""
    return lambda: {"input_ids": torch.randint(4, 97, (2, length))}


def first_is_global(output):
    def forward(model, given):
        mask_BL = torch.zeros_like(given["input_ids"])
        mask_BL[:, 0] = 1
        return model(**given, global_attention_mask=mask_BL)[output]

    return forward


def one_start_for_each_matrix(output):
    """The pseudo-inverse starts there from the largest sum of the batch; with "exact" from that of each matrix."""

    def forward(model, given):
        for part in model.modules():
            if hasattr(part, "init_option"):
                part.init_option = "exact"
        return model(**given)[output]

    return forward


for kind, output in OUTPUTS.items():
    task = {"inputs": words(40), "output": output, "greedy": False}
    if kind == "ForSequenceClassification":
        task |= {"num_labels": 3}
    transformers_peer(
        "longformer", "LongformerConfig", f"Longformer{kind}", label=kind, **SIZES, **task, attention_window=[8, 4],
        type_vocab_size=1, layer_norm_eps=1e-5, forward=first_is_global(output),
    )  # fmt: skip
    transformers_peer(
        "big_bird", "BigBirdConfig", f"BigBird{kind}", label=kind, **SIZES, **task, block_size=4, num_random_blocks=1,
        **({"use_bias": False} if kind == "Model" else {}),
    )  # fmt: skip
    transformers_peer("nystromformer", "NystromformerConfig", f"Nystromformer{kind}", label=kind, **SIZES, **task)
    transformers_peer("fnet", "FNetConfig", f"FNet{kind}", label=kind, **SIZES, **task)

transformers_peer(
    "longformer", "LongformerConfig", "LongformerForMaskedLM", label="untied", **SIZES, attention_window=6,
    inputs=words(24), greedy=False, tie_word_embeddings=False, forward=first_is_global("logits"),
)  # fmt: skip
transformers_peer(
    "nystromformer", "NystromformerConfig", "NystromformerForMaskedLM", label="landmarks",
    **{**SIZES, "max_position_embeddings": 40}, num_landmarks=8, segment_means_seq_len=40, conv_kernel_size=5,
    inputs=words(40), greedy=False, forward=one_start_for_each_matrix("logits"),
)  # fmt: skip

HASHED = {
    "attn_layers": ["local", "lsh"], "attention_head_size": 8, "hidden_size": 32, "feed_forward_size": 48,
    "num_attention_heads": 2, "axial_pos_shape": (4, 16), "axial_pos_embds_dim": (12, 20), "vocab_size": 97,
    "max_position_embeddings": 64, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4,
    "num_hashes": 2, "hash_seed": 3,
}  # fmt: skip
transformers_peer("reformer", "ReformerConfig", "ReformerModelWithLMHead", **HASHED, is_decoder=True, inputs=words(40))
transformers_peer(
    "reformer", "ReformerConfig", "ReformerForMaskedLM", label="masked", **HASHED, greedy=False, inputs=words(40)
)
transformers_peer(
    "reformer", "ReformerConfig", "ReformerModel", label="bare", **{**HASHED, "num_buckets": [2, 4]}, greedy=False,
    inputs=words(40), output="last_hidden_state",
)  # fmt: skip
