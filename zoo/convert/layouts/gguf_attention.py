"""Decoders of attention in GGUF: Llama, Qwen2, Qwen3, GPT-2 and GPT-NeoX.

llama.cpp turns neighbouring numbers of a head together in its `llama`, where Llama's own code turns the halves of it:
rows of queries and keys are reordered there (`turned`), and nowhere else. A file of Llama 3.1 and later has what its
positions are divided by as a tensor, `rope_freqs.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import OtherKindError, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.gguf import GGUF, tidy
from zoo.convert.layouts.gguf_file import ROPE_FACTORS
from zoo.convert.layouts.mamba import one_mixer
from zoo.convert.layouts.mapping import Entry, mapped, pairs, same, split
from zoo.errors import CheckpointError, ExportError
from zoo.ops.rotary import Llama3Scaling, LongRopeScaling, RotaryConfig, rotary_factors

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Decoder(GGUF):
    """Blocks of attention with rotary positions and a gated MLP, all alike.

    turned: rows of queries and keys are in the order of neighbouring pairs. square: heads fill the width. factors: a
    tensor can divide the positions. biases: whether queries, keys and values have some, and whether outputs have.
    qk_norm: over what queries and keys have a norm, "" where they have none.
    """

    mixers = ("attention",)
    turned: ClassVar[bool] = False
    square: ClassVar[bool] = False
    factors: ClassVar[bool] = False
    biases: ClassVar[tuple[tuple[bool, bool], ...]] = ((False, False),)
    qk_norm: ClassVar[str] = ""

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around = self.around(checkpoint)
        layer = {"mixer": attention_fields(self, checkpoint, around), "ffn": self.ffn(checkpoint)}
        return {**around, "layers": [layer] * self.key(checkpoint, "block_count")}

    def ffn(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Options of the channel mixers."""
        return {"name": "gated_mlp", "hidden_size": self.key(checkpoint, "feed_forward_length"), "activation": "silu"}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer, ffn = one_mixer(config), config.spec.layers[0].ffn
        if mixer.rotary is None:
            raise OtherKindError("layers.0.mixer.rotary is None; its attention has rotary positions")
        if (mixer.qkv_bias, mixer.out_bias) not in self.biases:
            raise OtherKindError(f"biases (queries, keys and values; outputs) are {mixer.qkv_bias, mixer.out_bias}")
        if (mixer.qk_norm_span if mixer.qk_norm else "") != self.qk_norm:
            raise OtherKindError(f"layers.0.mixer.qk_norm: its norm of queries and keys is {self.qk_norm or None}")
        if self.square and mixer.num_heads * mixer.head_dim != config.hidden_size:
            raise ExportError(f"{mixer.num_heads} heads of {mixer.head_dim} do not fill the width {config.hidden_size}")
        return self.keys(config, **self.ffn_keys(ffn, config.hidden_size), **attention_keys(self, mixer))

    def ffn_keys(self, ffn: Any, width: int) -> dict[str, Any]:
        """Their keys of the channel mixers. Raises ExportError for others than theirs."""
        if ffn is None or ffn.name != "gated_mlp":
            raise OtherKindError(f"layers.0.ffn is {None if ffn is None else ffn.name}; its blocks have gated_mlp")
        return {"feed_forward_length": ffn.resolved(width).hidden_size}

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        if self.factors:
            yield from rope_factors(config.spec.layers[0].mixer)
        for i, layer in enumerate(config.spec.layers):
            ours, theirs = f"model.layers.{i}.", f"blk.{i}."
            yield from pairs(theirs, ours, {"attn_norm": "mixer_norm", "ffn_norm": "ffn_norm"})
            yield from attention_entries(theirs, f"{ours}mixer.", layer.mixer, self.turned)
            yield from self.ffn_entries(theirs, f"{ours}ffn.", layer.ffn)

    def ffn_entries(self, theirs: str, ours: str, ffn: Any) -> Iterator[Entry]:
        """The channel mixer of a block."""
        yield from pairs(theirs, ours, {f"ffn_{part}": f"{part}_proj" for part in ("gate", "up", "down")})


def attention_fields(family: GGUF, checkpoint: Checkpoint, around: dict[str, Any]) -> dict[str, Any]:
    """Options of `attention`; biases and norms of queries and keys are there where their tensors are."""
    heads = family.key(checkpoint, "attention.head_count")
    size = family.key(checkpoint, "attention.key_length", around["hidden_size"] // heads)
    family.only(checkpoint, "attention.value_length", size)
    block = next((n.split(".")[1] for n in checkpoint.shapes if n.endswith(".attn_q.weight")), "0")
    shapes = {n.removeprefix(f"blk.{block}."): s for n, s in checkpoint.shapes.items() if n.startswith(f"blk.{block}.")}
    norm = shapes.get("attn_q_norm.weight")
    span = {} if norm is None else {"qk_norm": True, "qk_norm_eps": around["norm_eps"]}
    if norm is not None and norm != (size,):
        span["qk_norm_span"] = "all"
    kv = family.key(checkpoint, "attention.head_count_kv", heads)
    return {
        "name": "attention",
        "num_heads": heads,
        "num_kv_heads": max(kv) if isinstance(kv, list) else kv,
        "head_dim": size,
        "qkv_bias": "attn_q.bias" in shapes,
        "out_bias": "attn_output.bias" in shapes,
        "rotary": rotary_fields(family, checkpoint, size),
        **span,
    }


def attention_keys(family: GGUF, mixer: Any) -> dict[str, Any]:
    """Their keys of `attention`, with `__` for the dots in names."""
    rotary: RotaryConfig = mixer.rotary
    turned = rotary.dim or mixer.head_dim
    scaling = {}
    if rotary.scaling is not None and rotary.scaling.rope_type == "linear":
        scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": rotary.scaling.factor}
    elif rotary.scaling is not None:
        if not getattr(family, "factors", False):
            raise ExportError(f"layers.0.mixer.rotary.scaling is {rotary.scaling.rope_type}; it has linear or none")
        scaling = {ROPE_FACTORS: _factors(mixer).tolist()}
    return {
        "attention__head_count": mixer.num_heads,
        "attention__head_count_kv": mixer.kv_heads,
        "attention__key_length": mixer.head_dim,
        "attention__value_length": mixer.value_dim,
        "rope__dimension_count": turned,
        "rope__freq_base": float(rotary.theta),
        **scaling,
    }


def rotary_fields(family: GGUF, checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    """Options of the rotary positions of heads of `size`. Factors of a tensor are Llama 3.1's, or any others."""
    turned = family.key(checkpoint, "rope.dimension_count", size)
    if turned != size and isinstance(family, Decoder):
        family.only(checkpoint, "rope.dimension_count", size)
    theta = tidy(family.key(checkpoint, "rope.freq_base", 10000.0))
    found: dict[str, Any] = {"theta": theta, "dim": None if turned == size else turned}
    family.only(checkpoint, "rope.scaling.type", "none", "linear")
    factors = checkpoint.config.get(f"{family.architecture}.{ROPE_FACTORS}")
    if family.key(checkpoint, "rope.scaling.type", "none") == "linear":
        found["scaling"] = {"rope_type": "linear", "factor": tidy(family.key(checkpoint, "rope.scaling.factor"))}
    elif factors is not None and getattr(family, "factors", False):
        llama3 = Llama3Scaling(factor=max(factors), **LLAMA3)  # type: ignore[arg-type]
        expected = rotary_factors(RotaryConfig(theta=theta, scaling=llama3), size)
        if len(factors) == len(expected) and torch.allclose(torch.tensor(factors), expected, rtol=1e-4):
            found["scaling"] = llama3.model_dump(mode="json")
        else:
            either = {"short_factor": list(factors), "long_factor": list(factors), "factor": 1.0}
            found["scaling"] = {"rope_type": "longrope", **either, "original_max_position_embeddings": 1}
    elif factors is not None:
        raise CheckpointError(f"{checkpoint.path}: {ROPE_FACTORS} is not known in {family.architecture}")
    return found


def rope_factors(mixer: Any) -> Iterator[Entry]:
    """What the angles are divided by, where the positions are scaled so; the config has it, and no tensor of ours."""
    scaling = mixer.rotary.scaling
    if scaling is not None and scaling.rope_type != "linear":
        yield Entry((ROPE_FACTORS,), (), lambda t: [], lambda t: [_factors(mixer)])


def _factors(mixer: Any) -> Tensor:
    scaling = mixer.rotary.scaling
    if isinstance(scaling, Llama3Scaling):
        return rotary_factors(mixer.rotary, mixer.head_dim)
    if isinstance(scaling, LongRopeScaling) and scaling.short_factor == scaling.long_factor:
        return torch.tensor(scaling.short_factor)
    raise ExportError(f"layers.0.mixer.rotary.scaling is {scaling.rope_type}; it has linear, llama3 or none")


def attention_entries(theirs: str, ours: str, options: Any, turned: bool, dim: int | None = None) -> Iterator[Entry]:
    """Queries, keys, values and output of a block, with biases and norms where there are some."""
    heads = {"q": options.num_heads, "k": options.kv_heads}
    for letter, name in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}.items():
        biased = options.out_bias if letter == "o" else options.qkv_bias
        for parameter in ("weight", "bias") if biased else ("weight",):
            pair = f"{theirs}{name}.{parameter}", f"{ours}{letter}_proj.{parameter}"
            yield neighbours(*pair, heads[letter], dim) if turned and letter in heads else same(*pair)
    if options.qk_norm:
        yield from pairs(theirs, ours, {"attn_q_norm": "q_norm", "attn_k_norm": "k_norm"})


def neighbours(theirs: str, ours: str, heads: int, dim: int | None = None) -> Entry:
    """Rows of each head in neighbouring pairs there, in halves here; of its first `dim` rows, where not of all."""

    def reorder(t: Tensor, halves: tuple[int, int]) -> Tensor:
        by_head = t.unflatten(0, (heads, -1))
        part = by_head if dim is None else by_head[:, :dim]
        part = part.unflatten(1, halves).transpose(1, 2).flatten(1, 2)
        return (part if dim is None else torch.cat([part, by_head[:, dim:]], 1)).flatten(0, 1)

    return mapped(theirs, ours, lambda t: reorder(t, (-1, 2)), lambda t: reorder(t, (2, -1)))


@register_family
class GGUFLlama(Decoder):
    """Llama, and Mistral without windows: llama.cpp's `llama` knows none."""

    name = architecture = "llama"
    about = "llama"
    turned = factors = True
    biases = ((False, False), (True, True))

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return super().recognises(checkpoint) and not checkpoint.config.get("llama.expert_count")


@register_family
class GGUFQwen2(Decoder):
    """Qwen2: a Llama with biases on queries, keys and values."""

    name = architecture = "qwen2"
    about = "qwen2"
    square = True
    biases = ((True, False),)


@register_family
class GGUFQwen3(Decoder):
    """Qwen3: a Llama with a norm on each head of queries and keys."""

    name = architecture = "qwen3"
    about = "qwen3"
    qk_norm = "head"


class FusedDecoder(GGUF):
    """Layer norms, biases everywhere, a plain MLP, one projection for queries, keys and values.

    activation: of the MLP. llama.cpp computes every GELU in its tanh form, from a table of half precision.
    """

    mixers = ("attention",)
    norm = "layer_norm"
    activation: ClassVar[str]

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around = self.around(checkpoint)
        heads = self.key(checkpoint, "attention.head_count")
        size = around["hidden_size"] // heads
        mixer = {"name": "attention", "num_heads": heads, "head_dim": size, "qkv_bias": True, "out_bias": True}
        if self.positions == "none":
            mixer["rotary"] = rotary_fields(self, checkpoint, size)
        hidden = self.key(checkpoint, "feed_forward_length")
        ffn = {"name": "mlp", "hidden_size": hidden, "activation": self.activation}
        return {**around, "layers": [{"mixer": mixer, "ffn": ffn}] * self.key(checkpoint, "block_count")}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer, ffn = one_mixer(config), config.spec.layers[0].ffn
        if ffn is None or ffn.name != "mlp" or mixer.num_heads * mixer.head_dim != config.hidden_size:
            raise OtherKindError("needs heads that fill the width and a plain MLP")
        keys: dict[str, Any] = {"attention__head_count": mixer.num_heads}
        if self.positions == "none":
            if mixer.rotary is None or mixer.kv_heads != mixer.num_heads:
                raise OtherKindError("its attention has rotary positions, and as many heads of keys as of queries")
            keys = {k: v for k, v in attention_keys(self, mixer).items() if k in keys or k.startswith("rope__")}
        return self.keys(config, feed_forward_length=ffn.resolved(config.hidden_size).hidden_size, **keys)

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        if self.positions == "learned":
            yield same("position_embd.weight", "model.embed_positions.weight")
        for i in range(config.num_hidden_layers):
            ours, theirs, both = f"model.layers.{i}.", f"blk.{i}.", ("weight", "bias")
            names = {"attn_norm": "mixer_norm", "attn_output": "mixer.o_proj", "ffn_norm": "ffn_norm"}
            yield from pairs(theirs, ours, {**names, "ffn_up": "ffn.up_proj", "ffn_down": "ffn.down_proj"}, both)
            for parameter in both:
                parts = [f"{ours}mixer.{letter}_proj.{parameter}" for letter in "qkv"]
                yield split(f"{theirs}attn_qkv.{parameter}", parts, [config.hidden_size] * 3)


@register_family
class GGUFGPT2(FusedDecoder):
    """GPT-2: learned positions."""

    name = architecture = "gpt2"
    about = "gpt2"
    positions = "learned"
    activation = "gelu_new"


@register_family
class GGUFGPTNeoX(FusedDecoder):
    """GPT-NeoX and Pythia: attention and MLP side by side, rotary positions on a part of each head."""

    name = "gpt_neox"
    architecture = about = "gptneox"
    block = "parallel"
    activation = "gelu"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        self.only(checkpoint, "use_parallel_residual", True)
        return {**super().fields(checkpoint), "block": "parallel"}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        return {**super().config(config), "gptneox.use_parallel_residual": True}
