"""The recipes for sentence encoders on a random tiny BERT, from its folder to a scored student."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from tiny_runs import TOKENIZER, make_texts

import zoo
from zoo.train.api import train_recipe
from zoo.train.recipe import list_recipes, load_recipe
from zoo.train.score import score

RECIPES = [name for name in list_recipes() if name.startswith("minilm-")]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    hf.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_the_four_mixers_have_a_recipe():
    assert RECIPES == ["minilm-linear-attention", "minilm-linformer", "minilm-longformer", "minilm-performer"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_its_student_comes_closer(bert, tmp_path, name):
    data, out = tmp_path / "text.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(200)))
    small = [f"stages.{i}.{key}" for i in range(2) for key in ("budget={tokens: 4000}", "batch_size=4")]
    small += ["mixer_options.window=4"] if "longformer" in name else []  # so that there is something to learn
    recipe = load_recipe(name, [f"teacher={bert}", f"data={data}", f"out={out}", *small])
    result = train_recipe(recipe, progress=False)
    assert {stage["kind"] for stage in result.stages} == {"align", "distill"}
    assert {recipe.mixer} == set(result.model.config.mixer_names)
    measured = score(str(out), teacher=bert, untrained=str(out / "initial"), data=str(data), tokens=2000, length=64)
    rows = [measured.row(role) for role in ("untrained", "student")]
    assert rows[0]["cosine"] < rows[1]["cosine"] < 1
    again = zoo.create_model(str(out)).eval()
    ids_BL, mask_BL = torch.randint(1, 255, (2, 20)), torch.ones(2, 20)
    with torch.no_grad():
        expected = result.model(ids_BL, attention_mask=mask_BL).pooler_output
        torch.testing.assert_close(again(ids_BL, attention_mask=mask_BL).pooler_output, expected)
