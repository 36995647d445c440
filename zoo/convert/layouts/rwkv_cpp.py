"""Reading RWKV-4 from the files of rwkv.cpp (https://github.com/RWKV/rwkv.cpp, docs/FILE_FORMAT.md).

A header of six little-endian int32 (magic, version 100 or 101, vocabulary, width, layers, type), then parameters until
the end of the file: int32 number of dimensions, length of the name, type (0 float32, 1 float16); the dimensions, the
fastest first; the name; the numbers. Names are those of the authors' checkpoints; `time_decay` holds -exp of theirs.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.errors import CheckpointError
from zoo.models.heads import ZooForCausalLM

MAGIC, VERSIONS = 0x67676D66, (100, 101)
_TYPES = {0: torch.float32, 1: torch.float16}
_MOST = {"vocabulary": 1 << 22, "width": 1 << 17, "layers": 1024}  # as in `ModelSpec`
_PARTS = {
    "ln1.weight": "mixer_norm.weight",
    "ln1.bias": "mixer_norm.bias",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
    "att.time_mix_k": "mixer.shift_k",
    "att.time_mix_v": "mixer.shift_v",
    "att.time_mix_r": "mixer.shift_r",
    "att.time_decay": "mixer.log_rate",
    "att.time_first": "mixer.bonus",
    "att.key.weight": "mixer.k_proj.weight",
    "att.value.weight": "mixer.v_proj.weight",
    "att.receptance.weight": "mixer.r_proj.weight",
    "att.output.weight": "mixer.o_proj.weight",
    "ffn.time_mix_k": "ffn.shift_k",
    "ffn.time_mix_r": "ffn.shift_r",
    "ffn.key.weight": "ffn.key.weight",
    "ffn.value.weight": "ffn.value.weight",
    "ffn.receptance.weight": "ffn.receptance.weight",
}
_WHOLE = {
    "emb.weight": "model.embed_tokens.weight",
    "blocks.0.ln0.weight": "model.embed_norm.weight",
    "blocks.0.ln0.bias": "model.embed_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}


class Header(NamedTuple):
    """What the file says before its parameters."""

    vocabulary: int
    width: int
    layers: int


def read_rwkv_cpp(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """The header and all parameters, float32, by the names in the file.

    Raises CheckpointError, with the path, for anything that is not a whole float32 or float16 file of this format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    (magic, version, *sizes, _), at = _ints(path, data, 0, 6), 24
    if magic != MAGIC or version not in VERSIONS:
        raise CheckpointError(f"{path}: not a file of rwkv.cpp (magic {magic:#x}, version {version})")
    header = Header(*sizes)
    for name, most in _MOST.items():
        if not 1 <= getattr(header, name) <= most:
            raise CheckpointError(f"{path}: {name} is {getattr(header, name)}, expected 1 to {most}")
    tensors: dict[str, Tensor] = {}
    while at < len(data):
        (dims, length, kind), at = _ints(path, data, at, 3), at + 12
        if not (1 <= dims <= 3 and 1 <= length <= 256):
            raise CheckpointError(f"{path}: at byte {at} stands no parameter ({dims} dimensions, a name of {length})")
        shape, at = _ints(path, data, at, dims)[::-1], at + 4 * dims
        name, at = data[at : at + length].decode("utf-8", "replace"), at + length
        if kind not in _TYPES:
            raise CheckpointError(f"{path}: {name} is quantised (type {kind}); only float32 and float16 can be read")
        size = math.prod(shape) * _TYPES[kind].itemsize
        if min(shape) < 1 or at + size > len(data) or name in tensors:
            why = "is there twice" if name in tensors else f"of shape {tuple(shape)} goes beyond the end of the file"
            raise CheckpointError(f"{path}: {name} {why}")
        numbers = torch.frombuffer(bytearray(data[at : at + size]), dtype=_TYPES[kind])
        tensors[name], at = numbers.float().view(*shape), at + size
    return header, tensors


def _ints(path: str | Path, data: bytes, at: int, count: int) -> tuple[int, ...]:
    if at + 4 * count > len(data):
        raise CheckpointError(f"{path}: ends in the middle (at byte {len(data)})")
    return struct.unpack_from(f"<{count}i", data, at)


def load_rwkv_cpp(path: str | Path) -> ZooForCausalLM:
    """The RWKV-4 model in a file of rwkv.cpp, in float32 and eval mode.

    Raises CheckpointError for a file that cannot be read, and for one of another version of RWKV.
    """
    header, tensors = read_rwkv_cpp(path)
    newer = [name for name in tensors if name.endswith(("att.ln_x.weight", "att.time_maa_x", "att.k_k"))]
    if newer:
        raise CheckpointError(f"{path}: {newer[0]} shows a version of RWKV above 4; only version 4 can be read")
    state = {}
    for i in range(header.layers):
        for theirs, ours in _PARTS.items():
            state[f"model.layers.{i}.{ours}"] = _take(path, tensors, f"blocks.{i}.{theirs}")
    state |= {ours: _take(path, tensors, theirs) for theirs, ours in _WHOLE.items()}
    if tensors:
        raise CheckpointError(f"{path}: {min(tensors)} has no place in an RWKV-4 of {header.layers} layers")
    mixer = {"name": "rwkv4", "inner_dim": len(state["model.layers.0.mixer.bonus"])}
    ffn = {"name": "rwkv_channel_mix", "version": 4, "hidden_size": len(state["model.layers.0.ffn.key.weight"])}
    config = ZooConfig(
        vocab_size=header.vocabulary,
        hidden_size=header.width,
        norm="layer_norm",
        embedding_norm=True,
        tie_word_embeddings=False,
        layers=[{"mixer": mixer, "ffn": ffn} for _ in range(header.layers)],
        origin={"layout": "rwkv_cpp"},
    )
    model = ZooForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(parameter.shape)}"
            raise CheckpointError(f"{path}: {name} is {shapes}")
    model.load_state_dict(state)
    return model.eval()


def _take(path: str | Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{path}: {name} is missing")
    tensor = tensors.pop(name)
    if ".time_mix_" in name:
        return 1 - tensor.flatten()  # ours is the share of the token before
    if name.endswith(".time_decay"):
        return (-tensor).log().flatten()
    return tensor
