"""A card beside the weights it was measured on, or no push."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from zoo.errors import CheckpointError, HubError

MARK = re.compile(r"SHA-256 is `([0-9a-f]{64})`")


def check_card(files: Mapping[str, Path], digest: str) -> None:
    """Raise unless the numbers that would be published are those of the weights that would be.

    Args:
        files: path in the repository -> file here, of everything that goes. digest: the hash of its weights.

    Raises:
        CheckpointError: a score, a card or results of other weights, or of unknown ones. A card without numbers,
        written by hand, may go.
    """
    again = "measure again with `zoo score` and write the card with `zoo card`"
    found: dict[Path, str | None] = {}
    if score := files.get("score.json"):
        found[score] = _scored(score)
    for name, file in files.items():
        if name.startswith(".eval_results/") and score is None:
            raise CheckpointError(f"{file}: no score.json says which weights these results belong to; {again}")
    if card := files.get("README.md"):
        text = card.read_text(encoding="utf-8")
        if score is None and _numbers_of_its_own(text):
            raise CheckpointError(
                f"{card}: no score.json says which weights its results (model-index) belong to; {again}"
            )
        if marked := MARK.search(text):
            found[card] = marked[1]
    for file, measured in found.items():
        if measured is None:
            raise CheckpointError(f"{file}: does not say which weights it was measured on; {again}")
        if measured != digest:
            raise CheckpointError(
                f"{file}: was measured on other weights (sha256 {measured[:12]}..., here {digest[:12]}...); {again}"
            )


def _scored(score: Path) -> str | None:
    """The hash of the weights that a score was measured on."""
    try:
        rows = json.loads(score.read_text(encoding="utf-8"))["rows"]
        return next((str(row["weights_sha256"]) for row in rows if row.get("role") == "student"), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def check_old_card(text: str, digest: str, repo: str) -> None:
    """Raise HubError where a card that stays in a repository has the numbers of other weights."""
    marked = MARK.search(text)
    if marked is not None and marked[1] != digest:
        raise HubError(
            f"{repo}: its card has the numbers of the weights before (sha256 {marked[1][:12]}...), and no new card is "
            "given; measure with `zoo score` and write one with `zoo card`"
        )


def _numbers_of_its_own(card: str) -> bool:
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        values = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"README.md: its front matter is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    return isinstance(values, dict) and "model-index" in values
