"""BERT and encoders like it in GGUF: sentence embeddings, which is what llama.cpp runs them for.

It computes their GELU by its tanh form and from a table of half precision, so its embeddings are near ours and not the
same; what is in a file is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.config import ZooConfig
from zoo.convert.layouts.family import OtherKindError, one_layer, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.gguf import GGUF
from zoo.convert.layouts.mapping import Entry, pairs
from zoo.errors import ExportError

_POOLING = {1: "mean", 2: "cls", 3: "last"}  # of gguf.PoolingType
_BOTH = ("weight", "bias")


@register_family
class GGUFBert(GGUF):
    """BERT, MiniLM, DistilBERT as sentence encoders."""

    name = architecture = "bert"
    about = "bert"
    mixers = ("attention",)
    block = "post_norm"
    norm = "layer_norm"
    positions = "learned"
    embedding_norm = True

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around = self.around(checkpoint)
        self.only(checkpoint, "attention.causal", False)
        self.only(checkpoint, "pooling_type", *_POOLING)
        heads = self.key(checkpoint, "attention.head_count")
        mixer = {
            "name": "attention",
            "num_heads": heads,
            "head_dim": around["hidden_size"] // heads,
            "causal": False,
            "qkv_bias": True,
            "out_bias": True,
        }
        ffn = {"name": "mlp", "hidden_size": self.key(checkpoint, "feed_forward_length"), "activation": "gelu"}
        return {
            **around,
            "task": "sentence-embedding",
            "block": "post_norm",
            "final_norm": False,
            "token_types": checkpoint.shapes.get("token_types.weight", (0,))[0],
            "pooling": _POOLING[self.key(checkpoint, "pooling_type", 1)],
            "layers": [{"mixer": mixer, "ffn": ffn}] * self.key(checkpoint, "block_count"),
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layer, spec = one_layer(config), config.spec
        if spec.task != "sentence-embedding" or layer.ffn is None or layer.ffn.name != "mlp":
            raise OtherKindError("is for sentence embeddings (task: sentence-embedding), of attention and plain MLPs")
        if layer.mixer.num_heads * layer.mixer.head_dim != spec.hidden_size:
            raise ExportError("its heads fill the width")
        keys = self.keys(
            config,
            attention__head_count=layer.mixer.num_heads,
            attention__causal=False,
            feed_forward_length=layer.ffn.resolved(spec.hidden_size).hidden_size,
            pooling_type=next(number for number, name in _POOLING.items() if name == spec.pooling),
        )
        return {**keys, "tokenizer.ggml.token_type_count": spec.token_types}

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        around = {"token_embd": "embed_tokens", "position_embd": "embed_positions"}
        if config.spec.token_types:
            around["token_types"] = "embed_token_types"
        yield from pairs("", "model.", around)
        yield from pairs("", "model.", {"token_embd_norm": "embed_norm"}, _BOTH)
        names = {f"attn_{letter}": f"mixer.{letter}_proj" for letter in "qkv"}
        names |= {"attn_output": "mixer.o_proj", "attn_output_norm": "mixer_norm", "layer_output_norm": "ffn_norm"}
        names |= {f"ffn_{part}": f"ffn.{part}_proj" for part in ("up", "down")}
        for i in range(config.num_hidden_layers):
            yield from pairs(f"blk.{i}.", f"model.layers.{i}.", names, _BOTH)
