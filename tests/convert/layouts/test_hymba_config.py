"""Options of Hymba's config; its weights are tried in test_peers.py."""

from __future__ import annotations

import json

import pytest
from peers import hymba

from zoo.convert.layouts import export_model, import_checkpoint
from zoo.errors import CheckpointError


def test_positions_windows_and_shared_keys_are_read(tmp_path):
    hymba.save(tmp_path)
    found = import_checkpoint(tmp_path).model
    mixers = [layer.mixer for layer in found.config.spec.layers]
    assert [m.window for m in mixers] == hymba.WINDOWS
    assert [m.kv_back for m in mixers] == hymba.BACK
    assert [m.sinks for m in mixers] == [0, hymba.M, hymba.M, hymba.M, 0]
    assert all(m.rotary.theta == pytest.approx(10000) for m in mixers)  # 7 ** (K / (K - 2)) times what the file says
    export_model(found, "transformers", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["kv_reuse_group"] == [[1, 2, 3]]
    assert written["auto_map"]["AutoModelForCausalLM"].startswith("nvidia/Hymba-1.5B-Base--")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_experts": None}, "num_experts is 16; only 1"),
        ({"kq_norm": "rms"}, "kq_norm is 'rms'; only 'none'"),
        ({"layer_type": ["h", "m"]}, "layer_type is .*; only 'h'"),
        ({"rope_type": "dynamic_ntk"}, "rope_type is 'dynamic_ntk'; known are default and ntk"),
        ({"kv_reuse_group": [[0, 1]]}, r"kv_reuse_group has \[0, 1\], not windows"),
        ({"mamba_expand": 1}, "4 heads of 12 are not mamba_expand times hidden_size"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, said):
    hymba.save(tmp_path)
    config = {**hymba.CONFIG, **options}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(tmp_path)
