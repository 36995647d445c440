"""GGUF files, by the package `gguf`: reading their tensors and keys, and writing them with a vocabulary.

Keys and names are those of llama.cpp (gguf-py/gguf/constants.py). Quantised tensors are read as float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.convert.layouts.files import Checkpoint, TensorFile
from zoo.convert.layouts.gguf_vocabulary import add_vocabulary
from zoo.errors import CheckpointError, ExportError

MAGIC = b"GGUF"
ROPE_FACTORS = "rope_freqs.weight"  # a tensor that says what a key could: it is among the keys here too
# Beside vectors and norms, what is float32 in every file, as in llama.cpp's own (conversion/base.py).
_FLOAT32 = re.compile(
    r"(ssm_a|ssm_d|_norm\.weight|(position_embd|token_types|ssm_conv1d|ffn_gate_inp(_shexp)?)\.weight"
    r"|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)\.weight)$"
)
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # general.file_type: what most tensors are


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError("GGUF files need the package gguf: pip install 'zoo[gguf]'") from None
    return gguf


class GGUFFile(TensorFile):
    """The tensors of a file. Raises CheckpointError where it is not a whole GGUF file."""

    def __init__(self, path: Path) -> None:
        try:
            self.reader = _gguf().GGUFReader(path)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged header leads the reader into
            raise CheckpointError(f"{path}: not a whole GGUF file: {str(error).splitlines()[0]}") from None
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self.tensors.items()}

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        gguf, tensor = _gguf(), self.tensors[name]
        if tensor.tensor_type.name in ("F32", "F16"):
            return torch.from_numpy(np.array(tensor.data)).reshape(self.shapes[name])
        numbers = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
        stored = torch.bfloat16 if tensor.tensor_type.name == "BF16" else torch.float32
        return numbers.reshape(self.shapes[name]).to(stored)

    def keys(self) -> dict[str, Any]:
        """What the file says beside its tensors, without its vocabulary."""
        fields = self.reader.fields.items()
        return {key: field.contents() for key, field in fields if not key.startswith(("GGUF.", "tokenizer.ggml.token"))}


def open_gguf(path: Path) -> Checkpoint | None:
    """A GGUF file as a checkpoint whose config is its keys; None where it is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            return None
    opened = GGUFFile(path)
    found = Checkpoint.of_file(path, GGUFFile, metadata={"format": "gguf"})
    found.config = {key: value for key, value in opened.keys().items() if key != "tokenizer.ggml.merges"}
    if found.config.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{path}: is one of {found.config['split.count']} parts; join them: llama-gguf-split --merge"
        )
    if ROPE_FACTORS in opened.shapes:
        found.config[f"{found.config.get('general.architecture')}.{ROPE_FACTORS}"] = opened.get(ROPE_FACTORS).tolist()
        del found.shapes[ROPE_FACTORS]
    return found


def write_gguf(
    path: Path, keys: dict[str, Any], tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, tokenizer: Any
) -> None:
    """A file of float tensors. Vectors and convolutions are float32, as llama.cpp needs them."""
    gguf = _gguf()
    if dtype not in _FILE_TYPES:
        raise ExportError(f"dtype: {dtype}, where GGUF has float32, float16 and bfloat16 here")
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    writer.add_file_type(_FILE_TYPES[dtype])
    for key, value in keys.items():
        if key != "general.architecture" and not key.endswith(ROPE_FACTORS):
            _add(writer, key, value)
    add_vocabulary(writer, keys[f"{keys['general.architecture']}.vocab_size"], tokenizer)
    for name, tensor in tensors:
        small = tensor.dim() < 2 or _FLOAT32.search(name) is not None
        numbers = (tensor.float() if small or tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
        if not small and tensor.dtype == torch.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)
