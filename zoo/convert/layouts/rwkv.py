"""RWKV-4, -6 and -7 in the authors' own files: one `.pth` without a config; sizes are read off the tensors.

Names are those of https://github.com/BlinkDL/RWKV-LM (RWKV-v4, v5 for version 6, v7) and of the package `rwkv`, which
runs them. Vectors are (1, 1, width) there. The first layer of version 7 has no use for its value residual: newer files
leave it out, and so do ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, flat, rows, same, shaped, transposed
from zoo.errors import CheckpointError, ExportError


class RWKVFile(Family):
    """What the versions share: the names around the time mix, and no config."""

    layout = "rwkv"
    version: ClassVar[int]
    sign: ClassVar[str]  # a parameter of the first layer that only this version has
    signs: ClassVar[tuple[str, ...]] = ()  # and what must not be beside it

    def recognises(self, checkpoint: Checkpoint) -> bool:
        names = checkpoint.shapes
        alone = not checkpoint.config.get("model_type") and "format" not in checkpoint.metadata
        here = alone and f"blocks.0.{self.sign}" in names
        return here and not any(f"blocks.0.{sign}" in names for sign in self.signs)

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        shapes = checkpoint.shapes
        for name in ("emb.weight", f"blocks.0.{self.sign}", "blocks.0.ffn.key.weight"):
            if name not in shapes:
                raise CheckpointError(f"{checkpoint.path}: {name} is missing")
        vocabulary, width = _matrix(checkpoint, "emb.weight")
        layers = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.") and n.split(".")[1].isdigit())
        hidden = _matrix(checkpoint, "blocks.0.ffn.key.weight")[0]
        ffn = {"name": "rwkv_channel_mix", "version": self.version, "hidden_size": hidden}
        mixer = {"name": f"rwkv{self.version}", **self.mixer_fields(checkpoint, width)}
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "embedding_norm": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
            "layers": [{"mixer": mixer, "ffn": ffn}] * layers,
        }

    def mixer_fields(self, checkpoint: Checkpoint, width: int) -> dict[str, Any]:
        """Options of the time mix, from its shapes."""
        raise NotImplementedError(f"{type(self).__name__} has no mixer_fields")

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield same("emb.weight", "model.embed_tokens.weight")
        yield from _norm("blocks.0.ln0", "model.embed_norm")
        for i, layer in enumerate(config.spec.layers):
            theirs, ours = f"blocks.{i}.", f"model.layers.{i}."
            yield from _norm(f"{theirs}ln1", f"{ours}mixer_norm")
            yield from _norm(f"{theirs}ln2", f"{ours}ffn_norm")
            yield from self.time_mix(f"{theirs}att.", f"{ours}mixer.", i, layer.mixer, config.hidden_size)
            yield from self.channel_mix(f"{theirs}ffn.", f"{ours}ffn.", config.hidden_size)
        yield from _norm("ln_out", "model.norm")
        yield same("head.weight", "lm_head.weight")

    def time_mix(self, theirs: str, ours: str, i: int, mixer: Any, width: int) -> Iterator[Entry]:
        """The time mix of layer i."""
        raise NotImplementedError(f"{type(self).__name__} has no time_mix")

    def channel_mix(self, theirs: str, ours: str, width: int) -> Iterator[Entry]:
        """The channel mix of versions 6 and 7, which differ in the names of their shares."""
        share = "time_maa_" if self.version == 6 else "x_"
        yield flat(f"{theirs}{share}k", f"{ours}shift_k", (1, 1, width))
        for name in ("key", "value") if self.version == 7 else ("key", "value", "receptance"):
            yield same(f"{theirs}{name}.weight", f"{ours}{name}.weight")
        if self.version == 6:
            yield flat(f"{theirs}{share}r", f"{ours}shift_r", (1, 1, width))

    def config(self, config: ZooConfig) -> dict[str, Any]:
        spec = config.spec
        for i, layer in enumerate(spec.layers):
            if getattr(layer.ffn, "version", None) != self.version:
                raise ExportError(f"layers.{i}.ffn: has no channel mix but that of version {self.version}")
        if spec.tie_word_embeddings or not spec.embedding_norm:
            raise ExportError("its head has weights of its own, and its embeddings a norm")
        return {}

    def save(self, folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]]) -> None:
        from zoo.convert.layouts.writing import save_torch

        save_torch(folder / "model.pth", tensors)


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.shapes.get(name, ())
    if len(shape) != 2:
        raise CheckpointError(f"{checkpoint.path}: {name} is {shape}, expected a matrix")
    return shape[0], shape[1]


def _norm(theirs: str, ours: str) -> Iterator[Entry]:
    for parameter in ("weight", "bias"):
        yield same(f"{theirs}.{parameter}", f"{ours}.{parameter}")


@register_family
class RWKV4File(RWKVFile):
    """RWKV-4-Pile-*.pth, RWKV-4-World-*.pth."""

    name = "rwkv4"
    about = "RWKV-4-*.pth of BlinkDL"
    mixers = ("rwkv4",)
    version = 4
    sign, signs = "att.time_mix_k", ("att.ln_x.weight",)

    def mixer_fields(self, checkpoint: Checkpoint, width: int) -> dict[str, Any]:
        return {"inner_dim": _matrix(checkpoint, "blocks.0.att.key.weight")[0]}

    def time_mix(self, theirs: str, ours: str, i: int, mixer: Any, width: int) -> Iterator[Entry]:
        for letter in "kvr":
            yield flat(f"{theirs}time_mix_{letter}", f"{ours}shift_{letter}", (1, 1, width))
        yield same(f"{theirs}time_decay", f"{ours}log_rate")
        yield same(f"{theirs}time_first", f"{ours}bonus")
        for name, mine in {"key": "k", "value": "v", "receptance": "r", "output": "o"}.items():
            yield same(f"{theirs}{name}.weight", f"{ours}{mine}_proj.weight")

    def channel_mix(self, theirs: str, ours: str, width: int) -> Iterator[Entry]:
        for letter in "kr":
            yield flat(f"{theirs}time_mix_{letter}", f"{ours}shift_{letter}", (1, 1, width))
        for name in ("key", "value", "receptance"):
            yield same(f"{theirs}{name}.weight", f"{ours}{name}.weight")


class _WithHeads(RWKVFile):
    """What versions 6 and 7 share: heads with a matrix state, and a norm per head."""

    def heads(self, checkpoint: Checkpoint, bonus: str) -> dict[str, int]:
        """Number and size of the heads, from the bonus of the present."""
        heads, size = _matrix(checkpoint, f"blocks.0.att.{bonus}")
        return {"num_heads": heads, "head_dim": size}

    def projections(self, theirs: str, ours: str) -> Iterator[Entry]:
        """Receptance, key, value, output, and the norm per head."""
        for name, mine in {"receptance": "q", "key": "k", "value": "v", "output": "o"}.items():
            yield same(f"{theirs}{name}.weight", f"{ours}{mine}_proj.weight")
        yield from _norm(f"{theirs}ln_x", f"{ours}norm")


@register_family
class RWKV6File(_WithHeads):
    """RWKV-x060-World-*.pth."""

    name = "rwkv6"
    about = "RWKV-x060-*.pth of BlinkDL"
    mixers = ("rwkv6",)
    version = 6
    sign = "att.time_maa_x"

    def mixer_fields(self, checkpoint: Checkpoint, width: int) -> dict[str, Any]:
        shift = _matrix(checkpoint, "blocks.0.att.time_maa_w1")[1]
        return {
            **self.heads(checkpoint, "time_faaaa"),
            "shift_rank": shift // 5,
            "decay_rank": _matrix(checkpoint, "blocks.0.att.time_decay_w1")[1],
        }

    def time_mix(self, theirs: str, ours: str, i: int, mixer: Any, width: int) -> Iterator[Entry]:
        keys = (1, 1, mixer.num_heads * mixer.head_dim)
        yield flat(f"{theirs}time_maa_x", f"{ours}shift_x", (1, 1, width))
        yield rows([f"{theirs}time_maa_{n}" for n in "wkvrg"], f"{ours}shift_MD", (1, 1, width))
        yield transposed(f"{theirs}time_maa_w1", f"{ours}shift_down.weight")
        yield same(f"{theirs}time_maa_w2", f"{ours}shift_up_MRD")
        yield flat(f"{theirs}time_decay", f"{ours}decay_bias", keys)
        yield transposed(f"{theirs}time_decay_w1", f"{ours}decay_proj.down.weight")
        yield transposed(f"{theirs}time_decay_w2", f"{ours}decay_proj.up.weight")
        yield same(f"{theirs}time_faaaa", f"{ours}bonus_GK")
        yield same(f"{theirs}gate.weight", f"{ours}g_proj.weight")
        yield from self.projections(theirs, ours)


@register_family
class RWKV7File(_WithHeads):
    """RWKV-x070-World-*.pth, rwkv7-g1-*.pth."""

    name = "rwkv7"
    about = "RWKV-x070-*.pth and rwkv7-*.pth of BlinkDL"
    mixers = ("rwkv7",)
    version = 7
    sign = "att.x_r"

    def mixer_fields(self, checkpoint: Checkpoint, width: int) -> dict[str, Any]:
        values = "blocks.1.att.v1" if "blocks.1.att.v1" in checkpoint.shapes else "blocks.0.att.v1"
        ranks = {"decay_rank": "blocks.0.att.w1", "rate_rank": "blocks.0.att.a1", "gate_rank": "blocks.0.att.g1"}
        found = {key: _matrix(checkpoint, name)[1] for key, name in ranks.items()}
        if values in checkpoint.shapes:  # a single layer has none
            found["value_rank"] = _matrix(checkpoint, values)[1]
        return {**self.heads(checkpoint, "r_k"), **found}

    def time_mix(self, theirs: str, ours: str, i: int, mixer: Any, width: int) -> Iterator[Entry]:
        vector = (1, 1, mixer.num_heads * mixer.head_dim)
        yield rows([f"{theirs}x_{n}" for n in "rwkvag"], f"{ours}shift_MD", (1, 1, width))
        for letter, low in {"w": "decay", "a": "a", "v": "residual", "g": "g"}.items():
            unused = letter == "v" and i == 0
            for part, place in (("1", "down"), ("2", "up")):
                name = f"{ours}{low}_proj.{place}.weight"
                yield transposed(f"{theirs}{letter}{part}", name, optional=unused)
        yield flat(f"{theirs}w0", f"{ours}decay_bias", vector)
        yield flat(f"{theirs}a0", f"{ours}a_bias", vector)
        yield flat(f"{theirs}v0", f"{ours}residual_bias", vector, optional=i == 0)
        for name, mine in {"k_k": "removal_GK", "k_a": "rate_share_GK"}.items():
            yield shaped(f"{theirs}{name}", f"{ours}{mine}", vector, (mixer.num_heads, mixer.head_dim))
        yield same(f"{theirs}r_k", f"{ours}bonus_HK")
        yield from self.projections(theirs, ours)
