"""The worked example of docs/adding_a_mixer.md is run as it stands there."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from zoo import registry
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.registry import list_mixers, mixer_class
from zoo.testing import check_mixer

DOCS = Path(__file__).parents[2] / "docs" / "adding_a_mixer.md"


@pytest.fixture
def example(monkeypatch):
    list_mixers()  # loads all, so that the copy is complete
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))
    module = ModuleType("fading_attention")
    monkeypatch.setitem(sys.modules, "fading_attention", module)
    source, check = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    exec(compile(source, "adding_a_mixer.md", "exec"), module.__dict__)
    return check


def test_example_obeys_the_laws(example):
    exec(compile(example, "adding_a_mixer.md", "exec"), {})


def test_example_stands_beside_a_window(example):
    check_mixer("windowed_linear", config={"linear": {"name": "fading_attention"}}, laws=["split", "mask", "packing"])


def test_example_starts_from_attention(example):
    teacher = Attention(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), 16)
    weights = teacher.attention_weights()
    for name, options in (("fading_attention", {}), ("windowed_linear", {"linear": "fading_attention"})):
        cls = mixer_class(name)
        student = cls.from_attention(cls.config_from_attention(weights, **options), weights, None)
        assert student(torch.randn(1, 5, 16))[0].isfinite().all()


def test_broken_example_fails_as_the_page_says(example):
    class Broken(mixer_class("fading_attention")):
        def mix(self, q_BHLK, k_BGLK, v_BGLV, inputs):
            return super().mix(q_BHLK, k_BGLK, v_BGLV, replace(inputs, mask_BL=None))

    with pytest.raises(AssertionError, match=r"mask: fading_attention: left padding, filled with NaN, in row 0"):
        check_mixer(Broken, laws=["mask"], variants=0)
