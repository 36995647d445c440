"""RWKV-6 and RWKV-7 in GGUF.

Matrices of low rank, (in, out) in the authors' files, are (out, in) here and there. Files of RWKV-6 that llama.cpp made
have the outputs of every n-th layer halved, and what leads to them, so that half precision does not overflow; that is
undone when they are read, and not done when they are written (`rescale_every_n_layers` 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.family import register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.gguf import GGUF
from zoo.convert.layouts.mamba import one_mixer
from zoo.convert.layouts.mapping import Entry, initial, mapped, pairs, rows, same, shaped
from zoo.errors import CheckpointError, ExportError

_BOTH = ("weight", "bias")


class _RWKV(GGUF):
    norm = "layer_norm"
    embedding_norm = True
    version: ClassVar[int]
    ranks: ClassVar[dict[str, str]]

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around, size = self.around(checkpoint), self.key(checkpoint, "wkv.head_size")
        self.only(checkpoint, "token_shift_count", 2)
        mixer = {
            "name": self.name,
            "num_heads": around["hidden_size"] // size,
            "head_dim": size,
            **{ours: self.key(checkpoint, name) for ours, name in self.ranks.items()},
        }
        hidden = self.key(checkpoint, "feed_forward_length")
        ffn = {"name": "rwkv_channel_mix", "version": self.version, "hidden_size": hidden}
        return {**around, "layers": [{"mixer": mixer, "ffn": ffn}] * self.key(checkpoint, "block_count")}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer, ffn = one_mixer(config), config.spec.layers[0].ffn
        if getattr(ffn, "version", None) != self.version:
            raise ExportError(f"layers.0.ffn: has no channel mix but that of version {self.version}")
        if mixer.num_heads * mixer.head_dim != config.hidden_size or config.tie_word_embeddings:
            raise ExportError("its heads fill the width, and its head has weights of its own")
        return self.keys(
            config,
            attention__head_count=0,
            feed_forward_length=ffn.resolved(config.hidden_size).hidden_size,  # type: ignore[union-attr]
            wkv__head_size=mixer.head_dim,
            **{name.replace(".", "__"): getattr(mixer, ours) for ours, name in self.ranks.items()},
        )

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        for i, layer in enumerate(config.spec.layers):
            theirs, ours = f"blk.{i}.", f"model.layers.{i}."
            yield from pairs(theirs, ours, {"attn_norm": "mixer_norm", "attn_norm_2": "ffn_norm"}, _BOTH)
            names = {"receptance": "q", "key": "k", "value": "v", "output": "o"}
            for name, mine in names.items():
                yield same(f"{theirs}time_mix_{name}.weight", f"{ours}mixer.{mine}_proj.weight")
            yield from pairs(theirs, ours, {"time_mix_ln": "mixer.norm"}, _BOTH)
            yield from self.time_mix(f"{theirs}time_mix_", f"{ours}mixer.", i, layer.mixer, config.hidden_size)
            channel = {"lerp_k": "shift_k", "key": "key.weight", "value": "value.weight"}
            if self.version == 6:
                channel |= {"lerp_r": "shift_r", "receptance": "receptance.weight"}
            for name, mine in channel.items():
                yield same(f"{theirs}channel_mix_{name}.weight", f"{ours}ffn.{mine}")

    def time_mix(self, theirs: str, ours: str, i: int, mixer: Any, width: int) -> Iterator[Entry]:
        """What the time mix of layer i has beside its four projections and its norm."""
        raise NotImplementedError


@register_family
class GGUFRWKV6(_RWKV):
    """RWKV-6."""

    name = architecture = "rwkv6"
    about = "rwkv6"
    mixers = ("rwkv6",)
    version = 6
    ranks: ClassVar = {"shift_rank": "time_mix_extra_dim", "decay_rank": "time_decay_extra_dim"}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        return {**super().config(config), "rwkv6.rescale_every_n_layers": 0}

    def entries_of(self, config: ZooConfig, checkpoint: Checkpoint) -> Iterator[Entry]:
        every = self.key(checkpoint, "rescale_every_n_layers", 0)
        if not isinstance(every, int) or every < 0:
            raise CheckpointError(f"{checkpoint.path}: rwkv6.rescale_every_n_layers is {every!r}")
        single = "blk.0.time_mix_lerp_w.weight" in checkpoint.shapes  # files from before they were one tensor
        for entry in self.entries(config):
            block, _, name = entry.theirs[0].removeprefix("blk.").partition(".")
            if every and name in ("time_mix_output.weight", "channel_mix_value.weight"):
                yield _halved(entry, int(block) // every)
            elif single and name == "time_mix_lerp_fused.weight":
                names = [f"blk.{block}.time_mix_lerp_{letter}.weight" for letter in "wkvrg"]
                yield rows(names, entry.ours[0], (config.hidden_size,))
            else:
                yield entry

    def time_mix(self, theirs: str, ours: str, i: int, mixer: Any, width: int) -> Iterator[Entry]:
        names = {
            "gate": "g_proj.weight", "first": "bonus_GK", "decay": "decay_bias", "decay_w1": "decay_proj.down.weight",
            "decay_w2": "decay_proj.up.weight", "lerp_x": "shift_x", "w1": "shift_down.weight",
        }  # fmt: skip
        for name, mine in names.items():
            yield same(f"{theirs}{name}.weight", f"{ours}{mine}")
        yield mapped(f"{theirs}w2.weight", f"{ours}shift_up_MRD", _swapped, _swapped)
        yield shaped(f"{theirs}lerp_fused.weight", f"{ours}shift_MD", (5, 1, 1, width), (5, width))


def _swapped(tensor: Any) -> Any:
    return tensor.transpose(1, 2).contiguous()


def _halved(entry: Entry, times: int) -> Entry:
    """A tensor that was halved so many times there."""
    return mapped(entry.theirs[0], entry.ours[0], lambda t: t.float() * 2**times, lambda t: t / 2**times)


@register_family
class GGUFRWKV7(_RWKV):
    """RWKV-7. Its first layer has no use for a value residual; there it has tensors by that name all the same."""

    name = architecture = "rwkv7"
    about = "rwkv7"
    mixers = ("rwkv7",)
    version = 7
    ranks: ClassVar = {
        "decay_rank": "attention.decay_lora_rank", "rate_rank": "attention.iclr_lora_rank",
        "value_rank": "attention.value_residual_mix_lora_rank", "gate_rank": "attention.gate_lora_rank",
    }  # fmt: skip

    def is_dropped(self, name: str) -> bool:
        return name in {f"blk.0.time_mix_v{part}.weight" for part in "012"}

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        width, rank = config.hidden_size, one_mixer(config).rate_rank
        shapes = {"v0": (width,), "v1": (rank, width), "v2": (width, rank)}
        return {f"blk.0.time_mix_{name}.weight": shape for name, shape in shapes.items()}

    def time_mix(self, theirs: str, ours: str, i: int, mixer: Any, width: int) -> Iterator[Entry]:
        heads, size = mixer.num_heads, mixer.head_dim
        yield shaped(f"{theirs}lerp_fused.weight", f"{ours}shift_MD", (6, 1, 1, width), (6, width))
        for letter, low in {"w": "decay", "a": "a", "v": "residual", "g": "g"}.items():
            names = {"1.weight": "proj.down.weight", "2.weight": "proj.up.weight"}
            if letter != "g":
                names["0.weight"] = "bias"
            for name, mine in names.items():
                unused = letter == "v" and i == 0
                yield (
                    initial(f"{ours}{low}_{mine}") if unused else same(f"{theirs}{letter}{name}", f"{ours}{low}_{mine}")
                )
        for name, mine in {"k_k": "removal_GK", "k_a": "rate_share_GK", "r_k": "bonus_HK"}.items():
            yield shaped(f"{theirs}{name}.weight", f"{ours}{mine}", (heads * size,), (heads, size))
