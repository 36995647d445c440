"""The names and shapes of timm's models, as timm 1.0.31 stores them: what holds where timm is not installed."""

from __future__ import annotations

import pytest

import zoo
from zoo.convert.layouts.api import family_for
from zoo.convert.layouts.loading import written_shapes
from zoo.errors import ExportError
from zoo.registry import model_config

VIT = {
    "cls_token": (1, 1, 192), "pos_embed": (1, 197, 192), "patch_embed.proj.weight": (192, 3, 16, 16),
    "patch_embed.proj.bias": (192,), "blocks.11.norm1.weight": (192,), "blocks.11.attn.qkv.weight": (576, 192),
    "blocks.11.attn.qkv.bias": (576,), "blocks.11.attn.proj.weight": (192, 192), "blocks.11.norm2.bias": (192,),
    "blocks.11.mlp.fc1.weight": (768, 192), "blocks.11.mlp.fc2.weight": (192, 768), "norm.weight": (192,),
    "head.weight": (1000, 192), "head.bias": (1000,),
}  # fmt: skip
SWIN = {
    "patch_embed.norm.weight": (96,), "layers.0.blocks.0.attn.relative_position_bias_table": (169, 3),
    "layers.1.downsample.norm.weight": (384,), "layers.1.downsample.reduction.weight": (192, 384),
    "layers.2.blocks.5.attn.qkv.weight": (1152, 384), "layers.3.blocks.1.mlp.fc1.weight": (3072, 768),
    "norm.bias": (768,), "head.fc.weight": (1000, 768),
}  # fmt: skip
CASES = {
    "vit-tiny-patch16-224": ("vit_tiny_patch16_224", 152, VIT),
    "deit-tiny-distilled-patch16-224": (
        "deit_tiny_distilled_patch16_224", 155,
        {"dist_token": (1, 1, 192), "pos_embed": (1, 198, 192), "head_dist.weight": (1000, 192)},
    ),
    "swin-tiny-patch4-window7-224": ("swin_tiny_patch4_window7_224", 173, SWIN),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes(name):
    architecture, count, expected = CASES[name]
    config = model_config(name)
    family, values = family_for(config, "timm")
    found = written_shapes(family, config)
    assert values["architecture"] == architecture
    assert len(found) == count
    assert {key: found.get(key) for key in expected} == expected
    assert family.name == ("swin" if "swin" in name else "vit")


def test_a_model_of_text_is_refused():
    with pytest.raises(ExportError, match="timm"):
        family_for(model_config("bert-tiny"), "timm")
    assert "timm" in zoo.convert.layouts.list_layouts()
