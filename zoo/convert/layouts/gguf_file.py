"""GGUF files, by the package `gguf`: reading their tensors and keys, and writing them with a vocabulary.

Keys and names are those of llama.cpp (gguf-py/gguf/constants.py). Quantised tensors are read as float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.convert.layouts.files import Checkpoint, TensorFile
from zoo.errors import CheckpointError, ExportError

MAGIC = b"GGUF"
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
        if key != "general.architecture":
            _add(writer, key, value)
    _add_vocabulary(writer, keys, tokenizer)
    for name, tensor in tensors:
        small = tensor.dim() < 2 or "ssm_conv1d" in name or name.endswith((".ssm_a", ".ssm_d", "_norm.weight"))
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
    else:
        writer.add_string(key, value)


def _add_vocabulary(writer: Any, keys: dict[str, Any], tokenizer: Any) -> None:
    """A byte-level BPE, as GPT-2's and its successors'; no vocabulary where there is no tokenizer."""
    size = keys[f"{keys['general.architecture']}.vocab_size"]
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model, text = described["model"], json.dumps(described["pre_tokenizer"])
    if model["type"] != "BPE" or "ByteLevel" not in text:
        raise ExportError(f"tokenizer: a {model['type']} vocabulary; only byte-level BPE can be written as GGUF here")
    tokens = {i: token for token, i in model["vocab"].items()}
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    tokens |= {i: entry["content"] for i, entry in added.items()}
    kinds = [
        3 if i in added and added[i]["special"] else 4 if i in added else 1 if i in tokens else 5 for i in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if '"use_regex": true' in text else "default")
    writer.add_token_list([tokens.get(i, f"[unused{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    writer.add_token_merges(merges or ["a b"])  # an empty array has no type in the format
    for name in ("bos", "eos", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(False)
