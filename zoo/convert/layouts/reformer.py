"""Reformer (arXiv:2001.04451) of transformers: google/reformer-enwik8 and google/reformer-crime-and-punishment.

Where a token is hashed to depends on random rotations that no checkpoint holds. With `hash_seed` they are drawn from
that number, here too. Without it, as published, every forward there draws others; here those of training do (`redraw`),
and a model in evaluation keeps the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, mapped, pairs, same
from zoo.convert.layouts.names import class_of
from zoo.errors import CheckpointError, ExportError
from zoo.transformers_keys import TOKEN_IDS, present

_DEFAULTS: dict[str, Any] = {
    "attention_head_size": 64, "attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh"],
    "axial_pos_embds": True, "axial_pos_shape": [64, 64], "axial_pos_embds_dim": [64, 192], "feed_forward_size": 512,
    "hash_seed": None, "hidden_act": "relu", "hidden_dropout_prob": 0.05, "hidden_size": 256,
    "initializer_range": 0.02, "is_decoder": False, "layer_norm_eps": 1e-12, "local_num_chunks_before": 1,
    "local_num_chunks_after": 0, "local_attn_chunk_length": 64, "lsh_attn_chunk_length": 64,
    "lsh_num_chunks_before": 1, "lsh_num_chunks_after": 0, "max_position_embeddings": 4096,
    "num_attention_heads": 12, "num_buckets": None, "num_hashes": 1, "vocab_size": 320, "tie_word_embeddings": False,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_CLASSES = {
    "ReformerModelWithLMHead": "causal-lm",
    "ReformerForMaskedLM": "masked-lm",
    "ReformerModel": "sentence-embedding",
}


@register_family
class Reformer(Family):
    """`ReformerModelWithLMHead`, `ReformerForMaskedLM` and `ReformerModel`."""

    layout = "transformers"
    name = "reformer"
    about = ", ".join(_CLASSES)
    mixers = ("local_attention", "lsh_attention")
    root = "reformer."

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == "reformer"

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return (".mask_value_float16", ".mask_value_float32", ".self_mask_value_float16", ".self_mask_value_float32")

    def is_dropped(self, name: str) -> bool:
        return name == "lm_head.bias"  # which their class has and does not add

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**_DEFAULTS, **checkpoint.config}
        task = _CLASSES[class_of(checkpoint, _CLASSES)]
        for key, value in {"axial_pos_embds": True, "tie_word_embeddings": False}.items():
            if c[key] != value:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {value!r} can be expressed")
        if c["num_buckets"] is None:
            raise CheckpointError(f"{checkpoint.path}: num_buckets is not set; the class finds it from its first input")
        if c["is_decoder"] != (task == "causal-lm") and task != "sentence-embedding":
            raise CheckpointError(f"{checkpoint.path}: is_decoder is {c['is_decoder']}, for the task {task}")
        ffn = {"name": "mlp", "hidden_size": c["feed_forward_size"], "activation": c["hidden_act"]}
        return {
            "task": task,
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "max_position_embeddings": c["max_position_embeddings"],
            "positions": "learned",
            "axial_shape": list(c["axial_pos_shape"]),
            "axial_dims": list(c["axial_pos_embds_dim"]),
            "layers": [{"mixer": _mixer(c, kind, checkpoint), "ffn": ffn} for kind in c["attn_layers"]],
            "block": "reversible",
            "norm": "layer_norm",
            "norm_eps": c["layer_norm_eps"],
            "embedding_dropout": c["hidden_dropout_prob"],
            "tie_word_embeddings": False,
            "initializer_range": c["initializer_range"],
            **present(c, *TOKEN_IDS),
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        spec = config.spec
        named = {task: name for name, task in _CLASSES.items()}
        if spec.task not in named:
            raise ExportError(f"has no class for the task {spec.task!r}")
        mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
        if ffn is None or ffn.name != "mlp":
            raise ExportError("its channel mixers are not one mlp in all layers")
        kinds = {"local_attention": "local", "lsh_attention": "lsh"}
        found: dict[str, Any] = {
            "architectures": [named[spec.task]],
            "model_type": "reformer",
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "max_position_embeddings": spec.max_position_embeddings,
            "axial_pos_embds": True,
            "axial_pos_shape": spec.axial_shape,
            "axial_pos_embds_dim": spec.axial_dims,
            "attn_layers": [kinds[layer.mixer.name] for layer in spec.layers],
            "num_attention_heads": mixer.num_heads,
            "attention_head_size": mixer.head_dim,
            "is_decoder": mixer.causal,
            "feed_forward_size": ffn.hidden_size,
            "hidden_act": ffn.activation,
            "hidden_dropout_prob": spec.embedding_dropout,
            "layer_norm_eps": spec.norm_eps,
            "initializer_range": spec.initializer_range,
            "tie_word_embeddings": spec.tie_word_embeddings,
            "num_buckets": 2,  # without hashed layers
            **{key: getattr(config, key) for key in TOKEN_IDS},
        }
        for layer in spec.layers:
            kind = kinds[layer.mixer.name]
            found |= {
                f"{kind}_attn_chunk_length": layer.mixer.chunk,
                f"{kind}_num_chunks_before": layer.mixer.chunks_before,
                f"{kind}_num_chunks_after": layer.mixer.chunks_after,
            }
            if kind == "lsh":
                seed = None if layer.mixer.redraw else layer.mixer.seed
                found |= {
                    "hash_seed": seed,
                    "num_buckets": layer.mixer.num_buckets,
                    "num_hashes": layer.mixer.num_hashes,
                }
        return found

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        root = "" if config.task == "sentence-embedding" else self.root
        yield same(f"{root}embeddings.word_embeddings.weight", "model.embed_tokens.weight")
        for i, (places, size) in enumerate(zip(config.axial_shape, config.axial_dims, strict=True)):
            shape = [1] * len(config.axial_shape) + [size]
            shape[i] = places
            yield _grid(f"{root}embeddings.position_embeddings.weights.{i}", f"model.embed_positions.axes.{i}", shape)
        for i, layer in enumerate(config.spec.layers):
            theirs, ours = f"{root}encoder.layers.{i}.", f"model.layers.{i}."
            local = layer.mixer.name == "local_attention"
            names = {"query": "q_proj", "key": "k_proj"} if local else {"query_key": "q_proj"}
            attention = {f"attention.self_attention.{n}": f"mixer.{m}" for n, m in {**names, "value": "v_proj"}.items()}
            yield from pairs(theirs, ours, {**attention, "attention.output.dense": "mixer.o_proj"})
            rest = {
                "attention.layer_norm": "mixer_norm",
                "feed_forward.layer_norm": "ffn_norm",
                "feed_forward.dense.dense": "ffn.up_proj",
                "feed_forward.output.dense": "ffn.down_proj",
            }
            yield from pairs(theirs, ours, rest, ("weight", "bias"))
        yield from pairs(root, "model.", {"encoder.layer_norm": "norm"}, ("weight", "bias"))
        if config.task != "sentence-embedding":
            yield same("lm_head.decoder.weight", "lm_head.weight")

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        return {} if config.task == "sentence-embedding" else {"lm_head.bias": (config.vocab_size,)}


def _mixer(c: dict[str, Any], kind: str, checkpoint: Checkpoint) -> dict[str, Any]:
    shared = {
        "num_heads": c["num_attention_heads"],
        "head_dim": c["attention_head_size"],
        "causal": c["is_decoder"],
        "chunk": c[f"{kind}_attn_chunk_length"],
        "chunks_before": c[f"{kind}_num_chunks_before"],
        "chunks_after": c[f"{kind}_num_chunks_after"],
    }
    if kind == "local":
        return {"name": "local_attention", **shared}
    if kind != "lsh":
        raise CheckpointError(f"{checkpoint.path}: attn_layers has {kind!r}; known: local, lsh")
    seed = c["hash_seed"]
    hashing = {"num_buckets": c["num_buckets"], "num_hashes": c["num_hashes"], "redraw": seed is None}
    return {"name": "lsh_attention", **shared, **hashing, "seed": seed or 0}


def _grid(theirs: str, ours: str, shape: list[int]) -> Entry:
    """A table (places, size) here; there with an axis of size 1 for each other axis of the grid."""
    return mapped(theirs, ours, lambda t: t.reshape(-1, shape[-1]), lambda t: t.reshape(shape))
