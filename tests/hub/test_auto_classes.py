"""Models of the Hub by transformers' own classes: with the package installed no code of the repository is needed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo.models.heads import ZooForCausalLM

NAME = "alice/retnet"


@pytest.fixture
def there(hub, saved, monkeypatch):
    """A model in shards, on the Hub to which transformers goes."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", hub.alice["token"])
    hub.pushed = zoo.push(saved, NAME, max_shard_size="100KB", **hub.alice)
    assert len([n for n in hub.pushed.files if n.endswith(".safetensors")]) > 1
    return hub


def test_by_auto_classes(there, saved, logits):
    expected = logits(zoo.create_model(str(saved)))
    for cls in (AutoModelForCausalLM, ZooForCausalLM):
        assert torch.equal(logits(cls.from_pretrained(NAME)), expected)
        assert torch.equal(logits(cls.from_pretrained(NAME, revision=there.pushed.commit)), expected)
    assert AutoConfig.from_pretrained(NAME, revision="v1").model_type == "zoo"
    assert AutoModel.from_pretrained(NAME)(torch.arange(4)[None]).last_hidden_state.shape == (1, 4, 64)
    assert AutoTokenizer.from_pretrained(NAME)("abc") == AutoTokenizer.from_pretrained(saved)("abc")
    assert there.count("GET", r"\.py") == 0


def test_there_and_back_by_the_classes(there, logits):
    model = AutoModelForCausalLM.from_pretrained(NAME)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.push_to_hub("retnet-2", max_shard_size="100KB", commit_message="twice")  # a name alone, as in transformers
    assert there.repos["alice/retnet-2"].private
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("alice/retnet-2")), logits(model))


def test_offline_from_the_cache_that_transformers_filled(there, saved, logits, monkeypatch):
    AutoModelForCausalLM.from_pretrained(NAME)
    AutoTokenizer.from_pretrained(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there.requests.clear()
    model = zoo.create_model(f"hf-hub:{NAME}")
    assert torch.equal(logits(model), logits(zoo.create_model(str(saved))))
    assert model.config.origin["hub"]["revision"] == there.pushed.commit
    assert there.requests == []
