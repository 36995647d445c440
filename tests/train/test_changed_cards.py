"""A card, and the JSON that it is made of, changed at random: written, or refused with one line; never passed off."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_runs import make_student, make_teacher

from zoo.errors import CheckpointError, ZooError
from zoo.text import byte_tokenizer
from zoo.train.card import card, card_text, eval_results, read_score, verify_card
from zoo.train.card_facts import CardFile, found_facts
from zoo.train.score import score

QUICKLY = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
VALUES = st.sampled_from(
    [
        None, True, -1, 0, 1, 2**80, 1e308, float("nan"), float("inf"), "", "x", "<b>", "[x](y)", "---\n", "a" * 3000,
        [], [1], ["x"], {}, {"8": 1.0}, {"a": "b"}, [[]], "hf:org/data", "org/name", "hf:<b>",
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A scored student with its card and what a run leaves."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    teacher = make_teacher()
    student = make_student(teacher)
    student.save_pretrained(folder)
    rows_NL = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    options = {"tokenizer": byte_tokenizer(), "speed": False, "lengths": (8,), "examples": 1, "scales": (1,)}
    score(student, teacher=teacher, data=rows_NL, out=folder, command="zoo score tiny", **options)
    stages = [{"kind": "align", "tokens": 5, "cpu_seconds": 1.5, "first_loss": None}]
    run = {"stages": stages, "seed": 1, "data": "text.jsonl", "versions": {"zoo": "1", "commit": "abc"}}
    (folder / "train.json").write_text(json.dumps(run))
    card(folder, license="mit", repo="me/tiny", tags=["a"], limits=["It is tiny."], datasets=["org/data"])
    verify_card(folder)
    return folder


def paths(value, at=()):
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from paths(value[key], (*at, key))


@settings(max_examples=120, **QUICKLY)
@given(
    data=st.data(), name=st.sampled_from(["score.json", "score.json", "card.json", "train.json", "config.json"]),
    value=VALUES, how=st.sampled_from(["set", "set", "remove", "key"]),
)  # fmt: skip
def test_changed_json_gives_a_card_or_one_line(folder, data, name, value, how):
    whole = (folder / name).read_text()
    values = json.loads(whole)
    *before, last = data.draw(st.sampled_from(list(paths(values))))
    place = values
    for key in before:
        place = place[key]
    if how == "set":
        place[last] = value
    elif how == "remove" or isinstance(place, list):
        del place[last]
    else:
        place[data.draw(st.sampled_from(["<b>", "x|y", "", "[x](y)"]))] = place.pop(last)
    (folder / name).write_text(json.dumps(values))
    try:
        said = refusal(folder)
        assert said is None or ("\n" not in said and 0 < len(said) < 700), said
    finally:
        (folder / name).write_text(whole)


def refusal(folder):
    """What a card of this folder is refused with; None where it is written, and then the old one is of no use."""
    try:
        found, facts = read_score(folder), CardFile.load(folder).facts()
        text = card_text(folder, found, facts)
        card_text(folder, found, found_facts(folder).updated(facts.known()))
        eval_results(found, facts)
    except ZooError as error:
        return str(error)
    assert "<" not in text
    if text != (folder / "README.md").read_text():
        with pytest.raises(ZooError):
            verify_card(folder)
    return None


@settings(max_examples=25, **QUICKLY)
@given(data=st.data(), put=st.text(max_size=12))
@example(data=None, put="\n<script>alert(1)</script>\n")
def test_a_changed_card_is_refused(folder, data, put):
    path = folder / "README.md"
    whole = path.read_text()
    start = len(whole) if data is None else data.draw(st.integers(0, len(whole)))
    end = start if data is None else min(len(whole), start + data.draw(st.integers(0, 40)))
    changed = whole[:start] + put + whole[end:]
    try:
        path.write_bytes(changed.encode())
        if changed != whole:
            with pytest.raises(CheckpointError, match=r"README.md:\d+: is not what was measured"):
                verify_card(folder)
        path.write_bytes(whole.encode()[:start] + b"\xff\xfe" + whole.encode()[start:])
        with pytest.raises(ZooError):
            verify_card(folder)
    finally:
        path.write_text(whole)
