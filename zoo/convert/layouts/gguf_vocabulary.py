"""The vocabulary in a GGUF file: byte-level BPE, as GPT-2's and its successors', SentencePiece's BPE, as Llama 2's and
Mixtral's, BERT's WordPiece, or none.

llama.cpp splits text by a rule that a file names (`tokenizer.ggml.pre`). A tokenizer that splits in another way than
those below would be run with other tokens than it was trained with, so it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from zoo.errors import ExportError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}": "qwen2", _WORDS % r"\p{N}{1,3}": "llama-bpe"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # of gguf.TokenType


def add_vocabulary(writer: Any, size: int, tokenizer: Any) -> None:
    """Write the vocabulary of `size` tokens; none where there is no tokenizer. Raises ExportError for other kinds."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = described["model"]["type"]
    if kind == "WordPiece":
        _add_wordpiece(writer, size, tokenizer, described)
    elif kind == "BPE" and "ByteLevel" in json.dumps(described["pre_tokenizer"]):
        _add_bpe(writer, size, tokenizer, described)
    elif kind == "BPE" and described["model"]["byte_fallback"]:
        _add_sentencepiece(writer, size, tokenizer, described)
    else:
        known = "BPE of bytes, BPE of SentencePiece and WordPiece"
        raise ExportError(f"tokenizer: a {kind} vocabulary; {known} can be written as GGUF here")


def _add_bpe(writer: Any, size: int, tokenizer: Any, described: dict[str, Any]) -> None:
    rule = splitting(described["pre_tokenizer"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    _add_tokens(writer, size, described, lambda token: token)
    merges = [" ".join(m) if isinstance(m, list) else m for m in described["model"]["merges"]]
    writer.add_token_merges(merges or ["a b"])  # an empty array has no type in the format
    _add_special(writer, tokenizer)


def _add_sentencepiece(writer: Any, size: int, tokenizer: Any, described: dict[str, Any]) -> None:
    """llama.cpp joins the two neighbours whose token has the best score: here, is made by the earliest merge."""
    vocabulary = described["model"]["vocab"]
    merges = [tuple(m if isinstance(m, list) else m.split(" ")) for m in described["model"]["merges"]]
    known, scores = set(merges), dict.fromkeys(range(size), 0.0)
    for rank, (left, right) in reversed(list(enumerate(merges))):
        token = left + right
        scores[vocabulary[token]] = -1.0 - rank
        for at in range(1, len(token)):
            pair = token[:at], token[at:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                raise ExportError(f"tokenizer: {pair[0]!r} and {pair[1]!r} make a token and are not merged")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    kinds = {i: _BYTE for token, i in vocabulary.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", token)}
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = _UNKNOWN
        writer.add_unk_token_id(tokenizer.unk_token_id)
    _add_tokens(writer, size, described, lambda token: token, kinds)
    writer.add_token_scores([scores[i] for i in range(size)])
    writer.add_add_space_prefix(tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0] != "a")
    _add_special(writer, tokenizer)


def _add_special(writer: Any, tokenizer: Any) -> None:
    for name in ("bos", "eos", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    start = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(bool(start) and start[0] == tokenizer.bos_token_id)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_wordpiece(writer: Any, size: int, tokenizer: Any, described: dict[str, Any]) -> None:
    """As in BERT: what begins a word is marked there, and what continues one here."""
    normalizer = described["normalizer"] or {}
    if (normalizer.get("type"), normalizer.get("lowercase")) != ("BertNormalizer", True):
        raise ExportError("tokenizer: a WordPiece vocabulary with capitals, and llama.cpp always reads small letters")
    prefix = described["model"]["continuing_subword_prefix"]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    marked = lambda token: token.removeprefix(prefix) if token.startswith(prefix) else f"\u2581{token}"  # noqa: E731
    _add_tokens(writer, size, described, marked)
    for theirs, ours in {"bos": "cls", "sep": "sep", "pad": "pad", "unk": "unk", "mask": "mask"}.items():
        if (i := getattr(tokenizer, f"{ours}_token_id")) is not None:
            getattr(writer, f"add_{theirs}_token_id")(i)


def _add_tokens(
    writer: Any, size: int, described: dict[str, Any], marked: Callable[[str], str], more: dict[int, int] | None = None
) -> None:
    """Tokens and their kinds, of some of which `more` says it; `marked` is not for those that were added."""
    tokens = {i: marked(token) for token, i in described["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    tokens |= {i: entry["content"] for i, entry in added.items()}
    if tokens and max(tokens) >= size:
        raise ExportError(f"tokenizer: token {max(tokens)} is beyond the model's vocabulary of {size}")
    kinds = [_UNUSED if i not in tokens else _NORMAL for i in range(size)]
    for i, entry in added.items():
        kinds[i] = _CONTROL if entry["special"] else _USER_DEFINED
    for i, kind in (more or {}).items():
        kinds[i] = kind
    writer.add_token_list([tokens.get(i, f"[unused{i}]") for i in range(size)])
    writer.add_token_types(kinds)


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
