"""Zamba2's shared transformers, which files may hold once or once for each reader. The rest is in test_peers.py."""

from __future__ import annotations

import json

import pytest
import torch
from peers import PEERS
from safetensors.torch import load_file, save_file

from zoo.convert.layouts import export_model, import_checkpoint
from zoo.errors import CheckpointError, ExportError


@pytest.fixture
def folder(tmp_path):
    """One shared transformer, at layer 1; layers 3 to 5 read it too."""
    torch.manual_seed(0)
    next(peer for peer in PEERS if str(peer) == "transformers-zamba2").save(tmp_path)
    return tmp_path


def edit(folder, tensors=None, **options):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_copies_are_read_where_they_agree(folder):
    ids = torch.randint(0, 61, (2, 9))
    expected = import_checkpoint(folder).model(ids).logits
    tensors = load_file(folder / "model.safetensors")
    shared = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.shared_transformer.")}
    copies = {n.replace("layers.1.", "layers.4."): t.clone() for n, t in shared.items()}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}
    edit(folder, {**tensors, **copies, **head}, tie_word_embeddings=False)
    found = import_checkpoint(folder).model
    torch.testing.assert_close(found(ids).logits, 2 * expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ExportError, match="tie_word_embeddings is false; its class then shares no transformer"):
        export_model(found, "transformers", folder / "out")
    name = "model.layers.4.shared_transformer.self_attn.k_proj.weight"
    edit(folder, {**tensors, **copies, **head, name: copies[name] + 1})
    with pytest.raises(CheckpointError, match=f"{name} differs from model.layers.1.shared"):
        import_checkpoint(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"add_bias_linear": True}, "add_bias_linear is True; only False"),
        ({"use_long_context": True}, "use_long_context is True; only False"),
        ({"n_mamba_heads": 7}, "n_mamba_heads is 7, of an inner width of 64"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, of an inner width of 64"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, where maps for 4 are added"),
        ({"layers_block_type": ["hybrid"]}, r"layers_block_type is \['hybrid'\], of 6 layers"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, options, said):
    edit(folder, **options)
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(folder)
