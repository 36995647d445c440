"""Mamba-2 with layers of attention in mamba_ssm's layout, beyond its peers: what is refused, and by which name."""

from __future__ import annotations

import json

import pytest
import torch
from peers.mamba2_attention import PUBLISHED as SIZES
from peers.mamba2_attention import saves

import zoo
from zoo.convert.layouts import export_model, import_checkpoint
from zoo.errors import CheckpointError, ExportError

PUBLISHED = {**SIZES, "qkv_proj_bias": False, "out_proj_bias": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mamba2_attention")
    saves([1], **PUBLISHED)(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_cfg": {**PUBLISHED, "causal": False}}, "attn_cfg.causal is False; only True"),
        ({"attn_cfg": {**PUBLISHED, "causal": True, "mlp_dim": 256}}, "attn_cfg.mlp_dim is 256; only 0"),
        ({"attn_cfg": {**PUBLISHED, "causal": True, "alibi": True}}, "attn_cfg.alibi is True, which cannot"),
        ({"attn_layer_idx": [1, 4]}, "attn_layer_idx has 4, of 4 layers"),
        ({"attn_cfg": {**PUBLISHED, "causal": True, "d_conv": 3}}, r"layers\.1\.mixer\.\w+\.\w+ is .*, expected"),
    ],
)
def test_what_cannot_be_expressed_is_refused(folder, tmp_path, options, message):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **options}))
    (tmp_path / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": {"window": 5}}, r"mamba2_attention: layers\.1\.mixer\.window: 5, where the layout has None"),
        ({"attention": {"conv_activation": "silu"}}, r"layers\.1\.mixer\.conv_activation: 'silu', where"),
        ({"mamba2": {"conv": None, "conv_bias": False}}, "mamba2_attention: .*conv is None"),
    ],
)
def test_what_the_module_has_not_is_refused(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_model(zoo.create_model("mamba2-attn-tiny", layers={"mixers": options}), "mamba_ssm", tmp_path / "out")
