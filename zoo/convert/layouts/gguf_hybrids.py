"""Bamba and Falcon-H1 in GGUF: Mamba-2 and attention, one after another or side by side, an MLP in each block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.config import ZooConfig
from zoo.convert.layouts.family import OtherKindError, one_layer, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.gguf import GGUF
from zoo.convert.layouts.gguf_attention import attention_entries, attention_fields, attention_keys
from zoo.convert.layouts.gguf_ssm import mamba2_fields, mamba2_keys, mamba2_tensors
from zoo.convert.layouts.mapping import Entry, pairs, same
from zoo.errors import CheckpointError, ExportError


class _Hybrid(GGUF):
    inert = ("dt_min", "dt_max")
    ffn_norm = "ffn_norm.weight"

    def ffn(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Options of the channel mixers. Raises CheckpointError where they are experts."""
        self.only(checkpoint, "expert_count", 0)
        return {"name": "gated_mlp", "hidden_size": self.key(checkpoint, "feed_forward_length"), "activation": "silu"}

    def shared(self, config: ZooConfig, mamba2: Any, attention: Any) -> dict[str, Any]:
        """Their keys of a model with one kind of Mamba-2 and one of attention, with `__` for the dots in names."""
        ffn = config.spec.layers[0].ffn
        if ffn is None or ffn.name != "gated_mlp" or any(layer.ffn != ffn for layer in config.spec.layers):
            raise ExportError("its blocks all have the same gated_mlp")
        if attention.rotary is None:
            raise ExportError("its attention has rotary positions")
        hidden = ffn.resolved(config.hidden_size).hidden_size
        return {"feed_forward_length": hidden, **attention_keys(self, attention), **mamba2_keys(mamba2)}

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        for i, layer in enumerate(config.spec.layers):
            theirs, ours = f"blk.{i}.", f"model.layers.{i}."
            yield same(f"{theirs}attn_norm.weight", f"{ours}mixer_norm.weight")
            yield same(f"{theirs}{self.ffn_norm}", f"{ours}ffn_norm.weight")
            yield from pairs(theirs, ours, {f"ffn_{part}": f"ffn.{part}_proj" for part in ("gate", "up", "down")})
            yield from self.mixer(theirs, f"{ours}mixer.", layer.mixer, config.hidden_size)

    def mixer(self, theirs: str, ours: str, options: Any, width: int) -> Iterator[Entry]:
        """The mixer of a block."""
        raise NotImplementedError


@register_family
class GGUFBamba(_Hybrid):
    """Bamba: layers of attention among those of Mamba-2. llama.cpp's `granitehybrid`, whose rows of queries and keys
    are in the order of neighbouring pairs. Granite's own constants and experts are refused."""

    name = "bamba"
    architecture = about = "granitehybrid"
    mixers = ("attention", "mamba2")

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around, layers = self.around(checkpoint), self.key(checkpoint, "block_count")
        for name in ("residual_scale", "embedding_scale", "logit_scale"):
            self.only(checkpoint, name, 1.0, 0.0)
        self.only(checkpoint, "attention.scale", 0.0)
        self.only(checkpoint, "rope.scaling.finetuned", True)
        kv = self.key(checkpoint, "attention.head_count_kv")
        if not isinstance(kv, list) or len(kv) != layers:
            raise CheckpointError(f"{checkpoint.path}: granitehybrid.attention.head_count_kv: needs one number a layer")
        attention = attention_fields(self, checkpoint, around) if any(kv) else None
        mamba2 = mamba2_fields(self, checkpoint, around["norm_eps"]) if 0 in kv else None
        ffn = self.ffn(checkpoint)
        return {**around, "layers": [{"mixer": attention if n else mamba2, "ffn": ffn} for n in kv]}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixers = [layer.mixer.resolved(config.hidden_size) for layer in config.spec.layers]
        kinds = {mixer.name: mixer for mixer in mixers}
        if len(kinds) != 2 or any(mixer != kinds[mixer.name] for mixer in mixers):
            raise OtherKindError("needs layers of Mamba-2 and of attention, each kind alike")
        attention = kinds["attention"]
        keys = self.shared(config, kinds["mamba2"], attention)
        keys["attention__head_count_kv"] = [attention.kv_heads if m.name == "attention" else 0 for m in mixers]
        return self.keys(config, **keys, rope__scaling__finetuned=True)

    def mixer(self, theirs: str, ours: str, options: Any, width: int) -> Iterator[Entry]:
        if options.name == "mamba2":
            yield from mamba2_tensors(theirs, ours, options, width)
        else:
            yield from attention_entries(theirs, ours, options, turned=True, dim=options.rotary.dim)


@register_family
class GGUFFalconH1(_Hybrid):
    """Falcon-H1: Mamba-2 and attention side by side in every block; its constants are multiplied into the weights."""

    name = "falcon_h1"
    architecture = about = "falcon-h1"
    mixers = ("parallel",)
    ffn_norm = "ffn_norm"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around = self.around(checkpoint)
        branches = {
            "mamba2": mamba2_fields(self, checkpoint, around["norm_eps"]),
            "attention": attention_fields(self, checkpoint, around),
        }
        layer = {"mixer": {"name": "parallel", "branches": branches}, "ffn": self.ffn(checkpoint)}
        return {**around, "layers": [layer] * self.key(checkpoint, "block_count")}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer = one_layer(config).mixer
        branches = {label: o.resolved(config.hidden_size) for label, o in mixer.branch_options().items()}
        if {label: o.name for label, o in branches.items()} != {"mamba2": "mamba2", "attention": "attention"}:
            raise OtherKindError(f"layers.0.mixer.branches are {', '.join(branches)}; its are attention and mamba2")
        return self.keys(config, **self.shared(config, branches["mamba2"], branches["attention"]))

    def mixer(self, theirs: str, ours: str, options: Any, width: int) -> Iterator[Entry]:
        branches = options.branch_options()
        yield from mamba2_tensors(theirs, f"{ours}branches.mamba2.", branches["mamba2"], width)
        yield from attention_entries(theirs, f"{ours}branches.attention.", branches["attention"], turned=False)
