"""The cards in model_cards/ are what the code writes from the JSON beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zoo.train.card import card_text, eval_results, read_score
from zoo.train.card_facts import CardFile

CARDS = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/score.json"))


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_committed_card_is_what_the_code_writes(folder):
    score, facts = read_score(folder), CardFile.load(folder).facts()
    text = card_text(folder, score, facts)
    assert (folder / "README.md").read_text(encoding="utf-8") == text, f"run: zoo card model_cards/{folder.name}"
    assert eval_results(score, facts) is None
    assert facts.commit is None or re.fullmatch("[0-9a-f]{40}", facts.commit), (
        "trained from files that differ from a commit"
    )


def test_every_folder_of_a_card_has_its_score():
    folders = {path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/README.md")}
    assert folders == set(CARDS)
