"""Files as they were published years ago: other names, no architecture in the config, heads that nobody reads."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from zoo.convert.layouts import guess_layout, import_checkpoint
from zoo.errors import CheckpointError

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 66,
}  # fmt: skip
KEPT = ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "initializer_range")


def original(architecture, **options):
    """A model of transformers with random weights everywhere."""
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def write(folder, state, config):
    torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))


def of_2018(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def largest_difference(folder, expected, ids_BL):
    with torch.no_grad():
        found = import_checkpoint(folder, dtype=torch.float32).model(ids_BL)
        return ((found.logits if "logits" in found else found[0]) - expected).abs().max().item()


def ids():
    return torch.randint(4, 97, (2, 24))


@pytest.mark.parametrize("prefixed", [True, False])
def test_bert_of_2018(tmp_path, prefixed):
    """bert-base-uncased: gamma and beta, a second head, a pooler, a buffer, the bias under one of its names."""
    model = original("BertForPreTraining")
    state = {of_2018(name): tensor for name, tensor in model.state_dict().items()}
    del state["cls.predictions.decoder.bias"]
    state["bert.embeddings.position_ids"] = torch.arange(66)[None]
    if not prefixed:
        state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    write(tmp_path, state, {**model.config.to_dict(), "architectures": ["BertForMaskedLM"]})
    expected = model(ids_BL := ids()).prediction_logits
    assert largest_difference(tmp_path, expected, ids_BL) < 1e-5


def test_tiny_bert(tmp_path):
    """huawei-noah/TinyBERT_General_*: no model type, no architecture, the maps of its distillation."""
    model = original("BertForPreTraining")
    state = dict(model.state_dict())
    state |= {f"fit_denses.{i}.{p}": torch.randn(64, 32) for i in range(3) for p in ("weight", "bias")}
    del state["cls.predictions.decoder.bias"]
    own = {"cell": {}, "emb_size": 32, "structure": [], "pre_trained": "", "training": ""}
    config = {key: getattr(model.config, key) for key in (*SIZES, *KEPT)}
    write(tmp_path, state, {**config, **own})
    assert guess_layout(tmp_path) == ("transformers", "bert")
    expected = model(ids_BL := ids()).prediction_logits
    assert largest_difference(tmp_path, expected, ids_BL) < 1e-5


def test_a_head_for_pretraining_is_read_as_the_masked_lm(tmp_path):
    """google/fnet-base is an FNetForPreTraining, google/mobilebert-uncased a MobileBertForPreTraining."""
    for name in ("FNetForPreTraining", "BigBirdForPreTraining", "MobileBertForPreTraining"):
        small = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
        model = original(name, **(small if "Mobile" in name else {}))
        write(tmp_path, model.state_dict(), {**model.config.to_dict(), "architectures": [name]})
        expected = model(ids_BL := ids()).prediction_logits
        assert largest_difference(tmp_path, expected, ids_BL) < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("architecture", ["LongformerForMaskedLM", "LongformerForSequenceClassification"])
def test_the_class_is_found_by_the_head(tmp_path, architecture):
    """allenai/longformer-base-4096 has no `architectures`."""
    model = original(architecture, attention_window=8, type_vocab_size=1)
    config = {k: v for k, v in model.config.to_dict().items() if k != "architectures"}
    state = {**model.state_dict(), "longformer.embeddings.position_ids": torch.arange(66)[None]}
    write(tmp_path, state, config)
    ids_BL = ids()
    mask_BL = (torch.arange(24) == 0).long().expand(2, 24)
    with torch.no_grad():
        expected = model(ids_BL, global_attention_mask=mask_BL).logits
    assert largest_difference(tmp_path, expected, ids_BL) < 1e-5


def test_gpt2_was_saved_as_a_backbone(tmp_path):
    model = original("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=66)
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 66, 66) for i in range(2)}
    write(tmp_path, state, {**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"]})
    assert largest_difference(tmp_path, model(ids_BL := ids()).logits, ids_BL) < 1e-5


def test_todays_names_of_images_are_read_too(tmp_path):
    """transformers 5 has other names in memory than in its files; a state dict that was saved has those."""
    sizes = {"image_size": 32, "patch_size": 8, "num_labels": 5}
    model = original("ViTForImageClassification", **{k: v for k, v in SIZES.items() if "vocab" not in k}, **sizes)
    write(tmp_path, model.state_dict(), {**model.config.to_dict(), "architectures": ["ViTForImageClassification"]})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = import_checkpoint(tmp_path).model(pixel_values=images).logits
        assert (found - model(images).logits).abs().max() < 1e-5


def test_reformers_buffers_and_unused_bias(tmp_path):
    model = original(
        "ReformerModelWithLMHead", attn_layers=["local", "lsh"], attention_head_size=8, feed_forward_size=48,
        axial_pos_shape=(4, 16), axial_pos_embds_dim=(12, 20), max_position_embeddings=64, num_buckets=4, hash_seed=3,
        is_decoder=True, local_attn_chunk_length=8, lsh_attn_chunk_length=8,
    )  # fmt: skip
    state = dict(model.state_dict())
    place = "reformer.encoder.layers.1.attention.self_attention."
    state |= {f"{place}{n}": torch.tensor(-1e4) for n in ("mask_value_float16", "self_mask_value_float32")}
    write(tmp_path, state, {**model.config.to_dict(), "architectures": ["ReformerModelWithLMHead"]})
    assert largest_difference(tmp_path, model(ids_BL := ids()).logits, ids_BL) < 1e-4


def test_one_tensor_under_two_names_is_refused(tmp_path):
    model = original("BertForMaskedLM")
    state = dict(model.state_dict())
    state["bert.embeddings.LayerNorm.gamma"] = state["bert.embeddings.LayerNorm.weight"] + 1
    write(tmp_path, state, {**model.config.to_dict(), "architectures": ["BertForMaskedLM"]})
    with pytest.raises(CheckpointError, match=r"LayerNorm\.gamma.*LayerNorm\.weight"):
        import_checkpoint(tmp_path)


def test_a_class_that_is_not_known_is_refused(tmp_path):
    model = original("BertForMaskedLM")
    write(tmp_path, model.state_dict(), {**model.config.to_dict(), "architectures": ["BertForQuestionAnswering"]})
    with pytest.raises(CheckpointError, match=r"architectures\.0 is 'BertForQuestionAnswering'; supported: BertForM"):
        import_checkpoint(tmp_path)
