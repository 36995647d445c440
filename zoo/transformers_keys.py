"""The keys that transformers itself puts into a config.json, with their types; whatever else is there somebody added.

transformers reads most of them without looking. A word where it expects a number would stop it somewhere in the middle,
and a number of labels with twenty digits would fill the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator

from zoo.options import Options

Text = Annotated[str, Field(max_length=4096)]
Token = Annotated[int, Field(ge=-1, lt=1 << 31)]
# Any other name would be that of a repository whose kernels transformers fetches and runs.
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"]
Number = int | Annotated[str, Field(pattern=r"^\d{1,9}$")]


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def present(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Those of `keys` to which a config gives a value that is not None."""
    return {key: config[key] for key in keys if config.get(key) is not None}


class TransformersKeys(Options):
    """What may stand beside the fields of `ModelSpec`; checked, and given to transformers as it was."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    architectures: list[Text] | None = None
    attn_implementation: Attention | None = None
    auto_map: dict[Text, Text | list[Text | None]] | None = None
    bos_token_id: Token | None = None
    chunk_size_feed_forward: int = Field(0, ge=0, le=1 << 27)
    cls_token_id: Token | None = None
    dtype: Any = None
    eos_token_id: Token | list[Token] | None = None
    id2label: Annotated[dict[Number, Text], Field(max_length=1 << 20)] | None = None
    is_encoder_decoder: Literal[False] = False
    label2id: Annotated[dict[Text, Number], Field(max_length=1 << 20)] | None = None
    mask_token_id: Token | None = None
    model_type: Text = "zoo"
    name_or_path: Text | Path | None = None
    num_labels: int = Field(2, ge=1, le=1 << 20)
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    pad_token_id: Token | None = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    return_dict: bool | None = None
    sep_token_id: Token | None = None
    tokenizer_class: Text | None = None
    torch_dtype: Any = None
    transformers_version: Text | None = None
    use_cache: bool | None = None
    own_attn_implementation: Attention | None = Field(None, alias="_attn_implementation")
    own_commit_hash: Text | None = Field(None, alias="_commit_hash")
    own_name_or_path: Text | Path | None = Field(None, alias="_name_or_path")

    @field_validator("dtype", "torch_dtype")
    @classmethod
    def _type(cls, value: Any) -> Any:
        found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
        if value is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"expected a type of floating numbers such as 'float32' or 'bfloat16', got {value!r:.80}")
        return value


NAMES = frozenset(field.alias or name for name, field in TransformersKeys.model_fields.items())
