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


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_hub_reads_a_committed_card(folder):
    """By huggingface_hub's own parser, without loss; each result in it is a number of the score."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import metadata_load

    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "zoo"
    assert card.data.to_dict() == metadata_load(folder / "README.md")  # nothing is lost in reading and writing
    rows = read_score(folder)["rows"]
    student = next(row for row in rows if row["role"] == "student")
    assert card.data.eval_results
    for result in card.data.eval_results:
        assert result.task_type == card.data.pipeline_tag
        assert any(value == pytest.approx(result.metric_value, abs=1e-6) for value in _numbers(student))


def _numbers(row):
    return [v for v in row.values() if isinstance(v, int | float) and not isinstance(v, bool)]


def test_every_folder_of_a_card_has_its_score():
    folders = {path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/README.md")}
    assert folders == set(CARDS)
