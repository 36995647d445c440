"""Zamba2 of transformers: Mamba-2 layers, of which some also read one of a few transformers that they share.

A shared transformer stands at the first layer that reads it; files may repeat it at the others. The k-th reader has the
k-th of the low-rank maps that are in its transformer's lists. The norm behind the gate of Mamba-2 has an epsilon of
1e-5, whatever the config says, and the convolution a bias. Where word vectors and head are not tied, transformers ties
nothing else either: such a file is read where its copies agree, and not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.config import LayerSpec, MemoryOptions, ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mamba2 import INERT, check_convolved, expansion, mamba2_entries, mamba2_options
from zoo.convert.layouts.mapping import Entry, pairs, same, split
from zoo.convert.layouts.rope import read_rope, write_rope
from zoo.convert.teachers.adapter import common_values
from zoo.errors import CheckpointError, ExportError
from zoo.transformers_keys import TOKEN_IDS, present

_GATE_EPS = 1e-5
_MAMBA, _HYBRID = "linear_attention", "hybrid"
_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 2560, "num_hidden_layers": 54, "max_position_embeddings": 4096,
    "mamba_d_state": 64, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "time_step_min": 0.001,
    "n_mamba_heads": 8, "hidden_act": "gelu", "num_attention_heads": 32, "num_mem_blocks": 1, "adapter_rank": 128,
    "use_shared_attention_adapter": False, "use_mem_rope": False, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
_FIXED = {"add_bias_linear": False, "use_long_context": False}
_READERS = (6, 12, 18, 24, 30, 36, 42, 47, 51)  # where a config does not say which


@register_family
class Zamba2(Family):
    """`Zamba2ForCausalLM`, as in Zyphra/Zamba2-1.2B."""

    layout = "transformers"
    name = "zamba2"
    about = "Zamba2ForCausalLM"
    mixers = ("mamba2",)
    inert = INERT

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == "zamba2"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**_DEFAULTS, **checkpoint.config}
        for key, value in _FIXED.items():
            if c.get(key, value) != value:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {value!r} can be expressed")
        readers, blocks = _readers(checkpoint, c["num_hidden_layers"]), c["num_mem_blocks"]
        mixer, memory, layers = _mamba2(checkpoint, c), _memory(checkpoint, c), []
        for i in range(c["num_hidden_layers"]):
            layers.append({"mixer": mixer})
            if i in readers:
                use = readers.index(i)
                layers[i]["memory"] = {**memory, "same_as": None if use < blocks else readers[use % blocks]}
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "max_position_embeddings": c["max_position_embeddings"],
            "layers": layers,
            "norm_eps": c["rms_norm_eps"],
            "tie_word_embeddings": c["tie_word_embeddings"],
            "initializer_range": c["initializer_range"],
            **present(c, *TOKEN_IDS),
        }

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        layers = config.spec.layers
        readers = [i for i, layer in enumerate(layers) if layer.memory is not None]
        yield same("model.embed_tokens.weight", "model.embed_tokens.weight")
        for i, layer in enumerate(layers):
            name = f"model.layers.{i}."
            own = name if layer.memory is None else f"{name}mamba_decoder."
            yield same(f"{own}input_layernorm.weight", f"{name}mixer_norm.weight")
            yield from mamba2_entries(f"{own}mamba.", f"{name}mixer.", layer.mixer, config.hidden_size)
            if layer.memory is not None:
                first = i if layer.memory.same_as is None else layer.memory.same_as
                shared = f"model.layers.{first}.shared_transformer."
                yield same(f"{name}linear.weight", f"{name}memory_out.weight")
                yield from _use(shared, f"{name}adapters.", layer.memory, readers.index(i))
                if first == i:
                    yield from _shared(shared, f"{name}memory.", layer.memory)
        yield same("model.final_layernorm.weight", "model.norm.weight")
        if not config.tie_word_embeddings:  # in files whose copies agree
            yield same("lm_head.weight", "lm_head.weight")

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        found = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        names = {name for entry in self.entries(config) for name in entry.theirs}
        for i, layer in enumerate(config.spec.layers):
            if layer.memory is not None and layer.memory.same_as is not None:
                first, here = (f"model.layers.{j}.shared_transformer." for j in (layer.memory.same_as, i))
                found |= {here + n.removeprefix(first): n for n in names if n.startswith(first)}
        return found

    def config(self, config: ZooConfig) -> dict[str, Any]:
        if not config.tie_word_embeddings:
            raise ExportError("tie_word_embeddings is false; its class then shares no transformer either")
        layers = config.spec.layers
        mixer = layers[0].mixer.resolved(config.hidden_size)
        memory, blocks = _one_memory(layers), sum(_holds(layer) for layer in layers)
        check_convolved(mixer)
        kinds = [_MAMBA if layer.memory is None else _HYBRID for layer in layers]
        heads = memory.attention.num_heads
        positions = memory.attention.rotary
        return {
            **common_values(config, self.name, self.about),
            "hidden_size": config.hidden_size,
            "num_hidden_layers": len(layers),
            "layers_block_type": kinds,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.norm_eps,
            "mamba_d_state": mixer.head_dim,
            "mamba_d_conv": mixer.conv,
            "mamba_expand": expansion(mixer, config.hidden_size),
            "mamba_ngroups": mixer.num_groups,
            "n_mamba_heads": mixer.num_heads,
            "time_step_min": mixer.dt_floor,
            "intermediate_size": memory.ffn.hidden_size,
            "hidden_act": memory.ffn.activation,
            "num_attention_heads": heads,
            "num_key_value_heads": memory.attention.kv_heads,
            "num_mem_blocks": blocks,
            "adapter_rank": memory.rank,
            "use_shared_attention_adapter": memory.adapt_attention,
            "use_mem_rope": positions is not None,
            "rope_parameters": write_rope(positions, memory.attention.head_dim) if positions else _NO_ROPE,
        }


_NO_ROPE = {"rope_type": "default", "rope_theta": 10000.0}  # the class asks for one, and does not use it


def _readers(checkpoint: Checkpoint, layers: int) -> list[int]:
    """Which layers read a shared transformer. Raises CheckpointError."""
    kinds = checkpoint.config.get("layers_block_type") or checkpoint.config.get("layer_types")
    if kinds is None and layers == _DEFAULTS["num_hidden_layers"]:
        return list(_READERS)
    if not isinstance(kinds, list) or len(kinds) != layers or not {*kinds} <= {"mamba", _MAMBA, _HYBRID}:
        raise CheckpointError(f"{checkpoint.path}: layers_block_type is {kinds!r}, of {layers} layers")
    return [i for i, kind in enumerate(kinds) if kind == _HYBRID]


def _mamba2(checkpoint: Checkpoint, c: dict[str, Any]) -> dict[str, Any]:
    inner, heads = int(c["mamba_expand"] * c["hidden_size"]), c["n_mamba_heads"]
    if inner % heads:
        raise CheckpointError(f"{checkpoint.path}: n_mamba_heads is {heads}, of an inner width of {inner}")
    return mamba2_options(
        heads, inner // heads, c["mamba_d_state"], c["mamba_ngroups"], conv=c["mamba_d_conv"], conv_bias=True,
        bias=False, eps=_GATE_EPS, floor=c["time_step_min"],
    )  # fmt: skip


def _memory(checkpoint: Checkpoint, c: dict[str, Any]) -> dict[str, Any]:
    """The options that all uses of a shared transformer have in common."""
    heads, width = c["num_attention_heads"], 2 * c["hidden_size"]
    keys = c.get("num_key_value_heads") or heads
    if width % heads:
        raise CheckpointError(f"{checkpoint.path}: num_attention_heads is {heads}, of an inner width of {width}")
    if keys != heads and c["use_shared_attention_adapter"]:
        raise CheckpointError(f"{checkpoint.path}: num_key_value_heads is {keys}, where maps for {heads} are added")
    size = width // heads
    rope = {**c, "partial_rotary_factor": 1.0}
    return {
        "attention": {
            "num_heads": heads,
            "num_kv_heads": keys,
            "head_dim": size,
            "scale": (size / 2) ** -0.5,
            "rotary": read_rope(rope, size) if c["use_mem_rope"] else None,
        },
        "ffn": {"hidden_size": c.get("intermediate_size") or 4 * c["hidden_size"], "activation": c["hidden_act"]},
        "rank": c["adapter_rank"],
        "adapt_attention": c["use_shared_attention_adapter"],
    }


def _holds(layer: LayerSpec) -> bool:
    return layer.memory is not None and layer.memory.same_as is None


def _one_memory(layers: list[LayerSpec]) -> MemoryOptions:
    """The memory of the layers that have one. Raises ExportError where there is none or a layer has something else."""
    for i, layer in enumerate(layers):
        if layer.ffn is not None or layer.mixer != layers[0].mixer:
            raise ExportError(f"layers.{i}: its layers are alike, with Mamba-2 and without a channel mixer")
    found = next((layer.memory for layer in layers if layer.memory is not None), None)
    if found is None:
        raise ExportError("no layer has a memory block; without one it is Mamba-2")
    if found.rank is None:
        raise ExportError("memory.rank is None; its uses have maps of low rank")
    return found


def _use(theirs: str, ours: str, memory: MemoryOptions, use: int) -> Iterator[Entry]:
    """The maps of low rank that use number `use` adds to its transformer's."""
    lists = {"feed_forward.gate_up_proj_adapter_list": "ffn"}
    if memory.adapt_attention:
        lists |= {f"self_attn.linear_{n}_adapter_list": n for n in "qkv"}
    for name, mine in lists.items():
        yield from pairs(f"{theirs}{name}.{use}.", f"{ours}{mine}.", {"0": "down", "1": "up"})


def _shared(theirs: str, ours: str, memory: MemoryOptions) -> Iterator[Entry]:
    """A shared transformer."""
    yield from pairs(theirs, ours, {"input_layernorm": "norm", "pre_ff_layernorm": "ffn_norm"})
    yield from pairs(f"{theirs}self_attn.", f"{ours}attention.", {f"{n}_proj": f"{n}_proj" for n in "qkvo"})
    gate_and_up = [f"{ours}ffn.{n}_proj.weight" for n in ("gate", "up")]
    yield split(f"{theirs}feed_forward.gate_up_proj.weight", gate_and_up, [memory.ffn.hidden_size] * 2)
    yield same(f"{theirs}feed_forward.down_proj.weight", f"{ours}ffn.down_proj.weight")
