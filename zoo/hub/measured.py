"""A card beside the weights it was measured on, or no push."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from zoo.errors import CheckpointError, HubError, ZooError

MARK = re.compile(r"SHA-256 is `([0-9a-f]{64})`")


def check_card(files: Mapping[str, Path], digest: str, scratch: Path) -> None:
    """Raise unless the numbers that would be published are those of the weights that would be.

    Args:
        files: path in the repository -> file here, of everything that goes. digest: the hash of its weights.
        scratch: an empty folder, in which the files are put together as they will be.

    Raises:
        CheckpointError, DataError: a score, a card or results of other weights or of unknown ones, or a card that is
        not what `zoo card` writes from the score. A card without numbers, written by hand, may go.
    """
    if score := files.get("score.json"):
        from zoo.train.card import verify_card

        for name, file in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).symlink_to(file.resolve())
        try:
            verify_card(scratch)
        except ZooError as error:
            raise type(error)(str(error).replace(str(scratch), str(score.parent))) from None
        return
    again = "measure with `zoo score` and write the card with `zoo card`"
    for name, file in files.items():
        if name.startswith(".eval_results/"):
            raise CheckpointError(f"{file}: no score.json says which weights these results belong to; {again}")
    if card := files.get("README.md"):
        text = card.read_text(encoding="utf-8")
        if _numbers_of_its_own(text, card):
            raise CheckpointError(
                f"{card}: no score.json says which weights its results (model-index) belong to; {again}"
            )
        marked = MARK.search(text)
        if marked is not None and marked[1] != digest:
            what = f"sha256 {marked[1][:12]}..., here {digest[:12]}..."
            raise CheckpointError(f"{card}: was measured on other weights ({what}); {again}")


def check_old_card(text: str, digest: str, repo: str) -> None:
    """Raise HubError where a card that stays in a repository has the numbers of other weights."""
    marked = MARK.search(text)
    if marked is not None and marked[1] != digest:
        raise HubError(
            f"{repo}: its card has the numbers of the weights before (sha256 {marked[1][:12]}...), and no new card is "
            "given; measure with `zoo score` and write one with `zoo card`"
        )


def _numbers_of_its_own(text: str, card: Path) -> bool:
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        values = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        at, said = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "odd characters"
        line = "" if at is None else f":{at.line + 2}"
        raise CheckpointError(f"{card}{line}: its front matter is not valid YAML: {said}") from None
    return isinstance(values, dict) and "model-index" in values
