"""Markdown that cannot be broken by what is put into it: words of others, tables, blocks of code, front matter.

Names of files, configs, tokenizers and recipes end up in cards. In a card they are words and nothing else: no HTML, no
link, no picture, no formula, no front matter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

LONGEST = 1000
# Words that mean nothing to any dialect of Markdown. Addresses and e-mail become links by themselves, also where their
# punctuation is escaped; what is not plain goes into a code span, in which nothing becomes anything.
_PLAIN = re.compile(r"–|-?[\w(\"'±][\w .,;:()'\"/+\-=%?±–]*")  # noqa: RUF001
_ACTIVE = re.compile(r"://|www\.|\b_|_\b", re.IGNORECASE)
# Formulas are rendered before Markdown is read, and some readers take HTML wherever it stands.
_LOOK_ALIKES = str.maketrans({"<": "‹", ">": "›", "$": "＄", "\\": "⧵"})  # noqa: RUF001


def one_line(value: Any) -> str:
    """Text as one line of visible characters, without angle brackets, dollars and backslashes, of bounded length."""
    line = " ".join(_visible(str(value)[: 4 * LONGEST]).translate(_LOOK_ALIKES).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def inline(value: Any) -> str:
    """Text for the middle of a line: as it is where it is plain words, else as a code span."""
    text = one_line(value)
    return text if not text or (_PLAIN.fullmatch(text) and not _ACTIVE.search(text)) else code(text)


def code(value: Any) -> str:
    """A code span: nothing in it is read as Markdown."""
    text = one_line(value)
    fence = _longer_than_any(text, "`", 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def code_block(lines: Sequence[str], language: str = "") -> str:
    """Lines of code between fences that nothing in them closes; each stays one line."""
    shown = [_visible(line) for line in lines]
    fence = _longer_than_any("\n".join(shown), "`", 3)
    return "\n".join([fence + language, *shown, fence])


def _visible(text: str) -> str:
    spaced = (" " if c.isspace() else c for c in text)
    return "".join(c for c in spaced if c == " " or unicodedata.category(c)[0] not in "CZ")


def _longer_than_any(text: str, character: str, least: int) -> str:
    longest = max((len(run) for run in re.findall(f"{re.escape(character)}+", text)), default=0)
    return character * max(least, longest + 1)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; the first column to the left, numbers to the right."""
    cells = [[inline(cell).replace("|", "\\|") for cell in line] for line in (header, *lines)]
    cells.insert(1, ["---", *(["---:"] * (len(header) - 1))])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def front_matter(values: Mapping[str, Any]) -> str:
    """YAML between lines of dashes, without the keys whose value is None or empty."""
    kept = {key: value for key, value in values.items() if value not in (None, [], "")}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)}---"
