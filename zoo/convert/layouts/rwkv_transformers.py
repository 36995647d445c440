"""RWKV-4 of transformers (`RwkvForCausalLM`), as in RWKV/rwkv-4-169m-pile. Shares are (1, 1, width) there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, flat, pairs, same
from zoo.convert.teachers.adapter import common_values
from zoo.errors import CheckpointError, ExportError
from zoo.transformers_keys import TOKEN_IDS, present

_EPS = 1e-5  # of the last norm, whatever `layer_norm_epsilon` is: one model has one here
_LETTERS = {"key": "k", "value": "v", "receptance": "r"}


@register_family
class TransformersRWKV4(Family):
    """`RwkvForCausalLM`. Its `rescale_every` divides weights and states while it runs, by powers of two: not a function
    of the model, so it is not read."""

    layout = "transformers"
    name = "rwkv4"
    about = "RwkvForCausalLM"
    mixers = ("rwkv4",)
    root = "rwkv."

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == "rwkv"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        width = c["hidden_size"]
        if c.get("layer_norm_epsilon", _EPS) != _EPS:
            raise CheckpointError(f"{checkpoint.path}: layer_norm_epsilon is {c['layer_norm_epsilon']!r}, not {_EPS}")
        hidden = c.get("intermediate_size") or 4 * width
        layer = {
            "mixer": {"name": "rwkv4", "inner_dim": c.get("attention_hidden_size") or width},
            "ffn": {"name": "rwkv_channel_mix", "version": 4, "hidden_size": hidden},
        }
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": width,
            "max_position_embeddings": c.get("context_length", 1024),
            "norm": "layer_norm",
            "norm_eps": _EPS,
            "embedding_norm": True,
            "tie_word_embeddings": c.get("tie_word_embeddings", False),
            "layers": [layer] * c["num_hidden_layers"],
            **present(c, *TOKEN_IDS),
        }

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        width, both = config.hidden_size, ("weight", "bias")
        yield same("rwkv.embeddings.weight", "model.embed_tokens.weight")
        yield from pairs("rwkv.blocks.0.", "model.", {"pre_ln": "embed_norm"}, both)
        for i in range(config.num_hidden_layers):
            theirs, ours = f"rwkv.blocks.{i}.", f"model.layers.{i}."
            yield from pairs(theirs, ours, {"ln1": "mixer_norm", "ln2": "ffn_norm"}, both)
            for name, letter in _LETTERS.items():
                yield flat(f"{theirs}attention.time_mix_{name}", f"{ours}mixer.shift_{letter}", (1, 1, width))
                if name != "value":
                    yield flat(f"{theirs}feed_forward.time_mix_{name}", f"{ours}ffn.shift_{letter}", (1, 1, width))
                yield same(f"{theirs}attention.{name}.weight", f"{ours}mixer.{letter}_proj.weight")
                yield same(f"{theirs}feed_forward.{name}.weight", f"{ours}ffn.{name}.weight")
            yield same(f"{theirs}attention.time_decay", f"{ours}mixer.log_rate")
            yield same(f"{theirs}attention.time_first", f"{ours}mixer.bonus")
            yield same(f"{theirs}attention.output.weight", f"{ours}mixer.o_proj.weight")
        yield from pairs("rwkv.", "model.", {"ln_out": "norm"}, both)
        if not config.tie_word_embeddings:
            yield same("head.weight", "lm_head.weight")

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"head.weight": "rwkv.embeddings.weight"} if config.tie_word_embeddings else {}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layer = config.spec.layers[0]
        if config.norm_eps != _EPS:
            raise ExportError(f"norm_eps is {config.norm_eps}; its last norm has {_EPS}, whatever the others have")
        if layer.ffn is None or layer.ffn.name != "rwkv_channel_mix":
            raise ExportError(f"layers.0.ffn is {getattr(layer.ffn, 'name', None)}; its blocks have rwkv_channel_mix")
        return {
            **common_values(config, "rwkv", "RwkvForCausalLM"),
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "attention_hidden_size": layer.mixer.inner_dim or config.hidden_size,
            "intermediate_size": layer.ffn.hidden_size or 4 * config.hidden_size,
            "context_length": config.max_position_embeddings,
            "layer_norm_epsilon": config.norm_eps,
        }
