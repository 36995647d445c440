"""RetNet as torchscale 0.3 saves it: the state dict of a `RetNetDecoder`, and beside it the arguments of its config.

torchscale writes no config; `config.json` holds what was given to its `RetNetConfig`, and options it does not name have
the defaults of that class. Angles and decays are buffers there, computed from the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, one_layer, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, initial, same
from zoo.errors import CheckpointError, ExportError
from zoo.mixers.retention import published_rotary

_DEFAULTS = {
    "decoder_embed_dim": 768, "decoder_value_embed_dim": 1280, "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 1280, "decoder_layers": 12, "activation_fn": "gelu", "layernorm_eps": 1e-6,
    "share_decoder_input_output_embed": False,
}  # fmt: skip
_NEEDS = {
    "decoder_normalize_before": True, "no_scale_embedding": True, "layernorm_embedding": False, "moe_freq": 0,
    "deepnorm": False, "multiway": False, "no_output_layer": False, "xpos_rel_pos": False,
}  # fmt: skip
_ACTIVATIONS = {"gelu": "gelu", "swish": "silu", "relu": "relu"}


@register_family
class TorchscaleRetNet(Family):
    """`RetNetDecoder`."""

    layout = "torchscale"
    name = "retnet"
    about = "RetNetDecoder"
    mixers: ClassVar = ("retention",)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return "layers.0.retention.q_proj.weight" in checkpoint.shapes

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**_DEFAULTS, **_NEEDS, **checkpoint.config}
        for key, value in _NEEDS.items():
            if c[key] != value:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {value!r} can be expressed")
        if c["activation_fn"] not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise CheckpointError(f"{checkpoint.path}: activation_fn is {c['activation_fn']!r}; known are {known}")
        width, heads = c["decoder_embed_dim"], c["decoder_retention_heads"]
        vocabulary = checkpoint.shapes.get("embed_tokens.weight", (c.get("vocab_size", 0),))[0]
        mixer = {
            "name": "retention",
            "num_heads": heads,
            "head_dim": width // heads,
            "value_head_dim": c["decoder_value_embed_dim"] // heads,
            "rotary": published_rotary(width // heads),
            "head_norm_eps": c["layernorm_eps"],
            "decay_norm": True,
        }
        ffn = {"name": "gated_mlp", "hidden_size": c["decoder_ffn_embed_dim"]}
        ffn["activation"] = _ACTIVATIONS[c["activation_fn"]]
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "layers": [{"mixer": mixer, "ffn": ffn}] * c["decoder_layers"],
            "norm_eps": c["layernorm_eps"],
            "tie_word_embeddings": c["share_decoder_input_output_embed"],
        }

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield same("embed_tokens.weight", "model.embed_tokens.weight")
        for i in range(config.num_hidden_layers):
            theirs, ours = f"layers.{i}.", f"model.layers.{i}."
            yield same(f"{theirs}retention_layer_norm.weight", f"{ours}mixer_norm.weight")
            for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
                yield same(f"{theirs}retention.{name}.weight", f"{ours}mixer.{name}.weight")
            yield same(f"{theirs}retention.out_proj.weight", f"{ours}mixer.o_proj.weight")
            yield initial(f"{ours}mixer.decay_logit_G")
            yield same(f"{theirs}final_layer_norm.weight", f"{ours}ffn_norm.weight")
            for name, mine in {"fc1": "gate_proj", "gate": "up_proj", "fc2": "down_proj"}.items():
                yield same(f"{theirs}ffn.{name}.weight", f"{ours}ffn.{mine}.weight")
        yield same("layer_norm.weight", "model.norm.weight")
        if not config.tie_word_embeddings:
            yield same("output_projection.weight", "lm_head.weight")

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"output_projection.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {}

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return ("retnet_rel_pos.angle", "retnet_rel_pos.decay")

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layer = one_layer(config)
        if layer.ffn is None or layer.ffn.name != "gated_mlp":
            raise ExportError("layers.0.ffn: each layer has a gated_mlp in torchscale")
        mixer, ffn = layer.mixer, layer.ffn.resolved(config.hidden_size)
        activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}.get(ffn.activation)
        if activation is None:
            raise ExportError(f"layers.0.ffn.activation: {ffn.activation!r}, which the layout has not")
        return {
            **_NEEDS,
            "vocab_size": config.vocab_size,
            "decoder_embed_dim": config.hidden_size,
            "decoder_value_embed_dim": mixer.num_heads * mixer.value_dim,
            "decoder_retention_heads": mixer.num_heads,
            "decoder_ffn_embed_dim": ffn.hidden_size,
            "decoder_layers": config.num_hidden_layers,
            "activation_fn": activation,
            "layernorm_eps": config.norm_eps,
            "share_decoder_input_output_embed": config.tie_word_embeddings,
        }

    def save(self, folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Any]]) -> None:
        from zoo.convert.layouts.writing import save_torch, write_json

        heads = config["decoder_retention_heads"]
        angle = 10000 ** -torch.linspace(0, 1, config["decoder_embed_dim"] // heads // 2)
        decay = torch.log(1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float)))
        found = dict(tensors)
        found |= {"retnet_rel_pos.angle": angle.repeat_interleave(2), "retnet_rel_pos.decay": decay}
        if config["share_decoder_input_output_embed"]:
            found["output_projection.weight"] = found["embed_tokens.weight"]
        save_torch(folder / "pytorch_model.bin", iter(found.items()))
        write_json(folder / "config.json", config)
