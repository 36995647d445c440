"""The vocabulary in a GGUF file: byte-level BPE, as GPT-2's and its successors', or none.

llama.cpp splits text by a rule that a file names (`tokenizer.ggml.pre`). A tokenizer that splits in another way than
those below would be run with other tokens than it was trained with, so it is refused.
"""

from __future__ import annotations

import json
from typing import Any

from zoo.errors import ExportError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}": "qwen2", _WORDS % r"\p{N}{1,3}": "llama-bpe"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # of gguf.TokenType


def add_vocabulary(writer: Any, size: int, tokenizer: Any) -> None:
    """Write the vocabulary of `size` tokens; none where there is no tokenizer. Raises ExportError for other kinds."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(described["pre_tokenizer"]):
        raise ExportError(f"tokenizer: a {model['type']} vocabulary; only byte-level BPE can be written as GGUF here")
    rule = splitting(described["pre_tokenizer"])
    tokens = {i: token for token, i in model["vocab"].items()}
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    tokens |= {i: entry["content"] for i, entry in added.items()}
    if tokens and max(tokens) >= size:
        raise ExportError(f"tokenizer: token {max(tokens)} is beyond the model's vocabulary of {size}")
    kinds = [_UNUSED if i not in tokens else _NORMAL for i in range(size)]
    for i, entry in added.items():
        kinds[i] = _CONTROL if entry["special"] else _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([tokens.get(i, f"[unused{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    writer.add_token_merges(merges or ["a b"])  # an empty array has no type in the format
    for name in ("bos", "eos", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(False)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def splitting(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text. Raises ExportError for a way that is not known."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    words = last["type"] == "ByteLevel" and last.get("use_regex", True)
    if words and not before:
        return "gpt-2"
    if words and [(s["type"], s.get("individual_digits")) for s in before] == [("Digits", True)]:
        return "smollm"
    patterns = [step["pattern"].get("Regex") if step["type"] == "Split" else None for step in before]
    if not words and len(patterns) == 1 and patterns[0] in _SPLITS:
        return _SPLITS[patterns[0]]
    kinds = ", ".join(step["type"] for step in steps)
    raise ExportError(
        f"tokenizer: pre_tokenizer {kinds} splits text as none of gpt-2, smollm, qwen2, llama-bpe; write it without"
    )
