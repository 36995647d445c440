"""GGUF, the files of llama.cpp: what its families have in common.

    gguf_file.py        the files: reading tensors and keys, writing them
    gguf_vocabulary.py  the vocabulary that a file holds
    gguf_attention.py   Llama, Qwen2, Qwen3, GPT-2, GPT-NeoX
    gguf_moe.py         Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE
    gguf_ssm.py         Mamba, Falcon Mamba, Mamba-2
    gguf_hybrids.py     Bamba, Falcon-H1
    gguf_rwkv.py        RWKV-6, RWKV-7
    gguf_encoders.py    BERT

Names and keys are those of gguf-py (gguf/constants.py), what is done to the numbers is in llama.cpp's conversion/*.py,
and what a model must look like in its src/models/*.cpp: https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, OtherKindError
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.gguf_file import open_gguf, write_gguf
from zoo.convert.layouts.mapping import Entry, same
from zoo.errors import CheckpointError

RMS_EPS, LAYER_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def tidy(number: float) -> float:
    """The shortest decimal that is this number in float32, in which files hold their keys: 1e-5, not 9.99999975e-06."""
    import numpy as np

    return float(str(np.float32(number)))


class GGUF(Family):
    """A family of llama.cpp.

    architecture: its name there. block, norm, positions, embedding_norm: what its models have; see `ModelSpec`.
    """

    layout = "gguf"
    own_format = "a GGUF file"
    architecture: ClassVar[str]
    block: ClassVar[str] = "pre_norm"
    norm: ClassVar[str] = "rms_norm"
    positions: ClassVar[str] = "none"
    embedding_norm: ClassVar[bool] = False

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

    def only(self, checkpoint: Checkpoint, name: str, *values: Any) -> None:
        """Raise CheckpointError where a key has another value than those; the first is that of files without it."""
        found = self.key(checkpoint, name, values[0])
        if (found := tidy(found) if isinstance(found, float) else found) not in values:
            allowed = " or ".join(repr(value) for value in values)
            raise CheckpointError(
                f"{checkpoint.path}: {self.architecture}.{name} is {found!r}; only {allowed} is known"
            )

    @property
    def eps(self) -> str:
        """The key of the norms' epsilon."""
        return RMS_EPS if self.norm == "rms_norm" else LAYER_EPS

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
            "norm": self.norm,
            "norm_eps": tidy(self.key(checkpoint, self.eps)),
            "positions": self.positions,
            "embedding_norm": self.embedding_norm,
            "tie_word_embeddings": "output.weight" not in checkpoint.shapes,
            **{name: int(value) for name, value in found.items() if value is not None},
        }

    def keys(self, config: ZooConfig, **more: Any) -> dict[str, Any]:
        """Their keys that all have, and `more` of the architecture."""
        spec = config.spec
        found = (spec.block, spec.norm, spec.positions, spec.embedding_norm)
        if found != (self.block, self.norm, self.positions, self.embedding_norm):
            raise OtherKindError(f"block, norm or positions are not those of llama.cpp's {self.architecture}")
        common = {
            "context_length": spec.max_position_embeddings,
            "embedding_length": spec.hidden_size,
            "block_count": len(spec.layers),
            "vocab_size": spec.vocab_size,
            self.eps: float(spec.norm_eps),
        }
        told = {f"{self.architecture}.{name.replace('__', '.')}": v for name, v in {**common, **more}.items()}
        return {"general.architecture": self.architecture, **told}

    def outside(self, config: ZooConfig) -> Iterator[Entry]:
        """What is not in a block."""
        parameters = ("weight",) if self.norm == "rms_norm" else ("weight", "bias")
        yield same("token_embd.weight", "model.embed_tokens.weight")
        for parameter in parameters:
            yield same(f"output_norm.{parameter}", f"model.norm.{parameter}")
            if self.embedding_norm:
                yield same(f"token_embd_norm.{parameter}", f"model.embed_norm.{parameter}")
        if not config.tie_word_embeddings:
            yield same("output.weight", "lm_head.weight")

    def write(self, model: Any, folder: Path, config: dict[str, Any], tokenizer: Any = None) -> None:
        from zoo.convert.layouts.loading import their_tensors

        write_gguf(folder / "model.gguf", config, their_tensors(self, model), model.dtype, tokenizer)
