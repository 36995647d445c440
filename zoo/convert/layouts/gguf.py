"""GGUF, the files of llama.cpp, in and out: Llama, Mamba and Mamba-2.

llama.cpp turns neighbouring numbers of a head together, Llama's own code the halves of it: rows of queries and keys are
reordered. A of Mamba is stored as it is used, -exp(A_log). A file holds the vocabulary too; see `gguf_file.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.gguf_file import open_gguf, write_gguf
from zoo.convert.layouts.mamba2 import mamba2_entries, mamba2_options
from zoo.convert.layouts.mapping import Entry, mapped, same
from zoo.errors import CheckpointError, ExportError


class _GGUF(Family):
    layout = "gguf"
    own_format = "a GGUF file"
    architecture: ClassVar[str]

    @classmethod
    def opens(cls, path: Path) -> Checkpoint | None:
        return open_gguf(path)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("general.architecture") == self.architecture

    def key(self, checkpoint: Checkpoint, name: str, default: Any = None) -> Any:
        """A key of the architecture; without a default it must be there."""
        found = checkpoint.config.get(f"{self.architecture}.{name}", default)
        if found is None:
            raise CheckpointError(f"{checkpoint.path}: {self.architecture}.{name} is missing")
        return found

    def around(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Fields that all have."""
        shape = checkpoint.shapes.get("token_embd.weight")
        if shape is None or len(shape) != 2:
            raise CheckpointError(f"{checkpoint.path}: token_embd.weight is missing or no matrix")
        ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        found = {ours: checkpoint.config.get(f"tokenizer.ggml.{name}_token_id") for ours, name in ids.items()}
        return {
            "vocab_size": shape[0],
            "hidden_size": self.key(checkpoint, "embedding_length"),
            "max_position_embeddings": self.key(checkpoint, "context_length", 2048),
            "norm_eps": round(self.key(checkpoint, "attention.layer_norm_rms_epsilon"), 12),
            "tie_word_embeddings": "output.weight" not in checkpoint.shapes,
            **{name: int(value) for name, value in found.items() if value is not None},
        }

    def keys(self, config: ZooConfig, **more: Any) -> dict[str, Any]:
        """Their keys that all have, and `more` of the architecture."""
        spec = config.spec
        if spec.block != "pre_norm" or spec.norm != "rms_norm" or spec.embedding_norm or spec.positions != "none":
            raise ExportError(f"block, norm or positions are not those of llama.cpp's {self.architecture}")
        common = {
            "context_length": spec.max_position_embeddings,
            "embedding_length": spec.hidden_size,
            "block_count": len(spec.layers),
            "vocab_size": spec.vocab_size,
            "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        }
        told = {f"{self.architecture}.{name.replace('__', '.')}": v for name, v in {**common, **more}.items()}
        return {"general.architecture": self.architecture, **told}

    def outside(self, config: ZooConfig) -> Iterator[Entry]:
        """What is not in a block."""
        yield same("token_embd.weight", "model.embed_tokens.weight")
        yield same("output_norm.weight", "model.norm.weight")
        if not config.tie_word_embeddings:
            yield same("output.weight", "lm_head.weight")

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return ("rope_freqs.weight",)

    def write(self, model: Any, folder: Path, config: dict[str, Any], tokenizer: Any = None) -> None:
        from zoo.convert.layouts.loading import their_tensors

        write_gguf(folder / "model.gguf", config, their_tensors(self, model), model.dtype, tokenizer)


@register_family
class GGUFLlama(_GGUF):
    """Llama and Mistral without windows."""

    name = architecture = "llama"
    about = "llama"
    mixers = ("attention",)

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around = self.around(checkpoint)
        heads = self.key(checkpoint, "attention.head_count")
        size = self.key(checkpoint, "attention.key_length", around["hidden_size"] // heads)
        if (
            checkpoint.config.get("llama.rope.scaling.type", "none") != "none"
            or self.key(checkpoint, "rope.dimension_count", size) != size
        ):
            raise CheckpointError(f"{checkpoint.path}: llama.rope: scaled or partial positions are not known here")
        if any("_exps" in name for name in checkpoint.shapes):
            raise CheckpointError(f"{checkpoint.path}: a mixture of experts is not known here")
        mixer = {
            "name": "attention",
            "num_heads": heads,
            "num_kv_heads": self.key(checkpoint, "attention.head_count_kv", heads),
            "head_dim": size,
            "rotary": {"theta": float(self.key(checkpoint, "rope.freq_base", 10000.0))},
        }
        ffn = {"name": "gated_mlp", "hidden_size": self.key(checkpoint, "feed_forward_length"), "activation": "silu"}
        return {**around, "layers": [{"mixer": mixer, "ffn": ffn}] * self.key(checkpoint, "block_count")}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layer = config.spec.layers[0]
        if layer.ffn is None or layer.ffn.name != "gated_mlp" or layer.mixer.rotary is None:
            raise ExportError("layers.0: needs rotary positions and a gated MLP")
        return self.keys(
            config,
            feed_forward_length=layer.ffn.resolved(config.hidden_size).hidden_size,
            attention__head_count=layer.mixer.num_heads,
            attention__head_count_kv=layer.mixer.kv_heads,
            attention__key_length=layer.mixer.head_dim,
            attention__value_length=layer.mixer.value_dim,
            rope__dimension_count=layer.mixer.head_dim,
            rope__freq_base=float(layer.mixer.rotary.theta),
        )

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        for i, layer in enumerate(config.spec.layers):
            ours, theirs = f"model.layers.{i}.", f"blk.{i}."
            yield _turned(f"{theirs}attn_q.weight", f"{ours}mixer.q_proj.weight", layer.mixer.num_heads)
            yield _turned(f"{theirs}attn_k.weight", f"{ours}mixer.k_proj.weight", layer.mixer.kv_heads)
            names = {"attn_v": "mixer.v_proj", "attn_output": "mixer.o_proj", "attn_norm": "mixer_norm"}
            names |= {"ffn_norm": "ffn_norm", **{f"ffn_{part}": f"ffn.{part}_proj" for part in ("gate", "up", "down")}}
            for name, mine in names.items():
                yield same(f"{theirs}{name}.weight", f"{ours}{mine}.weight")


def _turned(theirs: str, ours: str, heads: int) -> Entry:
    """Rows of a head in neighbouring pairs there, in halves here."""

    def read(t: Tensor) -> Tensor:
        return t.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def write(t: Tensor) -> Tensor:
        return t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return mapped(theirs, ours, read, write)


def _decay(theirs: str, ours: str, column: bool) -> Entry:
    """-exp(A_log) there, one column of it for Mamba-2; A_log here."""
    return mapped(
        theirs,
        ours,
        lambda t: (-(t.squeeze(1) if column else t).float()).log(),
        lambda t: -(t.float().exp().unsqueeze(1) if column else t.float().exp()),
    )


@register_family
class GGUFMamba(_GGUF):
    """Mamba."""

    name = architecture = "mamba"
    about = "mamba"
    mixers = ("mamba",)
    inert = ("out_init", "dt_min", "dt_max")

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        mixer = {
            "name": "mamba",
            "inner_dim": self.key(checkpoint, "ssm.inner_size"),
            "state_dim": self.key(checkpoint, "ssm.state_size"),
            "dt_rank": self.key(checkpoint, "ssm.time_step_rank"),
            "conv": self.key(checkpoint, "ssm.conv_kernel"),
        }
        return {**self.around(checkpoint), "layers": [{"mixer": mixer}] * self.key(checkpoint, "block_count")}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer = config.spec.layers[0].mixer.resolved(config.hidden_size)
        return self.keys(
            config,
            feed_forward_length=0,
            attention__head_count=0,
            ssm__inner_size=mixer.inner_dim,
            ssm__state_size=mixer.state_dim,
            ssm__time_step_rank=mixer.dt_rank,
            ssm__conv_kernel=mixer.conv,
            ssm__dt_b_c_rms=False,
        )

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        for i in range(config.num_hidden_layers):
            theirs, ours = f"blk.{i}.", f"model.layers.{i}.mixer."
            yield same(f"{theirs}attn_norm.weight", f"model.layers.{i}.mixer_norm.weight")
            names = {"in": "in_proj", "x": "x_proj", "dt": "dt_proj", "out": "out_proj", "conv1d": "conv"}
            for name, mine in names.items():
                yield same(f"{theirs}ssm_{name}.weight", f"{ours}{mine}.weight")
            yield same(f"{theirs}ssm_conv1d.bias", f"{ours}conv.bias")
            yield same(f"{theirs}ssm_dt.bias", f"{ours}dt_bias")
            yield same(f"{theirs}ssm_d", f"{ours}D")
            yield _decay(f"{theirs}ssm_a", f"{ours}A_log", column=False)


_MAMBA2 = {
    "in_proj.weight": "ssm_in.weight", "out_proj.weight": "ssm_out.weight", "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias", "dt_bias": "ssm_dt.bias",
}  # fmt: skip


@register_family
class GGUFMamba2(_GGUF):
    """Mamba-2."""

    name = architecture = "mamba2"
    about = "mamba2"
    mixers = ("mamba2",)
    inert = ("dt_min", "dt_max")

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        inner, heads = self.key(checkpoint, "ssm.inner_size"), self.key(checkpoint, "ssm.time_step_rank")
        around = self.around(checkpoint)
        mixer = mamba2_options(
            heads, inner // heads, self.key(checkpoint, "ssm.state_size"), self.key(checkpoint, "ssm.group_count"),
            conv=self.key(checkpoint, "ssm.conv_kernel"), conv_bias=True, bias=False, eps=around["norm_eps"], floor=0.0,
        )  # fmt: skip
        return {**around, "layers": [{"mixer": mixer}] * self.key(checkpoint, "block_count")}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer = config.spec.layers[0].mixer.resolved(config.hidden_size)
        return self.keys(
            config,
            feed_forward_length=0,
            attention__head_count=0,
            ssm__inner_size=mixer.num_heads * mixer.value_dim,
            ssm__state_size=mixer.head_dim,
            ssm__time_step_rank=mixer.num_heads,
            ssm__group_count=mixer.num_groups or mixer.num_heads,
            ssm__conv_kernel=mixer.conv,
        )

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        for i, layer in enumerate(config.spec.layers):
            theirs, ours, o = f"blk.{i}.", f"model.layers.{i}.mixer.", layer.mixer.resolved(config.hidden_size)
            yield same(f"{theirs}attn_norm.weight", f"model.layers.{i}.mixer_norm.weight")
            for entry in mamba2_entries("", ours, layer.mixer, config.hidden_size):
                name = entry.theirs[0]
                if name == "conv1d.weight":  # (channels, taps) here, with an axis of one there
                    yield _without_axis(entry, f"{theirs}ssm_conv1d.weight")
                elif name in _MAMBA2:
                    yield Entry((f"{theirs}{_MAMBA2[name]}",), entry.ours, entry.read, entry.write)
            yield _decay(f"{theirs}ssm_a", f"{ours}A_log", column=True)
            yield mapped(f"{theirs}ssm_d", f"{ours}D", lambda t: t.squeeze(1), lambda t: t.unsqueeze(1))
            groups = o.num_groups or o.num_heads
            yield mapped(
                f"{theirs}ssm_norm.weight",
                f"{ours}norm.weight",
                lambda t: t.flatten(),
                lambda t, groups=groups: t.unflatten(0, (groups, -1)),  # type: ignore[misc]
            )


def _without_axis(entry: Entry, theirs: str) -> Entry:
    def read(tensors: list[Tensor]) -> list[Tensor]:
        return entry.read([tensors[0].unsqueeze(1)])

    def write(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.squeeze(t, 1) for t in entry.write(tensors)]

    return Entry((theirs,), entry.ours, read, write)
